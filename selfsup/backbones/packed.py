"""A plain ViT over batches of several sizes at once, for training: the same embeddings in fewer passes and less memory.

The tokens of all images lie one after the other, [N, D], for everything that treats tokens alike: layer norm, the linear
layers, GELU; attention alone goes by size. So each weight is read, cast and differentiated once a step. Where only CLS
leaves the last block (`cls`), the last block computes no other token.

For timm's plain `VisionTransformer` without dropout inside; `fits` says whether a model is one. Equal to the model's own
forward up to the order of sums.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Format, Mlp, PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from selfsup.backbones.lean import Span, attention, gelu_linear, linear, low, norm_linear
from selfsup.backbones.positions import ResampledViT
from selfsup.backbones.stochastic import KeyedDropPath, KeyedLayer, restart


def fits(model: nn.Module) -> bool:
    """Whether `embed` computes what this model does: nothing in it is patched, hooked, dropped out or unknown."""
    if type(model) not in (VisionTransformer, ResampledViT) or model.attn_pool is not None:
        return False
    if not all(_is_plain(block) for block in model.blocks):
        return False
    modules = list(model.modules())
    hooked = any(m._forward_hooks or m._compiled_call_impl or "forward" in vars(m) for m in modules)
    drops = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in modules)
    return (
        not hooked
        and not drops
        and not any(isinstance(m, KeyedLayer) and type(m) is not KeyedDropPath for m in modules)
    )


def _is_plain(block: Any) -> bool:
    if type(block) is not Block or type(block.attn) is not Attention or type(block.mlp) is not Mlp:
        return False
    attn, mlp = block.attn, block.mlp
    identities = (attn.q_norm, attn.k_norm, attn.norm, mlp.norm)
    norms = (block.norm1, block.norm2)
    return (
        all(isinstance(m, nn.Identity) for m in identities)
        and all(
            isinstance(m, nn.LayerNorm) and m.bias is not None and not getattr(m, "_fast_norm", False) for m in norms
        )
        and all(type(m) is nn.Linear for m in (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))
        and attn.gate is None
        and isinstance(mlp.act, nn.GELU)
    )


def embed(model: VisionTransformer, images: Sequence[Tensor], cls: bool) -> list[Tensor]:
    """[B, C, H, W] of several sizes -> pooled [B, D] each. cls: spare the last block what only other tokens would need.

    Keyed drop path needs the samples of all images, in order (`stochastic.py`).
    """
    tokens: list[Tensor] = []
    spans: list[Span] = []
    for x in images:
        x = model.norm_pre(model.patch_drop(model._pos_embed(_patches(model.patch_embed, x))))  # [B, T, D]
        spans.append((x.shape[0], x.shape[1]))
        tokens.append(x.flatten(0, 1))
    x = torch.cat(tokens) if len(tokens) > 1 else tokens[0]  # [N, D]
    del tokens
    alone = cls and model.global_pool == "token" and isinstance(model.fc_norm, nn.Identity)
    for block in model.blocks[:-1] if alone else model.blocks:
        x = _block(block, x, spans)
    if alone:
        x = _last_block(model.blocks[-1], x, spans)  # [sum of B, D]
        pooled: Tensor = model.forward_head(model.norm(x)[:, None])
        return list(pooled.split([n for n, _ in spans]))
    return [model.forward_head(model.norm(part)) for part in _images(x, spans)]


def _patches(embed: PatchEmbed, x: Tensor) -> Tensor:
    """embed(x) of [B, C, H, W]: a convolution whose windows do not overlap is a linear layer over patches.

    On a CPU forward and backward take a fifth of the convolution's time in bfloat16, and less in float32 too.
    """
    if type(embed.proj) is not nn.Conv2d:
        return embed(x)
    proj, (ph, pw) = embed.proj, embed.patch_size
    as_map = embed.output_fmt == Format.NHWC  # what models of any image size ask for
    plain = proj.kernel_size == proj.stride == (ph, pw) and (as_map or embed.flatten)
    fits = not embed.dynamic_img_pad and not (embed.strict_img_size and tuple(x.shape[2:]) != tuple(embed.img_size))
    if not (plain and fits):
        return embed(x)
    x = x.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # [B, C, h, ph, w, pw]
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, h, w, C*ph*pw]
    x = F.linear(x, proj.weight.flatten(1), proj.bias)  # [B, h, w, D]
    return embed.norm(x if as_map else x.flatten(1, 2))


def _images(x: Tensor, spans: list[Span]) -> list[Tensor]:
    """[N, D] -> [n, T, D] a size."""
    return [part.unflatten(0, span) for part, span in zip(x.split([n * t for n, t in spans]), spans)]


def _block(block: Any, x: Tensor, spans: list[Span]) -> Tensor:
    restart(block)  # its layers are called, not itself
    a = attention(norm_linear(x, block.norm1, block.attn.qkv), spans, block.attn.num_heads)
    y = block.ls1(linear(a, block.attn.proj))
    x = x + _dropped(block.drop_path1, y, spans).to(x.dtype)  # first .to: CPUs add two types at a third of the speed
    y = gelu_linear(norm_linear(x, block.norm2, block.mlp.fc1), block.mlp.act, block.mlp.fc2)
    return x + _dropped(block.drop_path2, block.ls2(y), spans).to(x.dtype)


def _dropped(drop_path: nn.Module, y: Tensor, spans: list[Span]) -> Tensor:
    """Drop path, which is by image, for the tokens of many."""
    if isinstance(drop_path, nn.Identity):
        return y
    scale = drop_path(y.new_ones(sum(n for n, _ in spans)))  # [images]
    each = [part.repeat_interleave(t) for part, (_, t) in zip(scale.split([n for n, _ in spans]), spans)]
    return y * torch.cat(each)[:, None]


def _last_block(block: Any, x: Tensor, spans: list[Span]) -> Tensor:
    """[N, D] -> [images, D]: the block's output at each image's first token.

    One query a head needs no key or value of any token: q . (W_k y) = (W_k^T q) . y, and the weights sum to 1, so that
    sum_t p_t (W_v y_t + b_v) = W_v (sum_t p_t y_t) + b_v; q . b_k is the same for all tokens, which softmax ignores.
    """
    restart(block)
    attn = block.attn
    heads = (attn.num_heads, attn.head_dim)
    wq, wk, wv = (w for w in low(attn.qkv.weight).chunk(3))
    bq, _, bv = low(attn.qkv.bias).chunk(3) if attn.qkv.bias is not None else (None, None, None)
    tokens = _images(block.norm1(x).to(wq.dtype), spans)  # [n, T, D] each
    cls = torch.cat([y[:, 0] for y in tokens])  # [images, D]
    q = F.linear(cls, wq, bq).unflatten(1, heads) * attn.scale  # [images, H, d]
    asked = torch.einsum("nhd,hdc->nhc", q, wk.unflatten(0, heads))  # [images, H, D]
    seen = []
    for y, ask in zip(tokens, asked.split([n for n, _ in spans])):
        p = torch.softmax(ask @ y.transpose(1, 2), -1)  # [n, H, T]
        seen.append(p.to(y.dtype) @ y)  # [n, H, D]
    v = torch.einsum("nhc,hdc->nhd", torch.cat(seen), wv.unflatten(0, heads)).flatten(1)  # [images, D]
    x = torch.cat([y[:, 0] for y in _images(x, spans)])
    x = x + block.drop_path1(block.ls1(linear([v if bv is None else v + bv], attn.proj)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
