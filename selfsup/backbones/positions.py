"""Position embeddings at other image sizes: three ways to resample them, bicubic all.

`size`: by output size, no antialiasing. `timm`: by output size, antialiased. `dino`: by the scale factor
(h + 0.1) / H, no antialiasing: what DINO's and DINOv2's published models were trained with
(facebookresearch/dino, vision_transformer.py, interpolate_pos_encoding; its issue 8 explains the 0.1).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfsup.errors import UserError

PosInterp = Literal["size", "timm", "dino"]


def _interpolate(x: Tensor, old: tuple[int, int], new: tuple[int, int], mode: PosInterp) -> Tensor:
    """[1, C, H, W] -> [1, C, h, w]."""
    if mode == "dino":
        scale = tuple((n + 0.1) / o for n, o in zip(new, old, strict=True))
        return F.interpolate(x, scale_factor=scale, mode="bicubic")
    return F.interpolate(x, size=new, mode="bicubic", antialias=mode == "timm")


def resize_matrix(old: int, new: int, mode: PosInterp, device: torch.device | None = None) -> Tensor:
    """The linear map of one axis, [new, old], float64: resampling is separable."""
    # Channel c is one at row c. Two equal columns: torch 2.15 antialiases contiguous images of one column wrongly on CPUs.
    eye = torch.eye(old, dtype=torch.float64, device=device).reshape(1, old, old, 1).repeat(1, 1, 1, 2)
    return _interpolate(eye, (old, 2), (new, 2), mode)[0, :, :, 0].T  # [new, old]


def resample_grid(grid: Tensor, size: tuple[int, int], mode: PosInterp, by_matrix: bool = False) -> Tensor:
    """[1, H, W, D] -> [1, h, w, D] in float32 (float64 stays), returned in the dtype of `grid`.

    by_matrix: two matrix products in place of `F.interpolate`, equal up to rounding; their backward is deterministic
    on CUDA, where that of bicubic interpolation is not.
    """
    old = (grid.shape[1], grid.shape[2])
    if old == size:
        return grid
    work = grid if grid.dtype == torch.float64 else grid.float()
    if by_matrix:
        with torch.no_grad():
            rows, columns = (resize_matrix(o, n, mode, grid.device).to(work.dtype) for o, n in zip(old, size))
        with torch.autocast(grid.device.type, enabled=False):
            out = torch.einsum("ih,nhwd->niwd", rows, work)  # [1, h, W, D]
            out = torch.einsum("jw,niwd->nijd", columns, out)  # [1, h, w, D]
    else:
        out = _interpolate(work.permute(0, 3, 1, 2), old, size, mode).permute(0, 2, 3, 1)
    return out.to(grid.dtype)


def resample_tokens(
    pos: Tensor, old: tuple[int, ...], new: tuple[int, ...], mode: PosInterp, prefix: int, by_matrix: bool = False
) -> Tensor:
    """[1, prefix + H*W, D] -> [1, prefix + h*w, D]; the first `prefix` entries (CLS, ...) are kept as they are.

    Of volumes, where old and new are of three axes, trilinear whatever the mode.
    """
    if old == new:
        return pos
    grid = pos[:, prefix:].reshape(1, *old, pos.shape[-1])  # [1, H, W, D]
    if len(new) == 3:
        grid = resample_volume(grid, new)
    else:
        grid = resample_grid(grid, (new[0], new[1]), mode, by_matrix)
    grid = grid.reshape(1, -1, pos.shape[-1])  # [1, h*w, D]
    return torch.cat([pos[:, :prefix], grid], dim=1)


def resample_volume(grid: Tensor, size: tuple[int, ...]) -> Tensor:
    """[1, A, B, C, D] -> [1, a, b, c, D], trilinear by size, as three products: their backward is deterministic."""
    with torch.autocast(grid.device.type, enabled=False):
        for axis, new in enumerate(size, 1):
            old = grid.shape[axis]
            if old != new:
                with torch.no_grad():
                    eye = torch.eye(old, dtype=torch.float64, device=grid.device)[None]
                    matrix = F.interpolate(eye, size=new, mode="linear", align_corners=False)[0].T.to(grid.dtype)
                grid = torch.tensordot(matrix, grid, ([1], [axis])).movedim(0, axis)
    return grid


def sincos_positions(dim: int, grid: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """Fixed positions of a grid (h, w), float64 [h*w, dim]: sines and cosines of the column, then of the row.

    Vaswani et al., 2017, section 3.5, for two axes as in MoCo v3 and MAE; dim is a multiple of 4. Of a volume's grid (d, h, w):
    of the column, the row and the slice, a third each; what dim is more than a multiple of 6 stays zero.
    """
    if len(grid) == 3:
        return _sincos_volume(dim, grid, device)
    if dim % 4:
        raise UserError(f"fixed positions need a width that is a multiple of 4, not {dim}")
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))  # [dim/4]
    axes = [torch.arange(n, dtype=torch.float64, device=device)[:, None] * rate for n in grid]  # [h, dim/4], [w, dim/4]
    rows, columns = (torch.cat([a.sin(), a.cos()], dim=1) for a in axes)  # [h, dim/2], [w, dim/2]
    h, w = grid
    both = torch.cat([columns[None].expand(h, -1, -1), rows[:, None].expand(-1, w, -1)], dim=2)  # [h, w, dim]
    return both.flatten(0, 1)


def _sincos_volume(dim: int, grid: tuple[int, ...], device: torch.device | None) -> Tensor:
    """[d*h*w, dim]."""
    count = dim // 6
    rate = 10000.0 ** -(torch.arange(count, dtype=torch.float64, device=device) / max(count, 1))  # [dim/6]
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device=device) for n in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * rate for place in reversed(places)]  # [d*h*w, dim/6] each
    parts = [part for a in angles for part in (a.sin(), a.cos())]
    return F.pad(torch.cat(parts, dim=1), (0, dim - 6 * count))


@torch.no_grad()
def fix_positions(model: Any) -> None:
    """Give a ViT the fixed positions instead of learnt ones: those of CLS and registers are zero, as in MAE's code."""
    if model.pos_embed is None:
        return
    patches = sincos_positions(model.embed_dim, tuple(model.patch_embed.grid_size))
    model.pos_embed.zero_()
    model.pos_embed[0, -len(patches) :] = patches.to(model.pos_embed.dtype)
    model.pos_embed.requires_grad_(False)


class _Resampled(nn.Module):
    """Mixed into timm's ViT by `set_pos_interp`: the same `_pos_embed` with the resampling of `pos_interp`."""

    pos_interp: PosInterp = "timm"

    def _pos_embed(self: Any, x: Tensor) -> Tensor:
        """[B, h, w, D] patches -> [B, prefix + h*w, D] tokens with positions."""
        if self.pos_embed is None or not self.dynamic_img_size:
            return super()._pos_embed(x)  # type: ignore[misc]
        size = (x.shape[1], x.shape[2])
        old = tuple(self.patch_embed.grid_size)
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        differentiable = self.training and torch.is_grad_enabled()
        pos = resample_tokens(self.pos_embed, old, size, self.pos_interp, prefix, by_matrix=differentiable)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, h*w, D]
        tokens = [getattr(self, key, None) for key in ("cls_token", "reg_token", "dist_token")]
        first = [token.expand(x.shape[0], -1, -1) for token in tokens if token is not None]
        # Nothing to prepend: no torch.cat, which would change the memory layout and with it the last bits.
        if self.no_embed_class:
            x = x + pos
            x = torch.cat([*first, x], dim=1) if first else x
        else:
            x = torch.cat([*first, x], dim=1) if first else x
            x = x + pos
        return self.pos_drop(x)


class ResampledViT(_Resampled, VisionTransformer):
    """timm's VisionTransformer with a choice of position resampling."""


class ResampledDistilledViT(_Resampled, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled with a choice of position resampling."""


_PLAIN: dict[type[nn.Module], type[_Resampled]] = {
    VisionTransformer: ResampledViT,
    VisionTransformerDistilled: ResampledDistilledViT,
}


def can_choose(model: nn.Module) -> bool:
    """Whether `set_pos_interp` works on this model: plain ViTs, distilled ones among them."""
    return type(model) in _PLAIN or isinstance(model, _Resampled)


def set_pos_interp(model: nn.Module, mode: PosInterp) -> bool:
    """Give this one model the resampling `mode`; False where its class brings a resampling of its own.

    The class of the instance is changed to a subclass, so that copies and `isinstance` keep working.
    """
    if type(model) in _PLAIN:
        model.__class__ = _PLAIN[type(model)]
    if not isinstance(model, _Resampled):
        return False
    model.pos_interp = mode
    return True
