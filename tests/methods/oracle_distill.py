"""Distillation and DeiT written from the papers in plain loops: no code shared with selfsup. Only the networks are timm's.

Hinton et al., 2015, section 2 (cross-entropy and T^2 KL); Touvron et al., 2021, equation 3 (DeiT, hard); SGD with momentum,
clipped a parameter, spelled out.
"""

import torch

from tests.methods.oracle_dino import cosine_schedule


def log_softmax(z):
    z = z - z.max(-1, keepdim=True).values
    return z - torch.log(torch.exp(z).sum(-1, keepdim=True))


def cross_entropy(z, labels, smoothing=0.0):
    classes = z.shape[1]
    total = 0.0
    for row, label in zip(log_softmax(z), labels.tolist()):
        for k in range(classes):
            q = (1 - smoothing) * (k == label) + smoothing / classes
            total = total - q * row[k]
    return total / len(z)


def kl(teacher, student, temperature):
    log_q, log_p = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * (torch.exp(log_q) * (log_q - log_p)).sum() / len(student)


def renormalise(images, mean, std, teacher_mean, teacher_std):
    """Channel by channel: to [0, 1] with the student's values, then the teacher's."""
    out = torch.empty_like(images)
    for c in range(images.shape[1]):
        out[:, c] = (images[:, c] * std[c] + mean[c] - teacher_mean[c]) / teacher_std[c]
    return out


def run(params, loss_of, batches, o):
    """Train for len(batches) steps; params: dict of leaf tensors; loss_of(images, labels) -> scalar. Returns losses."""
    steps = len(batches)
    lrs = cosine_schedule(o["lr"], o["min_lr"], steps, o["warmup"])
    wds = cosine_schedule(o["wd"], o["wd_end"], steps, 0)
    moved, losses = {}, []
    for i, (images, labels) in enumerate(batches):
        for p in params.values():
            p.grad = None
        loss = loss_of(images, labels)
        losses.append(loss.item())
        loss.backward()
        with torch.no_grad():
            for name, p in params.items():
                g = p.grad
                norm = g.pow(2).sum().sqrt()
                if o["clip"] / (norm + 1e-6) < 1:
                    g = g * (o["clip"] / (norm + 1e-6))
                g = g + (0.0 if p.ndim == 1 or name.endswith(".bias") else wds[i]) * p
                moved[name] = g.clone() if name not in moved else 0.9 * moved[name] + g
                p -= lrs[i] * moved[name]
    return losses
