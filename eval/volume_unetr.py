"""UNETR (Hatamizadeh et al., 2022, "UNETR: Transformers for 3D Medical Image Segmentation") on a backbone of volumes.

Section 3.1: maps of the ViT after every L/4 blocks (3, 6, 9, 12 of 12); the deepest is doubled again and again by
deconvolutions, at each size joined with an earlier map that a tower of deconvolutions has brought to that size, at last with
the image. The blocks are MONAI's (`monai.networks.blocks`). The paper has patches of 16 voxels and four maps; here a patch of
2^n voxels has n, after every L/n blocks.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.errors import UserError


def check_unetr(backbone: Backbone) -> int:
    """n of patches of 2^n voxels a side. Raises UserError for a backbone that has none, or fewer blocks than n."""
    if len(backbone.patch_shape) != 3:
        raise UserError(
            f"eval segment3d: {backbone.name} sees images; give a run or a backbone of volumes (backbone=vit3d_small)"
        )
    side, depth = backbone.patch_shape[0], len(backbone.model.feature_info)  # type: ignore[arg-type]
    n = side.bit_length() - 1
    if len(set(backbone.patch_shape)) > 1 or side != 1 << n or n < 1:
        raise UserError(
            f"backbone.patch_size={list(backbone.patch_shape)}: UNETR doubles maps up to the voxels; it needs patches of 2, 4, 8 "
            "or 16 voxels along every axis"
        )
    if depth < n:
        raise UserError(f"UNETR joins {n} maps for patches of {side}, and {backbone.name} has {depth} blocks")
    return n


def monai_blocks() -> Any:
    """`monai.networks.blocks`. Raises UserError where it is not installed."""
    try:
        from monai.networks import blocks
    except ImportError:
        raise UserError("eval segment3d needs MONAI: pip install 'selfsup[volumes]'") from None
    return blocks


class UNETR(nn.Module):
    """Normalised volumes [B, C, D, H, W] -> logits [B, K, D, H, W]."""

    def __init__(self, backbone: Backbone, classes: int, width: int, frozen: bool) -> None:
        super().__init__()
        n, blocks = check_unetr(backbone), monai_blocks()
        self.backbone, self.frozen = backbone.requires_grad_(not frozen), frozen
        depth, dim = len(backbone.model.feature_info), backbone.embed_dim  # type: ignore[arg-type]
        self.layers = [depth * j // n - 1 for j in range(1, n + 1)]
        own: dict[str, Any] = {"kernel_size": 3, "norm_name": "instance", "res_block": True}
        double: dict[str, Any] = {"upsample_kernel_size": 2, **own}
        self.image = blocks.UnetrBasicBlock(3, backbone.in_chans, width, stride=1, **own)
        self.towers = nn.ModuleList(  # the map after layer j of n, at 1 / 2^j of the size
            blocks.UnetrPrUpBlock(3, dim, width << j, num_layer=n - j - 1, stride=1, conv_block=True, **double)
            for j in range(1, n)
        )
        inward = [dim, *(width << j for j in range(n - 1, 0, -1))]
        outward = [*inward[1:], width]
        self.ups = nn.ModuleList(blocks.UnetrUpBlock(3, a, b, **double) for a, b in zip(inward, outward))
        self.out = blocks.UnetOutBlock(3, width, classes)

    def train(self, mode: bool = True) -> "UNETR":
        """A frozen trunk stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            *earlier, deep = self.backbone.feature_maps(x, self.layers)
        skips = [self.image(x), *(tower(m) for tower, m in zip(self.towers, earlier))]
        for up, skip in zip(self.ups, reversed(skips)):
            deep = up(deep, skip)
        return self.out(deep)
