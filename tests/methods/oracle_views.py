"""MoCo v2 and SwAV written from the papers in plain loops: no code shared with selfsup. Only the backbone is timm's.

He et al., 2020, algorithm 1, with the head and temperature of Chen et al., 2020; Caron et al., 2020, sections 3.1 to 3.3 and
the order of things in their published code: assign with the queue, if it is full, then put the embeddings into the queue.
"""

import copy

import torch

from tests.methods.oracle_dino import cosine_schedule


class SGD:
    """With momentum, L2 in the gradient and clipping of each parameter's gradient, on schedules."""

    def __init__(self, params, steps, o):
        self.params, self.o, self.buffers = params, o, {}
        self.lrs = cosine_schedule(o["lr"], o["min_lr"], steps, o["warmup"])
        self.wds = cosine_schedule(o["wd"], o["wd_end"], steps, 0)

    def step(self, i, loss):
        for p in self.params.values():
            p.grad = None
        loss.backward()
        with torch.no_grad():
            for name, p in self.params.items():
                if p.grad is None:
                    continue
                norm = p.grad.pow(2).sum().sqrt()
                g = p.grad * min(1.0, (self.o["clip"] / (norm + 1e-6)).item())
                g = g + (0.0 if p.ndim == 1 or name.endswith(".bias") else self.wds[i]) * p
                self.buffers[name] = g.clone() if name not in self.buffers else 0.9 * self.buffers[name] + g
                p -= self.lrs[i] * self.buffers[name]


def unit(x):
    return x / x.pow(2).sum(-1, keepdim=True).sqrt()


def flat(model, head):
    found = {f"backbone.model.{k}": v.detach() for k, v in model.state_dict().items()}
    return {**found, **{f"head.{k}": v.detach() for k, v in head.items()}}


def moco(backbone, head, queue, batches, o):
    """batches: (global [2, B, C, S, S], local [L, B, C, s, s]); the key is of the second global view. queue: K rows.

    Returns losses, student and teacher weights (names as in a checkpoint, without the role) and the queue.
    """

    def project(x, w):
        x = torch.relu(x @ w["layers.0.weight"].T + w["layers.0.bias"])
        return unit(x @ w["layers.2.weight"].T + w["layers.2.bias"])

    s, t = backbone, copy.deepcopy(backbone)
    s_head = {k: v.clone().requires_grad_() for k, v in head.items()}
    t_head = {k: v.clone() for k, v in head.items()}
    params = {f"backbone.model.{k}": p for k, p in s.named_parameters()}
    optimizer = SGD(params | {f"head.{k}": p for k, p in s_head.items()}, len(batches), o)
    queue, oldest, losses = [row.clone() for row in queue], 0, []
    for i, (big, small) in enumerate(batches):
        with torch.no_grad():
            keys = project(t(big[1]), t_head)
        terms = []
        for view in [big[0], *small]:
            for q, k in zip(project(s(view), s_head), keys):
                logits = torch.stack([q @ k, *[q @ other for other in queue]]) / o["temperature"]
                terms.append(-torch.log(torch.exp(logits[0]) / torch.exp(logits).sum()))
        loss = sum(terms) / len(terms)
        losses.append(loss.item())
        optimizer.step(i, loss)
        with torch.no_grad():
            for p, q in zip(t.parameters(), s.parameters()):
                p.copy_(o["momentum"] * p + (1 - o["momentum"]) * q)
            for name in t_head:
                t_head[name] = o["momentum"] * t_head[name] + (1 - o["momentum"]) * s_head[name]
        for k in keys:
            queue[oldest] = k
            oldest = (oldest + 1) % len(queue)
    return losses, flat(s, s_head), flat(t, t_head), torch.stack(queue)


def sinkhorn(scores, o):
    """Rows are images: exponentials, then columns and rows divided by their sums in turn."""
    q = torch.exp(scores / o["epsilon"])
    q = q / q.sum()
    for _ in range(o["iterations"]):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def swav(backbone, head, batches, o):
    """batches: (global [2, B, C, S, S], local [L, B, C, s, s]). Returns losses, weights and the queue, newest first."""
    w = {k: v.clone().requires_grad_(v.is_floating_point() and "running" not in k) for k, v in head.items()}
    params = {f"backbone.model.{k}": p for k, p in backbone.named_parameters()}
    optimizer = SGD(params | {f"head.{k}": p for k, p in w.items() if p.requires_grad}, len(batches), o)
    queues, losses, size = [[], []], [], batches[0][0].shape[1]
    for i, (big, small) in enumerate(batches):
        views = [*big, *small]
        x = torch.cat([backbone(view) for view in views]) @ w["projection.layers.0.weight"].T
        mean, var = x.mean(0), x.var(0, unbiased=False)
        with torch.no_grad():
            for name, value in (("running_mean", mean), ("running_var", x.var(0, unbiased=True))):
                w[f"projection.layers.1.{name}"] = 0.9 * w[f"projection.layers.1.{name}"] + 0.1 * value
            w["projection.layers.1.num_batches_tracked"] = w["projection.layers.1.num_batches_tracked"] + 1
        x = (x - mean) / (var + 1e-5).sqrt() * w["projection.layers.1.weight"] + w["projection.layers.1.bias"]
        x = torch.relu(x) @ w["projection.layers.3.weight"].T + w["projection.layers.3.bias"]
        z = unit(x)
        prototypes = w["prototypes.weight"]
        scores = z @ (prototypes.detach() if i < o["freeze_steps"] else prototypes).T
        codes = []
        for view in range(2):
            rows = scores[view * size : (view + 1) * size].detach()
            if len(queues[view]) == o["queue_length"]:
                rows = torch.cat([torch.stack(queues[view]) @ prototypes.detach().T, rows])
            codes.append(sinkhorn(rows, o)[-size:])
            if i >= o["queue_start"]:
                new = list(z[view * size : (view + 1) * size].detach())
                queues[view] = (new + queues[view])[: o["queue_length"]]
        loss = 0.0
        for t in range(2):
            part = 0.0
            for v in range(len(views)):
                if v != t:
                    logits = scores[v * size : (v + 1) * size] / o["temperature"]
                    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
                    part = part - (codes[t] * torch.log(p)).sum(1).mean()
            loss = loss + part / (len(views) - 1) / 2
        losses.append(loss.item())
        optimizer.step(i, loss)
        with torch.no_grad():
            prototypes.copy_(unit(prototypes))
    return losses, flat(backbone, w), torch.stack([torch.stack(q) for q in queues])
