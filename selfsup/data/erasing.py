"""Random erasing and Cutout: a box of each image, filled after the normalisation.

Random erasing: Zhong et al., 2020, "Random Erasing Data Augmentation", algorithm 1; like torchvision's and timm's, aspect
ratios are uniform in their logarithm, boxes are smaller than the image along both sides, and an image for which ten
attempts give none is left alone. Cutout: DeVries and Taylor, 2017, "Improved Regularization of Convolutional Neural Networks
with Cutout", section 3: a square whose centre may be any pixel, so that a part of it may lie outside.

Boxes are drawn in the workers with everything else that is drawn for a view; they travel with the crops, and the device is
never waited for. The noise of a pixel is a function of the image's own draw and of the pixel's place.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from selfsup.data.rows import on_rows
from selfsup.data.threads import one_thread
from selfsup.randomness import keyed_uniform, mix

Fill = Literal["zero", "noise", "mean"]

ZERO, MEAN, KEYS = -1, -2, 1 << 24
"""What fills a box, as a number that float32 holds: 0, which after the normalisation is the data's mean; the image's own mean of
each channel; or, from 0 to KEYS - 1, the key of normal noise."""

_ATTEMPTS = 10
_WHETHER, _Y, _X, _KEY, DRAWS = (2 * _ATTEMPTS + k for k in range(5))
_RADIUS_KEY, _ANGLE_KEY = mix(0xE4A5E, 0), mix(0xE4A5E, 1)


# ------------------------------------------------------------------------------------------------------------ what is drawn


def boxes(
    u: np.ndarray, probability: float, size: int, area: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """[B,4] left, top, width, height of random erasing in images of `size` pixels, from uniform u [B,DRAWS]; width 0: none.

    area: of the box, as a fraction of the image's. ratio: height / width.
    """
    part = size * size * (area[0] + u[:, 0 : 2 * _ATTEMPTS : 2] * (area[1] - area[0]))  # [B,attempts]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + u[:, 1 : 2 * _ATTEMPTS : 2] * (high - low))
    heights, widths = np.rint(np.sqrt(part * aspect)), np.rint(np.sqrt(part / aspect))
    fits = (heights > 0) & (widths > 0) & (heights < size) & (widths < size)
    first = np.argmax(fits, axis=1)[:, None]
    h, w = (np.take_along_axis(a, first, 1)[:, 0] for a in (heights, widths))  # [B]
    y, x = np.floor(u[:, _Y] * (size - h + 1)), np.floor(u[:, _X] * (size - w + 1))
    live = fits.any(1) & (u[:, _WHETHER] < probability)
    return np.where(live[:, None], np.stack([x, y, w, h], axis=1), 0.0)


def fills(u: np.ndarray, fill: Fill) -> np.ndarray:
    """[B] numbers that say what fills the boxes drawn from u [B,DRAWS]."""
    if fill == "noise":
        return np.floor(u[:, _KEY] * KEYS)
    return np.full(len(u), {"zero": ZERO, "mean": MEAN}[fill], dtype=np.float64)


def squares(u: np.ndarray, side: int, size: int) -> np.ndarray:
    """[B,4] left, top, width, height of Cutout: what of a square lies inside; u [B,2] uniform, for its centre."""
    start = np.floor(u * size) - side // 2  # [B,2]: left, top
    inside = np.clip(start, 0, size)
    return np.concatenate([inside, np.clip(start + side, 0, size) - inside], axis=1)


# ------------------------------------------------------------------------------------------------------------- what is done


def erase(x: Tensor, box: np.ndarray, fill: np.ndarray) -> Tensor:
    """Normalised x [N,C,S,S], which is overwritten, with a box [N,4] of each image filled as `fill` [N] says."""
    rows = np.flatnonzero(box[:, 2] > 0)
    if rows.size == 0:
        return x
    return one_by_one(x, box, fill, rows) if x.device.type == "cpu" else all_at_once(x, box, fill, rows)


@one_thread()
def one_by_one(x: Tensor, box: np.ndarray, fill: np.ndarray, rows: np.ndarray) -> Tensor:
    """For CPUs: only what lies in the boxes is touched."""
    channels, size = x.shape[1], x.shape[-1]
    for row in rows.tolist():
        left, top, width, height = box[row].astype(int).tolist()
        part = x[row, :, top : top + height, left : left + width]
        if fill[row] >= 0:
            place = places(channels, size)[:, top : top + height, left : left + width]
            part.copy_(noise(place + int(fill[row]) * channels * size * size))
        elif fill[row] == MEAN:
            part.copy_(x[row].mean(dim=(1, 2), keepdim=True).expand_as(part))
        else:
            part.zero_()
    return x


def all_at_once(x: Tensor, box: np.ndarray, fill: np.ndarray, rows: np.ndarray) -> Tensor:
    """For accelerators: one kind of fill after the other, by masks."""
    for content, wanted in ((_zero, fill == ZERO), (_mean, fill == MEAN), (_noise, fill >= 0)):
        x = on_rows(x, rows[wanted[rows]], partial(_filled, content), *box.T, fill)
    return x


def _filled(
    content: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    left: Tensor,
    top: Tensor,
    width: Tensor,
    height: Tensor,
    fill: Tensor,
) -> Tensor:
    """x [M,C,S,S] with content(x, fill) in its boxes; the numbers are [M,1,1,1]."""
    line = torch.arange(x.shape[-1], device=x.device)
    down, across = line[:, None], line
    inside = (down >= top) & (down < top + height) & (across >= left) & (across < left + width)  # [M,1,S,S]
    return torch.where(inside, content(x, fill).to(x.dtype), x)


def _zero(x: Tensor, fill: Tensor) -> Tensor:
    return torch.zeros((), device=x.device)


def _mean(x: Tensor, fill: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), keepdim=True)


def _noise(x: Tensor, fill: Tensor) -> Tensor:
    place = places(x.shape[1], x.shape[-1], x.device)  # [C,S,S]
    return noise(place + fill.to(torch.int64) * place.numel())


def places(channels: int, size: int, device: torch.device | None = None) -> Tensor:
    """int64 [C,S,S]: a number for each value of an image."""
    return torch.arange(channels * size * size, device=device).view(channels, size, size)


def noise(index: Tensor) -> Tensor:
    """Normal float32 for each int64 (Box and Muller, 1958)."""
    radius = torch.sqrt(-2 * torch.log1p(-keyed_uniform(_RADIUS_KEY, index)))
    return radius * torch.cos(2 * math.pi * keyed_uniform(_ANGLE_KEY, index))
