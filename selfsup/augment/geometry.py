"""Where things go: the crop, the flips and the warp of one copy, for its pixels, its mask and its boxes."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from selfsup.augment.settings import AugmentConfig
from selfsup.data import warp
from selfsup.data.decode import Pixels
from selfsup.data.views import RESAMPLE, WARP, View, ViewParams, draw, resized_array

_FINE = 1 << 16  # boxes are drawn on a square of so many pixels, and then fitted to the image

Box = tuple[float, float, float, float]
"""Left, top, width, height in pixels, as of COCO."""


class Seen(NamedTuple):
    """What became of a box."""

    box: Box
    visible: float
    """Part of its area that is still inside."""


@dataclass(frozen=True)
class Placement:
    """What was drawn for one copy of an image of height x width pixels."""

    row: np.ndarray
    """float32 [P], its crop in pixels of this image."""
    height: int
    width: int

    @property
    def params(self) -> ViewParams:
        """By name."""
        return ViewParams.unpack(self.row)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Of the crop: left, top, width, height."""
        left, top, width, height = self.row[:4].astype(int).tolist()
        return left, top, width, height

    def pixels(self, image: np.ndarray, resample: str) -> np.ndarray:
        """uint8 [H,W,C] -> the crop in the image's size, flipped: all but the warp."""
        left, top, width, height = self.box
        if (width, height) != (self.width, self.height):
            area = (left, top, left + width, top + height)
            image = resized_array(image, area, (self.width, self.height), RESAMPLE[resample])
        image = image[::-1] if self.params.vflip else image
        return np.ascontiguousarray(image[:, ::-1] if self.params.hflip else image)

    def warped(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H,W,C], rotated and so on; constant fill is the level that was drawn, or this image's own mean."""
        if not self.params.fill:
            return image
        mean = [float(np.rint(m)) for m in image.mean((0, 1))]
        x = torch.from_numpy(image).permute(2, 0, 1)[None]  # [H,W,C] -> [1,C,H,W]
        return np.ascontiguousarray(warp.warp(x, self.row[None, WARP], mean)[0].permute(1, 2, 0).numpy())

    def mask(self, ids: np.ndarray, ignore: int) -> np.ndarray:
        """Ids [H,W] -> those of the copy, by the nearest pixel; `ignore` where there is no image."""
        p = self.params
        left, top, width, height = self.box
        row, column = np.mgrid[0 : self.height, 0 : self.width]
        inside = np.ones(row.shape, bool)
        if p.fill:
            inverse = warp.matrices(self.row[None, WARP], self.height, self.width)[1][0]
            row, column, inside = warp.nearest(inverse, self.height, self.width, int(p.fill) - 1)
        row = self.height - 1 - row if p.vflip else row
        column = self.width - 1 - column if p.hflip else column
        row = top + (2 * row + 1) * height // (2 * self.height)
        column = left + (2 * column + 1) * width // (2 * self.width)
        return np.where(inside, ids[row, column], np.asarray(ignore, ids.dtype))

    def boxes(self, boxes: np.ndarray) -> list[Seen]:
        """[N,4] -> the upright boxes about their corners, as far as they lie inside what is left of the image."""
        left, top, width, height = self.box
        p, size = self.params, np.array([self.width, self.height], float)
        low, high = boxes[:, :2].astype(float), boxes[:, :2].astype(float) + boxes[:, 2:]  # [N,2]
        scale = size / (width, height)
        low, high = (low - (left, top)) * scale, (high - (left, top)) * scale
        for axis, flip in ((0, p.hflip), (1, p.vflip)):
            if flip:
                low[:, axis], high[:, axis] = size[axis] - high[:, axis], size[axis] - low[:, axis]
        whole = self._around(low, high)
        cut = self._around(low.clip(0, size), high.clip(0, size))  # what the crop leaves out does not come back
        ends = np.concatenate([cut[:, :2].clip(0, size), cut[:, 2:].clip(0, size)], 1)
        inside, full = _area(ends), _area(whole)
        out = []
        for (a, b, c, d), part in zip(ends.tolist(), inside / np.where(full > 0, full, 1), strict=True):
            out.append(Seen((a, b, c - a, d - b), float(part)))
        return out

    def _around(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Corners after the warp: [N,4] left, top, right, bottom."""
        x = np.stack([low[:, 0], high[:, 0], low[:, 0], high[:, 0]], 1)  # [N,4]
        y = np.stack([low[:, 1], low[:, 1], high[:, 1], high[:, 1]], 1)
        if self.params.fill:
            m = warp.matrices(self.row[None, WARP], self.height, self.width)[0][0]
            x, y = x - 0.5, y - 0.5  # from edges of pixels to their centres
            x, y = m[0, 0] * x + m[0, 1] * y + m[0, 2] + 0.5, m[1, 0] * x + m[1, 1] * y + m[1, 2] + 0.5
        return np.stack([x.min(1), y.min(1), x.max(1), y.max(1)], 1)


def _area(ends: np.ndarray) -> np.ndarray:
    return (ends[:, 2] - ends[:, 0]).clip(0) * (ends[:, 3] - ends[:, 1]).clip(0)


def place(config: AugmentConfig, image: int, copy: int, height: int, width: int) -> Placement:
    """What is drawn for copy 1, 2, ... of an image of this size: a function of the seed, both numbers and the size alone."""
    view = View("copy", config, 0, 0)
    row = draw(view, config.seed, np.array([copy]), np.array([image]), np.array([[_FINE, _FINE]]))[0].astype(np.float64)
    x, y, w, h = row[:4] / _FINE
    if config.scale == (1.0, 1.0):
        x, y, w, h = 0.0, 0.0, 1.0, 1.0
    left, top = round(x * width), round(y * height)
    row[:4] = left, top, max(1, min(round(w * width), width - left)), max(1, min(round(h * height), height - top))
    row[0], row[1] = min(left, width - 1), min(top, height - 1)
    return Placement(row.astype(np.float32), height, width)


def still(height: int, width: int) -> Placement:
    """Of copy 0, the image itself."""
    plain = ViewParams(0, 0, width, height, 0, 0, -1, 1, 1, 1, 0, 0, 0, -1)
    return Placement(plain.pack(), height, width)


def as_array(image: Pixels) -> np.ndarray:
    """uint8 [H,W,C]."""
    array = np.array(image)
    return array[:, :, None] if array.ndim == 2 else array
