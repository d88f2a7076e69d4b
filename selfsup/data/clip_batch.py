"""Micro-batches of clips: as `BatchMaker`, with the frames of each view after one another in the channels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup.data.batch import BatchMaker, pixel_size
from selfsup.data.clip_frames import drawn, span
from selfsup.data.views import Prepared, View, crops_of, draw, prepare


@dataclass
class Clip:
    """What a batch needs of one video."""

    pictures: dict[int, Prepared]
    """Frames by number."""
    chosen: dict[int, list[int]]
    """Numbers of the frames of each view, by the view's own number."""


class ClipBatchMaker(BatchMaker):
    """(step, micro) -> Batch whose crops are uint8 [V, B, T*C, S, S], frame after frame; T is the view's own.

    Which frames a view gets is drawn for (seed, epoch, image asked for, view), and what happens to them once for all of
    them: they are cut from the same place, and `photometric.apply(..., frames=T)` gives all the same colours.
    """

    part = "frame"

    def _buffer(self, views: Sequence[View], count: int) -> np.ndarray:
        frames, _ = span(views[0].crops, self.source.config)
        size = views[0].size
        return np.empty((len(views), count, frames * self.source.frame_channels, size, size), np.uint8)

    def _tensor(self, crops: np.ndarray) -> Tensor:
        return torch.from_numpy(crops)

    def _area(self, image: Any) -> int:
        return sum(int(np.prod(pixel_size(picture))) for picture in image.pictures.values())

    def _decoded(self, i: int, asked: int, epoch: int) -> Any:
        video = self.source.video(i)  # type: ignore[attr-defined]
        views = [view for group in self.groups for view in group]
        chosen = {v.number: drawn(v, self.source.config, self.seed, epoch, asked, video.count) for v in views}
        wanted = sorted({number for clip in chosen.values() for number in clip})
        return Clip(dict(zip(wanted, map(prepare, video.frames(wanted)), strict=True)), chosen)

    def _crop(
        self,
        images: list[Any],
        epochs: np.ndarray,
        ids: np.ndarray,
        crops: list[np.ndarray],
        params: list[np.ndarray],
        bad: list[tuple[str, str]],
    ) -> None:
        """Fill crops [V, b, T*C, S, S] and params [V, b, P] of each resolution."""
        sizes = np.array([pixel_size(next(iter(clip.pictures.values()))) for clip in images])
        for views, out, rows in zip(self.groups, crops, params, strict=True):
            for v, view in enumerate(views):
                rows[v] = draw(view, self.seed, epochs, ids, sizes)
                for b, clip in enumerate(images):
                    pictures = [clip.pictures[number] for number in clip.chosen[view.number]]
                    same = np.repeat(rows[v][b : b + 1], len(pictures), axis=0)  # [T, P]
                    made = crops_of(pictures, same, view.size, view.crops.interpolation)  # [T, S, S, C]
                    if policy := self.policies.get(view.number):
                        policy(made, self.seed, np.full(len(made), epochs[b]), np.full(len(made), ids[b]))
                    out[v, b] = made.transpose(0, 3, 1, 2).reshape(out[v, b].shape)
