"""VICReg written from the paper in plain loops: no code shared with selfsup. Only the backbone is timm's.

Bardes et al., 2022, algorithm 1 and section 4.2, with the factors of the published code, for global and local views as in
VICRegL; batch norm of the expander written out; SGD with momentum, or AdamW (Loshchilov & Hutter, 2019, algorithm 2).
"""

import torch

from tests.methods.oracle_dino import cosine_schedule


def batch_norm(x, w, name, running):
    """[B, D] with the statistics of these images; running ones move by 0.1, with the unbiased variance."""
    mean = x.sum(0) / len(x)
    var = ((x - mean) ** 2).sum(0) / len(x)
    with torch.no_grad():
        running[f"{name}.running_mean"] = 0.9 * running[f"{name}.running_mean"] + 0.1 * mean
        running[f"{name}.running_var"] = 0.9 * running[f"{name}.running_var"] + 0.1 * var * len(x) / (len(x) - 1)
    return (x - mean) / (var + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def expander(x, w, running):
    """Three linear layers, batch norm and ReLU after the first two."""
    for linear, norm in (("layers.0", "layers.1"), ("layers.3", "layers.4")):
        x = batch_norm(x @ w[f"{linear}.weight"].T, w, norm, running)
        x = x * (x > 0)
    return x @ w["layers.6.weight"].T


def loss_of(z, global_views):
    """z: list of [B, D], the global views first."""
    batch, dim = z[0].shape
    invariance, pairs = 0.0, 0
    for t in range(global_views):
        for s in range(len(z)):
            if s != t:
                invariance = invariance + ((z[t] - z[s]) ** 2).sum() / (batch * dim)
                pairs += 1
    variance = covariance = 0.0
    for x in z:
        x = x - x.sum(0) / batch
        matrix = x.T @ x / (batch - 1)
        for j in range(dim):
            std = (matrix[j, j] + 1e-4).sqrt()
            if std < 1:
                variance = variance + (1 - std) / dim
            covariance = covariance + (matrix[j] ** 2).sum() / dim - matrix[j, j] ** 2 / dim
    return 25 * invariance / pairs + 25 * variance / len(z) + 2 * covariance / len(z)


def run(backbone, head_weights, batches, o):
    """Train for len(batches) steps; batches: list of (global [G, B, C, S, S], local [L, B, C, s, s]); o: dict of options.

    Returns losses, and weights and running statistics (names as in a checkpoint, without the role).
    """
    steps = len(batches)
    running = {k: v.clone() for k, v in head_weights.items() if "running" in k}
    head = {
        k: v.clone().requires_grad_() for k, v in head_weights.items() if v.is_floating_point() and k not in running
    }
    names = dict(backbone.named_parameters())
    params = {**{f"backbone.model.{k}": p for k, p in names.items()}, **{f"head.{k}": p for k, p in head.items()}}
    lrs = cosine_schedule(o["lr"], o["min_lr"], steps, o["warmup"])
    wds = cosine_schedule(o["wd"], o["wd_end"], steps, 0)
    first, second, losses = {}, {}, []
    for i, (crops_global, crops_local) in enumerate(batches):
        z = [expander(backbone(x), head, running) for x in [*crops_global, *crops_local]]
        loss = loss_of(z, len(crops_global))
        losses.append(loss.item())
        for p in params.values():
            p.grad = None
        loss.backward()
        with torch.no_grad():
            for name, p in params.items():
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
                    m, v = first.get(name, 0.0), second.get(name, 0.0)
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
                    first[name], second[name] = m, v
                    p -= lrs[i] * decay * p
                    p -= lrs[i] * (m / (1 - 0.9 ** (i + 1))) / ((v / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
    weights = {f"backbone.model.{k}": v.detach() for k, v in backbone.state_dict().items()}
    return losses, {**weights, **{f"head.{k}": v.detach() for k, v in {**head, **running}.items()}}
