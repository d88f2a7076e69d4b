"""PIL's GaussianBlur of batches of images: three passes of a box filter along each axis, as products with matrices.

Gwosdek et al., 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", section 3. The edge
pixel is repeated in each pass, so a matrix is no plain convolution at its ends.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_PASSES = 3
_TILE = 32
"""Lines that `blurred_in_tiles` makes at once."""


def reaches(sigma: np.ndarray) -> np.ndarray:
    """int64 [M]: how many pixels on either side one pass takes in, for each of M sigmas; at least 2."""
    return np.maximum(_whole(sigma).astype(np.int64) + 1, 2)


def box_taps(sigma: np.ndarray, reach: int | None = None) -> np.ndarray:
    """One pass of the box filter for each of M sigmas: float32 [M,2R+1]; R is `reach`, or the least that holds them all."""
    whole, variance = _whole(sigma), _variance(sigma)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))  # of the next
    reach = int(whole.max()) + 1 if reach is None else reach
    distance = np.abs(np.arange(-reach, reach + 1))
    taps = np.where(distance <= whole[:, None], 1.0, np.where(distance == whole[:, None] + 1, part[:, None], 0.0))
    return (taps / taps.sum(1, keepdims=True)).astype(np.float32)


def _variance(sigma: np.ndarray) -> np.ndarray:
    """Of one pass."""
    return sigma.astype(np.float64) ** 2 / _PASSES


def _whole(sigma: np.ndarray) -> np.ndarray:
    """Full taps on either side."""
    return np.floor((np.sqrt(12 * _variance(sigma) + 1) - 1) / 2)


def matrices(taps: Tensor, size: int) -> Tensor:
    """All passes over lines of `size` pixels: taps [M,2R+1] of one pass -> float32 [M,S,S]."""
    box = taps @ _shifts(taps.shape[1] // 2, size, taps.device)  # [M,S*S]
    box = box.view(-1, size, size)
    return box @ box @ box


@lru_cache(maxsize=32)
def _shifts(reach: int, size: int, device: torch.device) -> Tensor:
    """float32 [2R+1, S*S]: row d moves a line by d - R pixels and repeats its ends."""
    line = torch.arange(size, device=device)
    source = (line + torch.arange(-reach, reach + 1, device=device)[:, None]).clamp_(0, size - 1)  # [2R+1,S]
    return (source[:, :, None] == line).to(torch.float32).flatten(1)


def blurred(x: Tensor, matrix: Tensor, down: Tensor | None = None, fine: bool = False) -> Tensor:
    """The matrix [M,1,W,W] along both axes of [M,C,H,W], to whole levels unless `fine`; another one, `down` [M,1,H,H], where H
    is not W."""
    out = (matrix if down is None else down) @ x @ matrix.transpose(-1, -2)
    return out if fine else out.round_()


def blurred_in_tiles(x: Tensor, sigma: np.ndarray, reach: int) -> Tensor:
    """[M,C,S,S] blurred by sigmas [M] of one of `reaches`, on a CPU: as by `blurred`, but without the products with zeros,
    which most of a matrix is.
    """
    images, channels, size, _ = x.shape
    taps = torch.from_numpy(box_taps(sigma, reach))
    wide = _PASSES * reach
    tile = max(_TILE, wide)
    short = tile + 2 * wide
    if size <= short:
        return blurred(x, matrices(taps, size)[:, None])
    matrix = matrices(taps, short)  # of lines that have both ends and, between them, a tile that sees neither
    tiles = []
    for start in range(0, size - wide, tile):
        last = start + tile >= size - wide
        end = size if last else start + tile
        low, high = max(start - wide, 0), min(end + wide, size)
        row = short - (end - start) if last else 0 if start == 0 else wide
        column = short - (high - low) if last else 0
        tiles.append((start, end, low, high, matrix[:, row : row + end - start, column : column + high - low]))
    down = torch.empty_like(x)
    for start, end, low, high, part in tiles:
        torch.matmul(part[:, None], x[:, :, low:high], out=down[:, :, start:end])
    lines = down.view(images, channels * size, size)
    out = torch.empty_like(lines)
    for start, end, low, high, part in tiles:
        torch.bmm(lines[:, :, low:high], part.mT, out=out[:, :, start:end])
    return out.view_as(x).round_()
