"""DINO's loss from embeddings and prototypes in one function, which never holds more than one matrix of logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfsup.losses.dino import count_pairs
from selfsup.losses.numerics import at_least_float32


def prototype_loss(
    x: Tensor, direction: Tensor, scale: Tensor, teacher: Tensor, temperature: float, same_view: bool = False
) -> Tensor:
    """dino_loss(x @ w.T, teacher, temperature, same_view) with w = scale * direction / |direction|, row by row.

    x: [V, B, D]; direction: [K, D], scale: [K, 1] (weight normalisation's v and g); teacher: probabilities [T, B, K].

    The logits are (x . v) * (g / |v|): columns are scaled, so that w, the largest tensor of a step, is never made. Each
    view's logits are turned into their gradient as soon as its loss is known, in the memory where they were. Products are
    computed in autocast's dtype, everything else in float32 at least.
    """
    kind = x.device.type
    dtype = (
        torch.get_autocast_dtype(kind)
        if torch.is_autocast_enabled(kind)
        else torch.promote_types(x.dtype, direction.dtype)
    )
    return _PrototypeLoss.apply(x, direction, scale, teacher, temperature, same_view, dtype)


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        v: Tensor,
        g: Tensor,
        teacher: Tensor,
        temperature: float,
        same_view: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        views, batch, _ = x.shape
        targets, terms = teacher.shape[0], count_pairs(views, teacher.shape[0], same_view) * batch
        length = torch.linalg.vector_norm(v, dim=1)  # [K]
        factor = g[:, 0] / length / temperature  # [K]
        rows = x.flatten(0, 1).to(dtype)  # [V*B, D]
        s = rows.new_empty(rows.shape[0], v.shape[0])  # [V*B, K]: x . v, then the gradient with respect to it
        for part in _chunks(v):
            s[:, part] = rows @ v[part].to(dtype).t()
        total = teacher.sum(0)  # [B, K]
        loss, along = total.new_zeros(()), torch.zeros_like(factor)
        for view, products in enumerate(s.split(batch)):
            z = at_least_float32(products) * factor  # [B, K]
            p = torch.softmax(z, -1)
            lse = z.amax(-1) - p.amax(-1).log()  # [B]: where z is largest, p is 1 / sum exp(z - max)
            itself = view < targets and not same_view
            own, n = (total - teacher[view], targets - 1) if itself else (total, targets)
            loss += n * lse.sum() - (own * z).sum()
            gz = p.mul_(n).sub_(own)  # [B, K], times `terms`
            along += z.mul_(gz).sum(0)  # [K]: the gradient with respect to log |w|
            products.copy_(gz.mul_(factor))
        ctx.save_for_backward(x, v, g, s, length, along)
        ctx.terms = terms
        return loss / terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x, v, g, s, length, along = ctx.saved_tensors
        unit = upstream / ctx.terms
        scaled = (x * unit).flatten(0, 1).to(s.dtype)  # [V*B, D]
        gx, gg = torch.zeros_like(x).flatten(0, 1), None
        gv = torch.empty_like(v) if ctx.needs_input_grad[1] else None
        for part in _chunks(v):
            gx += s[:, part] @ v[part].to(s.dtype)
            if gv is not None:
                gv[part] = s[:, part].t() @ scaled
                gv[part].addcmul_(
                    v[part], (along[part] * -unit / length[part].square())[:, None]
                )  # none along v itself
        if ctx.needs_input_grad[2]:
            gg = (along * unit)[:, None] / g
        return (gx * unit).view_as(x), gv, gg, None, None, None, None


def _chunks(v: Tensor, size: int = 8192) -> list[slice]:
    """Rows of [K, D] of which copies in a lower precision are made at a time."""
    return [slice(start, start + size) for start in range(0, v.shape[0], size)]
