"""MAE written from the paper in plain steps: no code shared with selfsup but the numbers of the hidden patches.

He et al., 2022, section 3, with a ViT of our own writing (Dosovitskiy et al., 2021) and AdamW (Loshchilov & Hutter, 2019).
Tokens are put back in their places before the decoder, as the paper describes it.
"""

import math

import torch


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x, w, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def block(x, w, name, heads):
    """[T, D] of one image."""
    q, k, v = linear(layer_norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv").chunk(3, dim=-1)
    size = x.shape[1] // heads
    mixed = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
        mixed.append(weights / weights.sum(-1, keepdim=True) @ v[:, part])
    x = x + linear(torch.cat(mixed, dim=-1), w, f"{name}.attn.proj")
    y = linear(layer_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    return x + linear(gelu(y), w, f"{name}.mlp.fc2")


def position(row, column, dim):
    """Sines and cosines of the column, then of the row."""
    out = []
    for place in (column, row):
        angles = [place / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
        out += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(out, dtype=torch.float64)


def image_loss(image, w, hidden, o):
    """Mean over the hidden patches of one image [C, S, S]."""
    p, side = o["patch"], image.shape[1] // o["patch"]
    places = [(r, c) for r in range(side) for c in range(side)]
    patches = [image[:, r * p : (r + 1) * p, c * p : (c + 1) * p] for r, c in places]
    kernel = w["backbone.model.patch_embed.proj.weight"]
    cls = w["backbone.model.cls_token"][0, 0]
    tokens = [cls]  # its position is zero
    visible = [i for i in range(len(places)) if i not in hidden]
    for i in visible:
        embedded = (kernel * patches[i]).sum((1, 2, 3)) + w["backbone.model.patch_embed.proj.bias"]
        if o["fixed"]:
            tokens.append(embedded + position(*places[i], kernel.shape[0]).float().double())  # kept in float32
        else:
            tokens.append(embedded + w["backbone.model.pos_embed"][0, 1 + i])
    if not o["fixed"]:
        tokens[0] = cls + w["backbone.model.pos_embed"][0, 0]
    x = torch.stack(tokens)
    for depth in range(o["depth"]):
        x = block(x, w, f"backbone.model.blocks.{depth}", o["heads"])
    x = linear(layer_norm(x, w, "backbone.model.norm"), w, "head.embed")
    places_in_x = {i: 1 + n for n, i in enumerate(visible)}
    full = [x[0]]
    for i in range(len(places)):
        token = w["head.mask_token"] if i in hidden else x[places_in_x[i]]
        full.append(token + position(*places[i], x.shape[1]))
    x = torch.stack(full)
    for depth in range(o["decoder_depth"]):
        x = block(x, w, f"head.blocks.{depth}", o["decoder_heads"])
    x = linear(layer_norm(x, w, "head.norm"), w, "head.predict")
    total = 0.0
    for i in hidden:
        target = patches[i].permute(1, 2, 0).reshape(-1)  # [p, p, C] -> [p*p*C]
        if o["norm_pix"]:
            variance = ((target - target.mean()) ** 2).sum() / (len(target) - 1)
            target = (target - target.mean()) / torch.sqrt(variance + 1e-6)
        total = total + ((x[1 + i] - target) ** 2).mean()
    return total / len(hidden)


def run(weights, batches, hidden, o):
    """batches: a list a step of images [N, C, S, S], one a size; hidden: as many lists of sets. Returns losses and weights."""
    w = {k: v.clone().requires_grad_(k not in o["frozen"]) for k, v in weights.items()}
    first, second, losses = {}, {}, []
    for step, (sizes, sets) in enumerate(zip(batches, hidden)):
        terms = [image_loss(x, w, s, o) for images, group in zip(sizes, sets) for x, s in zip(images, group)]
        loss = sum(terms) / len(terms)
        losses.append(loss.item())
        names = [k for k, v in w.items() if v.requires_grad]
        gradients = torch.autograd.grad(loss, [w[k] for k in names])
        with torch.no_grad():
            total = math.sqrt(sum(g.pow(2).sum().item() for g in gradients))
            for name, g in zip(names, gradients):
                g = g * min(1.0, o["clip"] / (total + 1e-6))
                m, v = first.get(name, 0.0), second.get(name, 0.0)
                first[name], second[name] = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
                p = w[name]
                if p.ndim > 1 and not name.endswith(".bias"):
                    p -= o["lr"] * o["wd"] * p
                corrected = first[name] / (1 - 0.9 ** (step + 1))
                p -= o["lr"] * corrected / ((second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
    return losses, {k: v.detach() for k, v in w.items()}
