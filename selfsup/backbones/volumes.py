"""Backbones that see volumes: the same interface as for images, with one axis more in the maps."""

import math
from typing import Any

from torch import Tensor

from selfsup.backbones.backbone import Backbone
from selfsup.backbones.features import Features
from selfsup.backbones.vit3d import Triple, triple
from selfsup.errors import UserError


class VolumeBackbone(Backbone):
    """A `Backbone` of volumes [B, C, D, H, W], or as the loader moves them, slice after slice, [B, D*C, H, W].

    `Features.patches` and `feature_maps` are [B, D', d, h, w]; `pooled` and `cls` are of the whole volume. `in_chans`: C.
    `volume_size`: voxels (depth, height, width) it was built for; `image_size` is that of a slice.
    """

    sees = "volumes"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.volume_size: Triple = self.model.patch_embed.img_size  # type: ignore[union-attr,assignment]
        self.image_size = self.volume_size[1:]

    def input_shape(self, size: Any = None) -> tuple[int, ...]:
        """[C, D, h, w] of the size it was built for, whatever `size` is."""
        return (self.in_chans, *self.volume_size)

    @property
    def patch_shape(self) -> Triple:
        """Voxels of a patch: (depth, height, width)."""
        return self.model.patch_embed.patch_size  # type: ignore[union-attr,return-value]

    @property
    def has_attention(self) -> bool:
        return False  # maps of attention are drawn over images

    @property
    def fixed_size(self) -> bool:
        return False

    def voxels(self, images: Tensor) -> Tensor:
        return self.model.patch_embed.volumes(images)  # type: ignore[union-attr,operator]

    def token_grid(self, size: Any) -> Triple:  # type: ignore[override]
        """Patches of a volume of `size` voxels a side, or (depth, height, width)."""
        d, h, w = (s // p for s, p in zip(triple(size), self.patch_shape))
        return d, h, w

    def grid_of(self, images: Tensor) -> Triple:
        return self.token_grid(tuple(self.voxels(images).shape[2:]))

    def check_size(self, size: Any) -> None:
        """Raise UserError if volumes of `size` (voxels a side, or (depth, height, width)) cannot be taken."""
        try:
            sides = triple(size)
        except ValueError as error:
            raise UserError(f"size {error}: {self.name} takes volumes") from None
        if any(s % p for s, p in zip(sides, self.patch_shape)):
            works = [max(1, math.ceil(s / p)) * p for s, p in zip(sides, self.patch_shape)]
            raise UserError(
                f"size {_show(sides)} is not a multiple of the patch ({_show(self.patch_shape)}) of {self.name}; "
                f"use {_show(works)}"
            )

    def tokens(self, images: Tensor, n_last: int) -> list[tuple[Tensor | None, Tensor]]:
        """As `Backbone.tokens`: the mean is over all places of the volume."""
        found = self._intermediates(images, n_last, norm=True, prefix=True)[1]
        cls = self._has_cls()
        return [(prefix[:, 0] if cls else None, maps.mean(dim=(2, 3, 4))) for _, (maps, prefix) in found]

    def _check(self, images: Tensor) -> None:
        c = self.in_chans
        if not ((images.ndim == 5 and images.shape[1] == c) or (images.ndim == 4 and images.shape[1] % c == 0)):
            raise UserError(
                f"images of shape {tuple(images.shape)}: {self.name} takes volumes [B, {c}, D, H, W], or slice after slice "
                f"[B, D*{c}, H, W]"
            )
        self.check_size(tuple(self.voxels(images).shape[2:]))

    def _is_dynamic(self) -> bool:
        return True

    def _split(self, out: Any, pooled: Tensor, images: Tensor) -> Features:
        prefix, registers = self.model.num_prefix_tokens, self.model.num_reg_tokens
        patches = out[:, prefix:].transpose(1, 2).unflatten(2, self.grid_of(images))  # [B, D', d, h, w]
        cls = out[:, 0] if self._has_cls() else None
        return Features(pooled, cls, out[:, prefix - registers : prefix], patches)  # type: ignore[operator]


def _show(sides: Any) -> str:
    return f"{sides[0]}" if len(set(sides)) == 1 else "x".join(map(str, sides))
