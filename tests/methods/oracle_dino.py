"""DINO written from the paper in plain loops: no code shared with selfsup. Only the backbone is timm's.

Caron et al., 2021, algorithm 1, with the published code's schedules, per-parameter clipping and AdamW (Loshchilov &
Hutter, 2019, algorithm 2) or SGD with momentum, spelled out.
"""

import copy
import math

import torch


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def head(x, w):
    """Three linear layers, l2-normalised bottleneck, weight-normalised prototypes; w: dict of tensors."""
    x = gelu(x @ w["mlp.0.weight"].T + w["mlp.0.bias"])
    x = gelu(x @ w["mlp.2.weight"].T + w["mlp.2.bias"])
    x = x @ w["mlp.4.weight"].T + w["mlp.4.bias"]
    x = x / x.pow(2).sum(-1, keepdim=True).sqrt()
    v = w["last_layer.weight_v"]
    prototypes = w["last_layer.weight_g"] * v / v.pow(2).sum(-1, keepdim=True).sqrt()
    return x @ prototypes.T


def cosine_schedule(base, final, steps, warmup):
    values = [base * i / max(1, warmup - 1) for i in range(warmup)]
    rest = steps - warmup
    values += [final + 0.5 * (base - final) * (1 + math.cos(math.pi * i / rest)) for i in range(rest)]
    return values


def run(backbone, head_weights, batches, o):
    """Train for len(batches) steps; batches: list of (global [2, B, C, S, S], local [L, B, C, s, s]); o: dict of options.

    Returns losses, student and teacher weights (names as in a checkpoint, without the role) and the centre.
    """
    steps = len(batches)
    student, teacher = backbone, copy.deepcopy(backbone)
    s_head = {k: v.clone().requires_grad_(k != "last_layer.weight_g") for k, v in head_weights.items()}
    t_head = {k: v.clone() for k, v in head_weights.items()}
    names = dict(student.named_parameters())
    params = {**{f"backbone.model.{k}": p for k, p in names.items()}, **{f"head.{k}": p for k, p in s_head.items()}}
    center = torch.zeros(head_weights["last_layer.weight_v"].shape[0], dtype=o["dtype"])
    lrs = cosine_schedule(o["lr"], o["min_lr"], steps, o["warmup"])
    wds = cosine_schedule(o["wd"], o["wd_end"], steps, 0)
    momenta = cosine_schedule(o["momentum"], 1.0, steps, 0)
    first, second = {}, {}
    losses = []

    for i, (crops_global, crops_local) in enumerate(batches):
        temperature = o["temp_from"] + (o["temp_to"] - o["temp_from"]) * min(1.0, i / o["temp_steps"])
        with torch.no_grad():
            t_out = [head(teacher(x), t_head) for x in crops_global]
        s_out = [head(student(x), s_head) for x in list(crops_global) + list(crops_local)]
        total, terms = 0.0, 0
        for it, t in enumerate(t_out):
            logits = (t - center) / temperature
            q = torch.exp(logits - logits.max(-1, keepdim=True).values)
            q = q / q.sum(-1, keepdim=True)
            for iv, z in enumerate(s_out):
                if iv == it:
                    continue
                z = z / o["student_temp"]
                log_p = z - torch.log(torch.exp(z - z.max(-1, keepdim=True).values).sum(-1, keepdim=True))
                log_p = log_p - z.max(-1, keepdim=True).values
                total = total + (-(q * log_p).sum(-1)).mean()
                terms += 1
        loss = total / terms
        losses.append(loss.item())
        for p in params.values():
            p.grad = None
        loss.backward()

        with torch.no_grad():
            for name, p in params.items():
                if p.grad is None:
                    continue
                if i < o["freeze_steps"] and name.startswith("head.last_layer"):
                    continue
                g = p.grad
                norm = g.pow(2).sum().sqrt()
                if o["clip"] / (norm + 1e-6) < 1:
                    g = g * (o["clip"] / (norm + 1e-6))
                decay = 0.0 if p.ndim == 1 or name.endswith(".bias") else wds[i]
                if o["optimizer"] == "sgd":
                    g = g + decay * p
                    first[name] = g.clone() if name not in first else 0.9 * first[name] + g
                    p -= lrs[i] * first[name]
                else:
                    m, v, n = first.get(name, 0.0), second.get(name, 0.0), first.get(name + "#", 0) + 1
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                    first[name], second[name], first[name + "#"] = m, v, n
                    p -= lrs[i] * decay * p
                    p -= lrs[i] * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
            for p, q in zip(teacher.parameters(), student.parameters()):
                p.copy_(momenta[i] * p + (1 - momenta[i]) * q)
            for k in t_head:
                t_head[k].copy_(momenta[i] * t_head[k] + (1 - momenta[i]) * s_head[k])
            everything = torch.cat(t_out)
            center = o["center_momentum"] * center + (1 - o["center_momentum"]) * everything.mean(0)

    def weights(model, h):
        flat = {f"backbone.model.{k}": v.detach() for k, v in model.state_dict().items()}
        return {**flat, **{f"head.{k}": v.detach() for k, v in h.items()}}

    return losses, weights(student, s_head), weights(teacher, t_head), center
