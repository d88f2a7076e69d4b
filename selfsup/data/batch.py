"""One micro-batch: from sample numbers to uint8 crops, in whichever process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfsup.data import style
from selfsup.data.base import Source
from selfsup.data.decode import BadImage
from selfsup.data.policies import Policy
from selfsup.data.sampler import Order, step_positions
from selfsup.data.views import STYLE, P, Prepared, View, crops_of, draw, prepare, resolutions
from selfsup.errors import UserError
from selfsup.wording import one_line

_PROBES = 1000
_PIXELS_AT_ONCE = 16_000_000
"""Decoded images are cropped and dropped as soon as they hold so many pixels."""

_KEEP, _OVERHEAD = 64_000_000, 1500
"""Bytes of decoded images that a process keeps, if by that measure all images fit; and what an image costs beside its pixels."""


@dataclass
class Batch:
    """What one rank computes in one micro-batch. B samples; V views of one resolution, C channels, S pixels."""

    crops: list[Tensor]
    """uint8 [V,B,C,S,S] for each resolution, views in order; uint16 with data.depth=16."""
    params: list[Tensor]
    """float32 [V,B,P] for each resolution: `ViewParams` rows."""
    ids: Tensor
    """int64 [B], numbers of the images in their source (of a bad image: the one that was asked for)."""
    positions: Tensor
    """int64 [B], places in the global batch."""
    labels: Tensor
    """int64 [B], -1 where there is none."""
    bad: list[tuple[str, str]]
    """Name and reason of every image that could not be read and was replaced."""
    draws: Tensor | None = None
    """int64 [B]: the epoch that each image's augmentation is drawn for; every copy has its own."""

    def pin_memory(self) -> "Batch":
        """Crops in page-locked memory; the rest stays on the host and needs none."""
        self.crops = [crops.pin_memory() for crops in self.crops]
        return self


@dataclass(frozen=True)
class Split:
    """Which part of every global batch is computed here."""

    global_batch: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    def positions(self, micro: int) -> np.ndarray:
        """int64 [B]: places in the global batch of this rank's micro-batch."""
        return step_positions(
            0, micro, self.rank, global_batch=self.global_batch, accumulate=self.accumulate, world=self.world
        )


class BatchMaker:
    """(step, micro) -> Batch: a pure function of the source, the views, the seed, the split, `repeat` and `copies`.

    repeat: after so many epochs the augmentation begins anew, in an order of images that goes on; None: never.
    copies: so many times in a row an image comes, each time augmented in its own way (`data.copies`).
    """

    part = ""
    """What each of its samples is made of, where that is several pictures."""

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        seed: int,
        split: Split,
        repeat: int | None = None,
        copies: int = 1,
    ) -> None:
        self.source, self.seed, self.split, self.repeat, self.copies = source, seed, split, repeat, copies
        self.groups = resolutions(views)
        self.order = Order(len(source), seed)
        self.policies = {v.number: Policy(v, source.frame_channels) for v in views if v.crops.policy != "none"}
        self._kept: dict[int, Prepared] = {}

    def __call__(self, step: int, micro: int) -> Batch:
        """The micro-batch `micro` of `step`. Raises UserError when too many images in a row cannot be read."""
        positions = self.split.positions(micro)
        images_before, copy = np.divmod(step * self.split.global_batch + positions, self.copies)  # [B], [B]
        epochs, ids = self.order.at(images_before)
        epochs = epochs * self.copies + copy  # what the augmentation is drawn for
        if self.repeat is not None:
            epochs = epochs % self.repeat
        count = len(ids)
        crops = [self._buffer(g, count) for g in self.groups]
        params = [np.empty((len(g), count, P), np.float32) for g in self.groups]
        labels = np.full(count, -1, np.int64)
        bad: list[tuple[str, str]] = []
        known = self.source.labels
        images: list[Any] = []
        start = pixels = 0
        for b, asked in enumerate(ids.tolist()):
            image, found = self._read(asked, int(epochs[b]), bad)
            images.append(image)
            labels[b] = -1 if known is None else known[found]
            pixels += self._area(image)
            if pixels >= _PIXELS_AT_ONCE or b == count - 1:
                rows = slice(start, b + 1)
                parts = [c[:, rows] for c in crops], [p[:, rows] for p in params]
                self._crop(images, epochs[rows], ids[rows], *parts, bad)
                images, start, pixels = [], b + 1, 0
        return Batch(
            crops=[self._tensor(c) for c in crops],
            params=[torch.from_numpy(p) for p in params],
            ids=torch.from_numpy(ids),
            positions=torch.from_numpy(positions),
            labels=torch.from_numpy(labels),
            bad=bad,
            draws=torch.from_numpy(epochs),
        )

    def _buffer(self, views: Sequence[View], count: int) -> np.ndarray:
        """What crops of one resolution are put into: [V,B,S,S,C]."""
        return np.empty((len(views), count, views[0].size, views[0].size, self.source.channels), self.source.dtype)

    def _tensor(self, crops: np.ndarray) -> Tensor:
        """[V,B,S,S,C] -> [V,B,C,S,S], no copy."""
        return torch.from_numpy(crops).permute(0, 1, 4, 2, 3)

    def _area(self, image: Any) -> int:
        """Pixels that it keeps in memory."""
        height, width = pixel_size(image)
        return height * width

    def _read(self, asked: int, epoch: int, bad: list[tuple[str, str]]) -> tuple[Any, int]:
        """The image asked for, or the next one that can be read, and its number."""
        n = len(self.source)
        for i in range(min(n, _PROBES)):
            found = (asked + i) % n
            try:
                return self._decoded(found, asked, epoch), found
            except BadImage as error:
                bad.append((self.source.name(found), str(error)))
        name, reason = bad[-1]
        raise UserError(
            f"data: {min(n, _PROBES)} images in a row cannot be read; the last is {one_line(name)}: {reason}"
        )

    def _decoded(self, i: int, asked: int, epoch: int) -> Any:
        """Image i, in place of the one asked for, for the augmentation of an epoch.

        Decoded images of a small set of small images are kept.
        """
        if (kept := self._kept.get(i)) is not None:
            return kept
        image = prepare(self.source.read(i))
        height, width = pixel_size(image)
        if (
            len(self.source) * (height * width * self.source.channels * self.source.config.depth // 8 + _OVERHEAD)
            <= _KEEP
        ):
            image = image.copy() if isinstance(image, Image.Image) else image  # without the decoder's state
            self._kept[i] = image
        return image

    def _crop(
        self,
        images: list[Prepared],
        epochs: np.ndarray,
        ids: np.ndarray,
        crops: list[np.ndarray],
        params: list[np.ndarray],
        bad: list[tuple[str, str]],
    ) -> None:
        """Fill crops [V,b,S,S,C] and params [V,b,P] of each resolution for b decoded images."""
        sizes = np.array([pixel_size(image) for image in images])
        for views, out, drawn in zip(self.groups, crops, params, strict=True):
            for v, view in enumerate(views):
                drawn[v] = draw(view, self.seed, epochs, ids, sizes)
                out[v] = crops_of(images, drawn[v], view.size, view.crops.interpolation)
                if policy := self.policies.get(view.number):
                    policy(out[v], self.seed, epochs, ids)
                if view.crops.style != "none":
                    self._style(out[v], drawn[v][:, STYLE], view, epochs, ids, bad)

    def _style(
        self,
        crops: np.ndarray,
        drawn: np.ndarray,
        view: View,
        epochs: np.ndarray,
        ids: np.ndarray,
        bad: list[tuple[str, str]],
    ) -> None:
        """Give crops [b,S,S,C] the style of other images, each seen whole, as rows [b,3] say."""
        for b in np.flatnonzero(drawn[:, style.KIND]).tolist():
            pick, beta = float(drawn[b, style.PICK]), float(drawn[b, style.BETA])
            other, _ = self._read(style.partner(pick, len(self.source), int(ids[b])), int(epochs[b]), bad)
            height, width = pixel_size(other)
            whole = np.zeros((1, P), np.float32)
            whole[0, :4] = 0, 0, width, height
            seen = crops_of([other], whole, view.size, view.crops.interpolation)[0]
            crops[b] = style.styled(crops[b], seen, int(drawn[b, style.KIND]), beta)


def pixel_size(image: Prepared) -> tuple[int, int]:
    """Height and width."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return (image.shape[0], image.shape[1]) if isinstance(image, np.ndarray) else (image.shape[2], image.shape[3])
