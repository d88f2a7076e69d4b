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


def box_taps(sigma: np.ndarray) -> np.ndarray:
    """One pass of the box filter for each of M sigmas: float32 [M,2R+1]."""
    variance = sigma.astype(np.float64) ** 2 / _PASSES  # of one pass
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # full taps on either side
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))  # of the next
    reach = int(whole.max()) + 1
    distance = np.abs(np.arange(-reach, reach + 1))
    taps = np.where(distance <= whole[:, None], 1.0, np.where(distance == whole[:, None] + 1, part[:, None], 0.0))
    return (taps / taps.sum(1, keepdims=True)).astype(np.float32)


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


def blurred(x: Tensor, matrix: Tensor) -> Tensor:
    """The same matrix [M,1,S,S] along both axes of [M,C,S,S], to whole levels."""
    return (matrix @ x @ matrix.transpose(-1, -2)).round_()


def blurred_in_tiles(x: Tensor, sigma: float) -> Tensor:
    """As `blurred` for one image [C,S,S] on a CPU: without the products with zeros, which most of a matrix is."""
    channels, size, _ = x.shape
    taps = torch.from_numpy(box_taps(np.array([sigma])))
    reach = _PASSES * (taps.shape[1] // 2)
    tile = max(_TILE, reach)
    short = tile + 2 * reach
    if size <= short:
        return blurred(x, matrices(taps, size)[0])
    matrix = matrices(taps, short)[0]  # of a line that has both ends and, between them, a tile that sees neither
    down = torch.empty_like(x)
    lines, out = down.view(channels * size, size), torch.empty(channels * size, size)
    tiles = []
    for start in range(0, size - reach, tile):
        last = start + tile >= size - reach
        end = size if last else start + tile
        low, high = max(start - reach, 0), min(end + reach, size)
        row = short - (end - start) if last else 0 if start == 0 else reach
        column = short - (high - low) if last else 0
        tiles.append((start, end, low, high, matrix[row : row + end - start, column : column + high - low]))
    for start, end, low, high, part in tiles:
        torch.matmul(part, x[:, low:high], out=down[:, start:end])
    for start, end, low, high, part in tiles:
        torch.mm(lines[:, low:high], part.t(), out=out[:, start:end])
    return out.view_as(x).round_()
