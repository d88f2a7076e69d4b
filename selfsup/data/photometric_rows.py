"""The operations of `photometric` on one image after the other, for CPUs.

An image of 224 pixels takes 600 kB. It passes through some forty operations, which are many times faster while it stays
in a core's own cache than on a batch that does not fit there; and each image takes only those that it was given.
"""

import numpy as np
import torch
from torch import Tensor

from selfsup.data.blur import blurred_in_tiles
from selfsup.data.colour import luma, turn_hue
from selfsup.data.views import COLUMN, ORDERS

_IDLE = (1.0, 1.0, 1.0, 0.0)  # factors of brightness, contrast, saturation, hue that leave an image alone


def one_by_one(crops: Tensor, p: np.ndarray, scale: np.ndarray, shift: np.ndarray, dtype: torch.dtype) -> Tensor:
    """uint8 [N,C,S,S] and their parameters [N,P] -> levels * scale [C] + shift [C], as `dtype` [N,C,S,S]."""
    out = torch.empty(crops.shape, dtype=dtype)
    scales, shifts = (torch.from_numpy(a)[:, None, None] for a in (scale, shift))  # [C,1,1]
    buffer = torch.empty((1, *crops.shape[1:]))
    for target, crop, row in zip(out, crops, p, strict=True):
        x = _one(buffer.copy_(crop), row)  # [1,C,S,S], or [1,1,S,S] of a grey one
        target.copy_((x[0] * scales).add_(shifts))
    return out


def _one(x: Tensor, row: np.ndarray) -> Tensor:
    """Levels of one image [1,C,S,S], which are overwritten. Grey has one channel from there on."""
    colour = x.shape[1] == 3
    order = int(row[COLUMN["order"]])
    factors = row[COLUMN["brightness"] : COLUMN["hue"] + 1]
    for op in ORDERS[order] if order >= 0 else ():
        factor = float(factors[op])
        if factor == _IDLE[op]:
            continue
        if op == 3:
            x = turn_hue(x, factor) if colour else x
        elif op != 2 or colour:
            _blend(x, op, factor)
    if colour and row[COLUMN["gray"]] > 0:
        x = luma(x)
    if (sigma := float(row[COLUMN["sigma"]])) > 0:
        x = blurred_in_tiles(x[0], sigma)[None]
    if (limit := float(row[COLUMN["solarize"]])) >= 0:
        # x + (x >= limit) * (255 - 2 x)
        x = torch.ge(x, limit, out=torch.empty_like(x)).mul_((x * -2).add_(255)).add_(x)
    return x


def _blend(x: Tensor, op: int, factor: float) -> None:
    """In place what PIL's ImageEnhance does: factor * x + (1 - factor) * (black, the mean grey level, or grey) by op 0, 1, 2;
    cut to levels.
    """
    rest = float(np.float32(1) - np.float32(factor))
    if op == 0:
        x.mul_(factor)
    else:
        gray = luma(x) if x.shape[1] == 3 else x
        if op == 1:
            gray = gray.mean().add_(0.5).floor_()
        x.mul_(factor).add_(gray, alpha=rest)
    x.clamp_(0, 255).floor_()
