"""iBOT and DINOv2 from the papers in plain loops: no code shared with selfsup. Only the layers of the backbone are timm's.

Zhou et al., 2022, algorithm 1, and Oquab et al., 2024, section 4, with the published codes' normalisations: the loss of masked
patches is a mean in each view and then over all views; Sinkhorn-Knopp three times, prototypes first; KoLeo a sum over views.
"""

import copy
import math

import torch

from tests.methods.oracle_dino import cosine_schedule, head


def tokens(model, images, hidden=None, mask_token=None):
    """[N, C, S, S] -> CLS and patches after the final norm; hidden: a list of sets of masked patches."""
    x = model.patch_embed(images).flatten(1, 2)  # [N, T, D]
    if hidden is not None:
        rows = [
            torch.stack([mask_token if t in places else row[t] for t in range(len(row))])
            for row, places in zip(x, hidden)
        ]
        x = torch.stack(rows)
    side = math.isqrt(x.shape[1])
    x = model._pos_embed(x.unflatten(1, (side, side)))
    for block in model.blocks:
        x = block(x)
    x = model.norm(x)
    return x[:, 0], x[:, 1:]


def log_softmax(z):
    z = z - z.max(-1, keepdim=True).values
    return z - torch.log(torch.exp(z).sum(-1, keepdim=True))


def sinkhorn(scores, temperature):
    """[B, K] -> [B, K]; the published code of DINOv2."""
    q = torch.exp(scores / temperature).T  # [K, B]
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def koleo(x):
    """[B, D]: every pair."""
    x = x / x.pow(2).sum(-1, keepdim=True).sqrt()
    total = 0.0
    for i in range(len(x)):
        distances = [((x[i] - x[j]) ** 2).sum().sqrt() for j in range(len(x)) if j != i]
        total = total - torch.log(min(distances, key=lambda d: d.item()) + 1e-8)
    return total / len(x)


def run(backbone, head_weights, batches, masks, o):
    """Train for len(batches) steps. batches: (global [2, B, C, S, S], local [L, B, C, s, s]); masks: [2][B] sets a step.

    Returns losses, student, teacher and centres.
    """
    steps, dinov2 = len(batches), o["name"] == "dinov2"
    student, teacher = backbone, copy.deepcopy(backbone)
    s_head = {k: v.clone().requires_grad_(not k.endswith("weight_g")) for k, v in head_weights.items()}
    t_head = {k: v.clone() for k, v in head_weights.items()}

    def part(w, name):
        found = {k.removeprefix(f"{name}."): v for k, v in w.items() if k.startswith(f"{name}.")}
        return found or part(w, "cls")  # shared

    params = {f"backbone.model.{k}": p for k, p in student.named_parameters()}
    params |= {f"head.{k}": p for k, p in s_head.items()}
    centers = [torch.zeros(len(part(t_head, n)["last_layer.weight_v"]), dtype=torch.float64) for n in ("cls", "patch")]
    lrs = cosine_schedule(o["lr"], o["min_lr"], steps, o["warmup"])
    wds = cosine_schedule(o["wd"], o["wd_end"], steps, 0)
    momenta = cosine_schedule(o["momentum"], 1.0, steps, 0)
    first, second, losses = {}, {}, []
    for i, (crops_global, crops_local) in enumerate(batches):
        temperature = 0.04 + (0.07 - 0.04) * min(1.0, i / 5)
        batch = crops_global.shape[1]
        with torch.no_grad():
            seen = [tokens(teacher, x) for x in crops_global]
            t_cls = [head(cls, part(t_head, "cls")) for cls, _ in seen]  # [B, K] each
            t_patch = [head(patches, part(t_head, "patch")) for _, patches in seen]  # [B, T, K'] each
            if dinov2:
                q_cls = sinkhorn(torch.cat(t_cls), temperature).chunk(2)
                flat = [(v, b, t) for v in range(2) for b in range(batch) for t in sorted(masks[i][v][b])]
                q = sinkhorn(torch.stack([t_patch[v][b, t] for v, b, t in flat]), temperature)
                q_patch = dict(zip(flat, q))
            else:
                q_cls = [torch.exp(log_softmax((t - centers[0]) / temperature)) for t in t_cls]
                q_patch = {
                    (v, b, t): torch.exp(log_softmax((t_patch[v][b, t] - centers[1]) / temperature))
                    for v in range(2)
                    for b in range(batch)
                    for t in masks[i][v][b]
                }
        s_seen = [tokens(student, x, masks[i][v], s_head["mask_token"]) for v, x in enumerate(crops_global)]
        s_cls = [cls for cls, _ in s_seen] + [tokens(student, x)[0] for x in crops_local]
        total, terms = 0.0, 0
        for it, q in enumerate(q_cls):
            for iv, cls in enumerate(s_cls):
                if iv != it:
                    log_p = log_softmax(head(cls, part(s_head, "cls")) / 0.1)
                    total, terms = total + (-(q * log_p).sum(-1)).mean(), terms + 1
        loss = total / terms
        masked = 0.0
        for v in range(2):
            for b in range(batch):
                places = masks[i][v][b]
                each = [
                    -(q_patch[v, b, t] * log_softmax(head(s_seen[v][1][b, t], part(s_head, "patch")) / 0.1)).sum()
                    for t in places
                ]
                masked = masked + sum(each) / max(1, len(places))
        loss = loss + masked / (2 * batch)
        if dinov2:
            loss = loss + 0.1 * sum(koleo(cls) for cls, _ in s_seen)
        losses.append(loss.item())
        for p in params.values():
            p.grad = None
        loss.backward()

        with torch.no_grad():
            for name, p in params.items():
                if p.grad is None or (i < o["freeze_steps"] and "last_layer" in name):
                    continue
                norm = p.grad.pow(2).sum().sqrt()
                g = p.grad * min(1.0, o["clip"] / (norm.item() + 1e-6))
                decay = 0.0 if p.ndim == 1 or name.endswith(".bias") else wds[i]
                m, v, n = first.get(name, 0.0), second.get(name, 0.0), first.get(name + "#", 0) + 1
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                first[name], second[name], first[name + "#"] = m, v, n
                p -= lrs[i] * decay * p
                p -= lrs[i] * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
            for p, q in zip(teacher.parameters(), student.parameters()):
                p.copy_(momenta[i] * p + (1 - momenta[i]) * q)
            for k in t_head:
                t_head[k].copy_(momenta[i] * t_head[k] + (1 - momenta[i]) * s_head[k])
            means = (torch.cat(t_cls).mean(0), torch.cat(t_patch).mean((0, 1)))
            centers = [0.9 * c + 0.1 * m for c, m in zip(centers, means)]

    def weights(model, h):
        flat = {f"backbone.model.{k}": v.detach() for k, v in model.state_dict().items()}
        return {**flat, **{f"head.{k}": v.detach() for k, v in h.items()}}

    return losses, weights(student, s_head), weights(teacher, t_head), centers
