"""A ViT for volumes: timm's, whose patches are boxes of voxels and whose positions are learnt on a grid of three axes.

As the encoder of UNETR (Hatamizadeh et al., 2022, "UNETR: Transformers for 3D Medical Image Segmentation", section 3.1):
blocks of ViT (Dosovitskiy et al., 2021) over boxes of 16 voxels a side. `vit3d_base` has the paper's sizes. The names are
known to timm once this module is imported, which `import selfsup` of any backbone does; bare timm does not know them.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from selfsup.backbones.positions import resample_tokens

Triple = tuple[int, int, int]


def triple(size: Any) -> Triple:
    """A number for all three axes, or (depth, height, width). Raises ValueError for anything else."""
    values = tuple(size) if isinstance(size, (list, tuple)) else (size,) * 3
    if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"{size!r}: give a number, or [depth, height, width]")
    return values[0], values[1], values[2]


class PatchEmbed3d(nn.Module):
    """Volumes [B, C, D, H, W], or as the loader moves them, slice after slice, [B, D*C, H, W] -> [B, d, h, w, E].

    A linear layer over the voxels of each box (channel, slice, row, column): a Conv3d whose kernel is its stride.
    """

    def __init__(
        self,
        img_size: Any,
        patch_size: Any,
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **images: Any,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.in_chans = triple(img_size), triple(patch_size), in_chans
        if any(s % p for s, p in zip(self.img_size, self.patch_size)):
            raise ValueError(f"img_size {list(self.img_size)} is no multiple of patch_size {list(self.patch_size)}")
        d, h, w = (s // p for s, p in zip(self.img_size, self.patch_size))
        self.grid_size, self.num_patches = (d, h, w), d * h * w
        d, h, w = self.patch_size
        self.proj = nn.Linear(in_chans * d * h * w, embed_dim, bias=bias, device=device, dtype=dtype)

    def feat_ratio(self) -> int:
        """Voxels along the longest side of a patch."""
        return max(self.patch_size)

    def volumes(self, x: Tensor) -> Tensor:
        """[B, D*C, H, W] -> [B, C, D, H, W]; what is that already stays."""
        return x if x.ndim == 5 else x.unflatten(1, (-1, self.in_chans)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        pd, ph, pw = self.patch_size
        x = self.volumes(x).unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pd))
        x = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, C, d, pd, h, ph, w, pw] -> [B, d, h, w, C*pd*ph*pw]
        return self.proj(x)


class ViT3d(VisionTransformer):
    """timm's VisionTransformer on volumes of any size that is a multiple of the patch: positions are resampled trilinearly."""

    def __init__(
        self, volume_size: Any = 96, patch_size: Any = 16, dynamic_img_size: bool = True, **options: Any
    ) -> None:
        for key in ("embed_layer", "embed_norm_layer", "dynamic_img_pad"):
            if options.get(key):
                raise ValueError(f"{key}: not for volumes")
        super().__init__(
            img_size=volume_size, patch_size=patch_size, dynamic_img_size=True, embed_layer=PatchEmbed3d, **options
        )

    def _pos_embed(self, x: Tensor) -> Tensor:
        """[B, d, h, w, E] patches -> [B, prefix + d*h*w, E] tokens with positions."""
        grid, x = (x.shape[1], x.shape[2], x.shape[3]), x.flatten(1, 3)  # [B, d*h*w, E]
        first = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.pos_embed is None:
            return self.pos_drop(torch.cat([*first, x], dim=1))
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        pos = resample_tokens(self.pos_embed, self.patch_embed.grid_size, grid, "timm", prefix)
        x = torch.cat([*first, x + pos], dim=1) if self.no_embed_class else torch.cat([*first, x], dim=1) + pos
        return self.pos_drop(x)

    def forward_intermediates(  # type: ignore[override]
        self, x: Tensor, indices: list[int], return_prefix_tokens: bool = False, norm: bool = False, **unused: Any
    ) -> list[Any]:
        """After the blocks `indices`: maps [B, E, d, h, w], or with return_prefix_tokens pairs of these and [B, prefix, E]."""
        x = self.patch_embed(x)
        grid, out = x.shape[1:4], []
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        for i, block in enumerate(self.blocks[: max(indices) + 1]):
            x = block(x)
            if i in indices:
                tokens = self.norm(x) if norm else x
                prefix, patches = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
                maps = patches.transpose(1, 2).unflatten(2, grid)  # [B, E, d, h, w]
                out.append((maps, prefix) if return_prefix_tokens else maps)
        return out


def grid_of(options: dict[str, Any]) -> Triple | None:
    """(d, h, w) of the patches of a model with these options; None if they are not those of a volume's."""
    try:
        size, patch = triple(options.get("img_size", 96)), triple(options.get("patch_size", 16))
    except ValueError:
        return None
    return size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]


def checkpoint_filter_fn(state: dict[str, Tensor], model: ViT3d) -> dict[str, Tensor]:
    """Patch embeddings that are stored as the kernel of a Conv3d, [E, C, pd, ph, pw], as this model has them."""
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 5 and tuple(kernel.shape[2:]) == model.patch_embed.patch_size:
        state["patch_embed.proj.weight"] = kernel.flatten(1)
    return state


# ------------------------------------------------------------------------------------------------------------- names

_CFG = {
    "input_size": (1, 96, 96),  # of a slice
    "fixed_input_size": True,
    "num_classes": 0,
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.5,),
    "std": (0.25,),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}
_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
default_cfgs = generate_default_cfgs({f"vit3d_{size}": _CFG for size in _SIZES})


def _create(size: str, pretrained: bool, options: dict[str, Any]) -> ViT3d:
    width, heads = _SIZES[size]
    values = {"embed_dim": width, "num_heads": heads, "in_chans": 1, **options}
    values["volume_size"] = values.pop("img_size", 96)  # timm takes an img_size of three axes for a mistake
    kept: dict[str, Any] = {"pretrained_filter_fn": checkpoint_filter_fn, "kwargs_filter": ("img_size",)}
    return build_model_with_cfg(ViT3d, f"vit3d_{size}", pretrained, **kept, **values)


@register_model
def vit3d_tiny(pretrained: bool = False, **options: Any) -> ViT3d:
    """Of the width of ViT-Ti."""
    return _create("tiny", pretrained, options)


@register_model
def vit3d_small(pretrained: bool = False, **options: Any) -> ViT3d:
    """Of the width of ViT-S."""
    return _create("small", pretrained, options)


@register_model
def vit3d_base(pretrained: bool = False, **options: Any) -> ViT3d:
    """Of the width of ViT-B: UNETR's."""
    return _create("base", pretrained, options)
