"""Parts of a transformer block that keep less for the backward pass, or copy less, than the plain modules do.

Each gives what the plain expression in its first line gives; what is cheap next to a matrix product (layer norm, GELU)
is computed again in the backward pass instead of being kept. Weights come in the dtype the products are to have
(see `low`); layer norm and softmax are computed in float32 at least.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Span = tuple[int, int]
"""(images, tokens an image) of a part of a sequence in which the tokens of many images follow one another."""


P = TypeVar("P", bound=Tensor | None)


def low(p: P) -> P:
    """A parameter in the dtype in which autocast multiplies."""
    if p is None or not torch.is_autocast_enabled(p.device.type):
        return p
    return p.to(torch.get_autocast_dtype(p.device.type))  # type: ignore[return-value]


def linear(parts: list[Tensor], layer: nn.Linear) -> Tensor:
    """layer(torch.cat(parts)), of which the parts are kept, not the whole."""
    w, b = low(layer.weight), low(layer.bias)
    out = [F.linear(x, w, b) for x in parts]
    return torch.cat(out) if len(out) > 1 else out[0]


def norm_linear(x: Tensor, norm: nn.LayerNorm, layer: nn.Linear) -> Tensor:
    """layer(norm(x)) of [N, D]; x alone is kept."""
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, low(layer.weight), low(layer.bias))


def gelu_linear(x: Tensor, act: nn.GELU, layer: nn.Linear) -> Tensor:
    """layer(act(x)) of [N, D]; x alone is kept."""
    return _GeluLinear.apply(x, act.approximate, low(layer.weight), low(layer.bias))


def attention(qkv: Tensor, spans: list[Span], heads: int) -> list[Tensor]:
    """Self-attention within each image: [N, 3 * D], as a qkv layer gives it, -> [N, D] in one or more parts, uncopied.

    By measurement (single core, ViT-S, forward and backward): scaled_dot_product_attention in bfloat16 on a CPU takes 2.7
    times as long as the plain products at 197 tokens, 6.7 times at 37; in float32 it is the faster one at 197 and equal at 37.
    """
    if qkv.device.type == "cpu" and qkv.dtype in (torch.bfloat16, torch.float16):
        return [_PlainAttention.apply(qkv, spans, heads)]
    out = []
    for part, (n, t) in zip(qkv.split([n * t for n, t in spans]), spans):
        q, k, v = part.view(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # each [n, H, t, d]
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * t, -1))
    return out


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, nw: Tensor, nb: Tensor, eps: float, w: Tensor, b: Tensor | None) -> Tensor:
        y = F.layer_norm(x, nw.shape, nw, nb, eps)
        ctx.save_for_backward(x, nw, nb, w)
        ctx.eps, ctx.bias = eps, b is not None
        return F.linear(y.to(w.dtype), w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, nw, nb, w = ctx.saved_tensors
        y, mean, rstd = torch.native_layer_norm(x, nw.shape, nw, nb, ctx.eps)
        gw, gb = g.t() @ y.to(w.dtype), g.sum(0) if ctx.bias else None
        gy = (g @ w).to(y.dtype)
        backward = torch.ops.aten.native_layer_norm_backward
        gx, gnw, gnb = backward(gy, x, nw.shape, mean, rstd, nw, nb, [True, True, True])
        return gx, gnw, gnb, None, gw, gb


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.approximate, ctx.bias = approximate, b is not None
        return F.linear(F.gelu(x, approximate=approximate), w, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        gw, gb = g.t() @ F.gelu(x, approximate=ctx.approximate), g.sum(0) if ctx.bias else None
        gx = g @ w
        torch.ops.aten.gelu_backward(gx, x, approximate=ctx.approximate, grad_input=gx)  # in place
        return gx, None, gw, gb


class _PlainAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v with one copy of q, k, v to where the products want them, and one back."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, spans: list[Span], heads: int) -> Tensor:
        out = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
        saved: list[Tensor] = []
        for (n, t), part, place in zip(spans, _parts(qkv, spans), _parts(out, spans)):
            packed = part.view(n, t, 3, heads, -1).permute(2, 0, 3, 1, 4).contiguous().view(3, n * heads, t, -1)
            q, k, v = packed.unbind(0)  # each [n * H, t, d]
            q *= q.shape[-1] ** -0.5
            p = torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1)  # [n * H, t, t]; in float32 inside
            o = torch.bmm(p, v).view(n, heads, t, -1).transpose(1, 2)  # [n, t, H, d]
            place.view(n, t, heads, -1).copy_(o)
            saved += [packed, p]
        ctx.save_for_backward(*saved)
        ctx.spans, ctx.heads = spans, heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        spans, heads, saved = ctx.spans, ctx.heads, ctx.saved_tensors
        out = g.new_empty(g.shape[0], 3 * g.shape[1])
        for i, ((n, t), part, place) in enumerate(zip(spans, _parts(g, spans), _parts(out, spans))):
            packed, p = saved[2 * i : 2 * i + 2]
            q, k, v = packed.unbind(0)
            go = part.view(n, t, heads, -1).transpose(1, 2).reshape(n * heads, t, -1)
            grads = torch.empty_like(packed)
            torch.bmm(p.transpose(1, 2), go, out=grads[2])
            gp = torch.bmm(go, v.transpose(1, 2))
            gs = torch.ops.aten._softmax_backward_data(gp, p, -1, p.dtype)
            torch.bmm(gs, k, out=grads[0])
            grads[0] *= q.shape[-1] ** -0.5
            torch.bmm(gs.transpose(1, 2), q, out=grads[1])
            place.view(n, t, 3, heads, -1).copy_(grads.view(3, n, heads, t, -1).permute(1, 3, 0, 2, 4))
        return out, None, None


def _parts(x: Tensor, spans: list[Span]) -> tuple[Tensor, ...]:
    return x.split([n * t for n, t in spans])
