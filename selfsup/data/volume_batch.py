"""Micro-batches of volumes: as `BatchMaker`, with the slices of each crop after one another in the channels.

A crop is a box of the volume, flipped along each axis or not. Without `views.*.extent` it is a random resized crop of three
axes: `scale` is the part of the volume's voxels that it holds, and each side is longer or shorter by the square root of a
factor drawn from `ratio`, the three together leaving the voxels as many; no side exceeds the volume's. With extent=[low, high]
it covers so many times the crop's own voxels along each axis, one number for all three: [1, 1] cuts without resampling, and
a volume that is smaller is padded with level 0 on both sides.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup.data.batch import BatchMaker
from selfsup.data.views import View, draw, uniforms
from selfsup.data.volumes import resized
from selfsup.randomness import mix

_TAG = 0x3D3D
_KEEP = 512_000_000
"""Bytes of decoded volumes that a process keeps: unpacking a .nii.gz takes longer than cropping it."""


class VolumeBatchMaker(BatchMaker):
    """(step, micro) -> Batch whose crops are uint8 [V, B, D*C, S, S], slice after slice; D is the view's `slices`.

    Of each row of parameters x, y, w, h are those of the box; its place along the depth is drawn again from the same key.
    """

    part = "slice"

    def _buffer(self, views: Sequence[View], count: int) -> np.ndarray:
        d, h, w = shape_of(views[0])
        return np.empty((len(views), count, d * self.source.channels, h, w), np.uint8)

    def _tensor(self, crops: np.ndarray) -> Tensor:
        return torch.from_numpy(crops)

    def _area(self, image: Any) -> int:
        return int(image[0].size)

    def _decoded(self, i: int, asked: int, epoch: int) -> Any:
        if i in self._kept:
            return self._kept[i]
        volume = self.source.volume(i)  # type: ignore[attr-defined]
        kept: dict[int, Any] = self._kept
        kept[i] = volume
        while len(kept) > 1 and sum(v.nbytes for v in kept.values()) > _KEEP:
            del kept[next(iter(kept))]  # the first that came
        return volume

    def _crop(
        self,
        images: list[Any],
        epochs: np.ndarray,
        ids: np.ndarray,
        crops: list[np.ndarray],
        params: list[np.ndarray],
        bad: list[tuple[str, str]],
    ) -> None:
        """Fill crops [V, b, D*C, S, S] and params [V, b, P] of each resolution."""
        extents = np.array([volume.shape[1:] for volume in images])  # [b, 3]
        for views, out, rows in zip(self.groups, crops, params, strict=True):
            for v, view in enumerate(views):
                starts, sides, deep = boxes(view, self.seed, epochs, ids, extents)
                rows[v] = draw(view, self.seed, epochs, ids, extents[:, 1:])
                rows[v][:, :4] = np.stack([starts[:, 2], starts[:, 1], sides[:, 2], sides[:, 1]], axis=1)
                for b, volume in enumerate(images):
                    made = cut(volume, starts[b], sides[b], shape_of(view))
                    flips = [axis for axis, flip in ((1, deep[b]), (2, rows[v, b, 5]), (3, rows[v, b, 4])) if flip]
                    made = np.flip(made, tuple(flips)) if flips else made
                    out[v, b] = made.transpose(1, 0, 2, 3).reshape(out[v, b].shape)  # [C, D, S, S] -> [D*C, S, S]


def shape_of(view: View) -> tuple[int, int, int]:
    """Voxels of a view: (depth, height, width)."""
    return (view.crops.slices or view.size, view.size, view.size)


def boxes(
    view: View, seed: int, epochs: np.ndarray, indices: np.ndarray, extents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts int64 [B, 3], sides int64 [B, 3], bool [B]: flipped along the depth) of a view's boxes: a pure function.

    extents: [B, 3], depth, height and width of each volume. Starts are negative where the box is larger.
    """
    u = uniforms(mix(seed, _TAG), epochs, indices, view.number, 8)
    crops, shape = view.crops, np.array(shape_of(view))
    if crops.extent is not None:
        low, high = crops.extent
        sides = np.rint(shape * (low + u[:, :1] * (high - low)))
    else:
        (s0, s1), (r0, r1) = crops.scale, np.log(crops.ratio)
        longer = (r0 + u[:, 4:7] * (r1 - r0)) / 2
        longer -= longer.mean(1, keepdims=True)
        sides = np.minimum(np.rint(extents * np.cbrt(s0 + u[:, :1] * (s1 - s0)) * np.exp(longer)), extents)
    sides = np.maximum(sides, 1)
    room = extents - sides
    starts = np.where(room >= 0, np.floor(u[:, 1:4] * (room + 1)), np.floor(room / 2))
    return starts.astype(np.int64), sides.astype(np.int64), u[:, 7] < crops.dflip


def cut(volume: np.ndarray, start: np.ndarray, sides: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The box of a volume uint8 [C, D, H, W], level 0 where it is outside, resampled to `shape`: uint8 [C, d, h, w]."""
    extent = np.array(volume.shape[1:])
    first, last = np.maximum(start, 0), np.minimum(start + sides, extent)
    part = volume[:, first[0] : last[0], first[1] : last[1], first[2] : last[2]]
    before, after = first - start, start + sides - last
    if before.any() or after.any():
        part = np.pad(part, [(0, 0), *zip(before.tolist(), after.tolist())])
    if part.shape[1:] == tuple(shape):
        return part
    made = resized(torch.from_numpy(np.ascontiguousarray(part)).float(), shape)
    return made.round_().clamp_(0, 255).to(torch.uint8).numpy()
