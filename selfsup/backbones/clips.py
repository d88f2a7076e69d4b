"""Backbones that see clips: the same interface as for images, with one axis more in the maps."""

from typing import Any

from torch import Tensor

from selfsup.backbones.backbone import Backbone, Size, _pair
from selfsup.backbones.features import Features
from selfsup.errors import UserError


class ClipBackbone(Backbone):
    """A `Backbone` of clips [B, C, T, H, W], or as the loader moves them, frame after frame, [B, T*C, H, W].

    `in_chans`: C, of a frame. `frames`: the T it was built for; it takes any. `Features.patches` and `feature_maps` are
    [B, D, T, h, w], `pooled` and `cls` are of the whole clip.
    """

    sees = "clips"

    def input_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """[T*C, h, w], with the T it was built for."""
        return (self.frames * self.in_chans, *_pair(size or self.image_size))

    @property
    def frames(self) -> int:
        """Of the clips it was built for."""
        return int(self.model.frames)  # type: ignore[arg-type]

    def tokens(self, images: Tensor, n_last: int) -> list[tuple[Tensor | None, Tensor]]:
        """As `Backbone.tokens`: the mean is over all places of all frames."""
        found = self._intermediates(images, n_last, norm=True, prefix=True)[1]
        return [(prefix[:, 0], maps.mean(dim=(2, 3, 4))) for _, (maps, prefix) in found]

    def _check(self, images: Tensor) -> None:
        c = self.in_chans
        if not ((images.ndim == 5 and images.shape[1] == c) or (images.ndim == 4 and images.shape[1] % c == 0)):
            raise UserError(
                f"clips of shape {tuple(images.shape)}: {self.name} takes [B, {c}, T, H, W], or frame after frame "
                f"[B, T*{c}, H, W]"
            )
        message = self._misfit(images.shape[-2], images.shape[-1])
        if message is not None:
            raise UserError(message)

    def _is_dynamic(self) -> bool:
        return True

    def _split(self, out: Any, pooled: Tensor, images: Tensor) -> Features:
        grid = images.shape[-2] // self.stride, images.shape[-1] // self.stride
        patches = out[:, 1:].transpose(1, 2).unflatten(2, (-1, *grid))  # [B, D, T, h, w]
        return Features(pooled, out[:, 0], out[:, 1:1], patches)


def check_frames(backbones: dict[str, Backbone], frames: int | None) -> None:
    """Raise UserError unless the backbones take what `data.frames` makes: clips, or images."""
    for backbone in backbones.values():
        takes_clips = backbone.sees == "clips"
        if frames is not None and not takes_clips:
            raise UserError(
                f"data.frames={frames}: {backbone.name} takes images; use backbone=timesformer, or leave data.frames out"
            )
        if frames is None and takes_clips:
            raise UserError(
                f"backbone.name={backbone.name}: it takes clips; give data.frames={backbone.model.frames}, and data with videos"
            )
