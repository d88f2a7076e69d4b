"""BYOT written from the paper in plain torch: no code shared with selfsup. Only the backbone is timm's.

Zhang et al., 2019, figure 2 and equations 5 to 8; SGD with momentum and AdamW (Loshchilov & Hutter, 2019) spelled out.
"""

import torch

from tests.methods.oracle_dino import cosine_schedule


def normalise(x, w, key, kind):
    """Over the batch and the map for each channel, or over the channels at each place of it; x [B, C, h, w]."""
    over, eps = ((0, 2, 3), 1e-5) if kind == "batch" else ((1,), 1e-6)
    mean = x.mean(over, keepdim=True)
    variance = (x - mean).pow(2).mean(over, keepdim=True)
    x = (x - mean) / (variance + eps).sqrt()
    return x * w[f"{key}.weight"][:, None, None] + w[f"{key}.bias"][:, None, None]


def exit_(x, w, kind):
    """Bottleneck and classifier: (feature, logits); w: its tensors."""
    x = torch.einsum("bchw,dc->bdhw", x, w["reduce.0.weight"][:, :, 0, 0])
    x = normalise(x, w, "reduce.1", kind).clamp(min=0)
    i = 3
    while f"reduce.{i}.weight" in w:
        x = torch.nn.functional.pad(x, (1, 1, 1, 1))
        x = x.unfold(2, 3, 2).unfold(3, 3, 2)  # [B, C, h, w, 3, 3]
        x = torch.einsum("bchwij,cij->bchw", x, w[f"reduce.{i}.weight"][:, 0])
        x = torch.einsum("bchw,dc->bdhw", x, w[f"reduce.{i + 1}.weight"][:, :, 0, 0])
        x = normalise(x, w, f"reduce.{i + 2}", kind).clamp(min=0)
        i += 4
    x = torch.einsum("bchw,dc->bdhw", x, w["expand.weight"]) + w["expand.bias"][:, None, None]
    feature = x.mean((2, 3))  # after the convolution, as in the paper
    return feature, feature @ w["classifier.weight"].T + w["classifier.bias"]


def run(backbone, stages, to_map, weights, batches, o):
    """Train for len(batches) steps.

    backbone: timm's, images -> pooled. stages: its modules after which there is an exit; to_map: of what they give.
    weights: {'head': {...}, 'exit1': {...}, ...}. batches: (images, labels). Returns (losses, all weights by name).
    """
    seen = []
    for stage in stages:
        stage.register_forward_hook(lambda _m, _i, out: seen.append(to_map(out)))
    parts = {name: {k: v.clone().requires_grad_() for k, v in part.items()} for name, part in weights.items()}
    params = {f"backbone.model.{k}": p for k, p in backbone.named_parameters()}
    params |= {f"head.{k}": p for k, p in parts["head"].items()}
    exits = [name for name in parts if name != "head"]
    for name in exits:
        params |= {f"exits.{name}.{k}": p for k, p in parts[name].items()}
    lrs = cosine_schedule(o["lr"], o["min_lr"], len(batches), o["warmup"])
    first, second, losses = {}, {}, []

    for i, (images, labels) in enumerate(batches):
        seen.clear()
        deepest = backbone(images)
        out = [exit_(m, parts[name], o["norm"]) for name, m in zip(exits, seen, strict=True)]
        out.append((deepest, deepest @ parts["head"]["weight"].T + parts["head"]["bias"]))
        rows = torch.arange(len(labels))
        teacher = torch.softmax(out[-1][1].detach() / o["temperature"], -1)
        loss = -torch.log(torch.softmax(out[-1][1], -1))[rows, labels].mean()
        for feature, logits in out[:-1]:
            ce = -torch.log(torch.softmax(logits, -1))[rows, labels].mean()
            student = torch.softmax(logits / o["temperature"], -1)
            kl = (teacher * (torch.log(teacher) - torch.log(student))).sum(-1).mean() * o["temperature"] ** 2
            hint = (feature - deepest.detach()).pow(2).sum(-1).mean()
            loss = loss + (1 - o["alpha"]) * ce + o["alpha"] * kl + o["feature_weight"] * hint
        losses.append(loss.item())
        for p in params.values():
            p.grad = None
        loss.backward()

        with torch.no_grad():
            for name, p in params.items():
                g = p.grad
                decay = 0.0 if p.ndim == 1 or name.endswith(".bias") else o["wd"]
                if o["optimizer"] == "sgd":
                    g = g + decay * p
                    first[name] = g.clone() if i == 0 else 0.9 * first[name] + g
                    p -= lrs[i] * first[name]
                else:
                    first[name] = 0.9 * first.get(name, 0.0) + 0.1 * g
                    second[name] = 0.999 * second.get(name, 0.0) + 0.001 * g * g
                    p -= lrs[i] * decay * p
                    corrected = second[name] / (1 - 0.999 ** (i + 1))
                    p -= lrs[i] * (first[name] / (1 - 0.9 ** (i + 1))) / (corrected.sqrt() + 1e-8)
    return losses, {name: p.detach() for name, p in params.items()}
