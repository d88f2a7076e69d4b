"""Rotation, translation, zoom and shear of images, and what is seen beyond their edges.

An output pixel takes its value, bilinearly, from where the inverse transform puts it in an image that goes on beyond its edges
for ever: as one level (constant), as the nearest pixel (edge), as a mirror image without and with the edge pixel twice
(reflect, symmetric), or as the image again (wrap). These are the modes of `numpy.pad`; scipy.ndimage calls them grid-constant,
nearest, mirror, reflect and grid-wrap. Transform and signs are those of torchvision's `affine`: about the centre, angles in
degrees clockwise, x to the right and y down; shear first, then rotation and zoom, then the translation. Where an image
is made smaller (zoom below 1) pixels are picked without a filter, as torchvision does.

What is drawn comes from the host; the device is never waited for.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from selfsup.config import Crops
from selfsup.data.rows import on_rows

FILLS = ("constant", "edge", "reflect", "symmetric", "wrap")
"""By number; in a row of parameters `fill` is 1 more, and 0 says that nothing is done."""

CONSTANT, EDGE, REFLECT, SYMMETRIC, WRAP = range(5)
_WHETHER, _ANGLE, _X, _Y, _ZOOM, _SHEAR_X, _SHEAR_Y, DRAWS = range(8)
ANGLE, MOVE_X, MOVE_Y, ZOOM, SHEAR_X, SHEAR_Y, FILL, LEVEL, WIDTH = range(9)
"""Columns of what `drawn` gives, and how many there are."""


def wanted(crops: Crops) -> bool:
    """Whether these views are moved at all."""
    return bool(crops.rotate or crops.translate or crops.shear or crops.zoom != (1.0, 1.0))


def drawn(u: np.ndarray, crops: Crops) -> np.ndarray:
    """Uniform u [B,DRAWS] -> [B,8]: degrees, shift as fractions of width and height, zoom, shear in degrees, fill, level.

    Angles, shifts and shears are uniform about 0, the zoom in its logarithm. level: of constant fill, -1 for the data's mean.
    """
    low, high = np.log(crops.zoom[0]), np.log(crops.zoom[1])
    out = np.zeros((len(u), WIDTH))
    for column, draw, most in (
        (ANGLE, _ANGLE, crops.rotate),
        (MOVE_X, _X, crops.translate),
        (MOVE_Y, _Y, crops.translate),
        (SHEAR_X, _SHEAR_X, crops.shear),
        (SHEAR_Y, _SHEAR_Y, crops.shear),
    ):
        out[:, column] = (2 * u[:, draw] - 1) * most
    out[:, ZOOM] = np.exp(low + u[:, _ZOOM] * (high - low))
    out[:, FILL] = 1 + FILLS.index(crops.fill)
    out[:, LEVEL] = -1 if crops.fill_level is None else crops.fill_level
    return out * (u[:, _WHETHER] < crops.affine)[:, None]


def matrices(rows: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [M,8] -> where pixels (x, y) of the image go, and where those of the result come from: float64 [M,2,3] each."""
    r, sx, sy = (np.deg2rad(rows[:, k].astype(np.float64)) for k in (ANGLE, SHEAR_X, SHEAR_Y))
    a, b = np.cos(r - sy) / np.cos(sy), -np.cos(r - sy) * np.tan(sx) / np.cos(sy) - np.sin(r)
    c, d = np.sin(r - sy) / np.cos(sy), -np.sin(r - sy) * np.tan(sx) / np.cos(sy) + np.cos(r)
    zoom = rows[:, ZOOM, None, None].astype(np.float64)
    there = np.stack([np.stack([a, b], 1), np.stack([c, d], 1)], 1) * zoom  # [M,2,2]
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    moved = rows[:, MOVE_X : MOVE_Y + 1].astype(np.float64) * (width, height) + centre  # [M,2]
    back = np.linalg.inv(there)
    forward = np.concatenate([there, (moved - there @ centre)[:, :, None]], 2)
    inverse = np.concatenate([back, (centre - (back @ moved[:, :, None])[:, :, 0])[:, :, None]], 2)
    return forward, inverse


def warp(x: Tensor, rows: np.ndarray, mean: Sequence[float]) -> Tensor:
    """Levels [N,C,H,W] of any type, with rows [N,8] on the host -> the same, in whole levels unless they are float;
    mean: C levels of constant fill."""
    kinds = np.unique(rows[:, FILL][rows[:, FILL] > 0]).astype(int).tolist()
    if not kinds:
        return x
    _, inverse = matrices(np.where(rows[:, FILL, None] > 0, rows, _IDLE), x.shape[-2], x.shape[-1])
    terms = list(inverse.reshape(-1, 6).astype(np.float32).T)
    x = x.clone()
    for kind in kinds:
        own = [np.where(rows[:, LEVEL] < 0, np.float32(m), rows[:, LEVEL]).astype(np.float32) for m in mean]
        selected = np.flatnonzero(rows[:, FILL] == kind)
        x = on_rows(x, selected, partial(_warped, kind - 1, len(mean)), *own, *terms)
    return x


_IDLE = np.array([0, 0, 0, 1, 0, 0, 0, 0], np.float32)


def _warped(fill: int, channels: int, x: Tensor, *sent: Tensor) -> Tensor:
    """x [M,C,H,W]; sent: C levels and then the six terms of the inverse matrix, [M,1,1,1] each."""
    level, terms = torch.cat(sent[:channels], 1), [t[:, 0] for t in sent[channels:]]  # [M,C,1,1]; [M,1,1]
    out = sampled(x.to(torch.float32), terms, fill, level)
    return out if x.is_floating_point() else out.round_().clamp_(0, 255).to(x.dtype)


def sampled(x: Tensor, terms: Sequence[Tensor], fill: int, level: Tensor | float) -> Tensor:
    """Bilinear float [M,C,H,W] at (t0 x + t1 y + t2, t3 x + t4 y + t5) of x [M,C,H,W]; terms: six tensors [M,1,1]."""
    height, width = x.shape[-2:]
    across, down = _places(terms, height, width, x.device)  # [M,H,W]
    left, top = across.floor(), down.floor()
    right_part, lower_part = (across - left)[:, None], (down - top)[:, None]  # [M,1,H,W]
    columns, rows = left.long(), top.long()
    flat = x.flatten(2)  # [M,C,H*W]

    def corner(row: Tensor, column: Tensor) -> Tensor:
        place = folded(row, height, fill) * width + folded(column, width, fill)  # [M,H,W]
        value = flat.gather(2, place.flatten(1)[:, None].expand(-1, flat.shape[1], -1)).view(x.shape)
        if fill != CONSTANT:
            return value
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        return torch.where(inside[:, None], value, level)

    upper = torch.lerp(corner(rows, columns), corner(rows, columns + 1), right_part)
    lower = torch.lerp(corner(rows + 1, columns), corner(rows + 1, columns + 1), right_part)
    return torch.lerp(upper, lower, lower_part)


def nearest(inverse: np.ndarray, height: int, width: int, fill: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of one inverse matrix [2,3]: row and column of the pixel that each pixel of the result takes, and whether it is one of the
    image, as it always is unless `fill` is constant; int64, int64, bool [H,W]. For ids, which are not to be mixed."""
    terms = [torch.tensor(v, dtype=torch.float32).view(1, 1, 1) for v in inverse.reshape(-1).tolist()]
    across, down = _places(terms, height, width, torch.device("cpu"))
    column, row = (across[0] + 0.5).floor().long(), (down[0] + 0.5).floor().long()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    inside = inside if fill == CONSTANT else torch.ones_like(inside)
    return folded(row, height, fill).numpy(), folded(column, width, fill).numpy(), inside.numpy()


def _places(terms: Sequence[Tensor], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x, y = torch.arange(width, device=device, dtype=torch.float32), torch.arange(height, device=device)[:, None].float()
    return terms[0] * x + terms[1] * y + terms[2], terms[3] * x + terms[4] * y + terms[5]


def folded(i: Tensor, n: int, fill: int) -> Tensor:
    """Places int64 on a line that has no end -> those of the n pixels that are seen there."""
    if fill in (CONSTANT, EDGE):
        return i.clamp(0, n - 1)
    if fill == WRAP:
        return i.remainder(n)
    if fill == SYMMETRIC:
        i = i.remainder(2 * n)
        return torch.minimum(i, 2 * n - 1 - i)
    period = max(1, 2 * (n - 1))
    i = i.remainder(period)
    return torch.minimum(i, period - i)
