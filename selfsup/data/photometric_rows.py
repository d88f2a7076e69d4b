"""The operations of `photometric` on few images at a time, for CPUs.

An image of 224 pixels takes 600 kB. It passes through some forty operations, which are many times faster while it stays
in a core's own cache than on a batch that does not fit there; and each image takes only those that it was given. Small
images whose hue is turned at the same place go together, as far as they fit: the hue takes the most operations. All this
is done on one thread: operations so short lose more to waiting for each other's threads than they gain.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from selfsup.data.blur import blurred_in_tiles, reaches
from selfsup.data.colour import luma, turn_hue
from selfsup.data.threads import one_thread
from selfsup.data.views import COLUMN, LIGHT, ORDERS

_VALUES = 100_000
"""Of the images that go together, if they are more than one: float32, a good part of a core's cache."""

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _NEVER = range(5)
_PLACES = np.array(ORDERS)


@one_thread()
def few_at_a_time(crops: Tensor, p: np.ndarray, scale: np.ndarray, shift: np.ndarray, dtype: torch.dtype) -> Tensor:
    """uint8 [N,C,S,S] and their parameters [N,P] -> (levels + light) * scale [C] + shift [C], as `dtype` [N,C,S,S].

    What becomes of an image does not depend on those it goes together with.
    """
    channels = crops.shape[1]
    scales = torch.from_numpy(scale)[:, None, None]  # [C,1,1]
    added = torch.from_numpy(shifts(p, scale, shift))[:, :, None, None]  # [N,C,1,1]
    out = torch.empty(crops.shape, dtype=dtype)
    for rows, turned, gray in _groups(p, channels, max(1, _VALUES // crops.shape[1:].numel())):
        few = p[rows]
        x = torch.empty((len(rows), *crops.shape[1:]))  # [M,C,S,S]
        for image, row in zip(x, rows, strict=True):
            image.copy_(crops[row])
        _blend(x, few, range(turned))
        if turned != _NEVER:
            x = turn_hue(x, torch.from_numpy(few[:, COLUMN["hue"]])[:, None, None, None])
        _blend(x, few, range(turned + 1, _NEVER))
        if gray:
            x = luma(x)  # one channel from here on
        x = _blur(x, few[:, COLUMN["sigma"]])
        for image, limit in zip(x, few[:, COLUMN["solarize"]].tolist(), strict=True):
            if limit >= 0:  # image + (image >= limit) * (255 - 2 * image)
                image.add_(torch.ge(image, limit, out=torch.empty_like(image)).mul_((image * -2).add_(255)))
        for image, row in zip(x, rows, strict=True):
            out[row].copy_((image * scales).add_(added[row]))
    return out


def shifts(p: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """float32 [N,C]: shift [C] of each row of parameters, with its light, which three channels alone have."""
    light = p[:, LIGHT] if len(shift) == 3 else np.zeros((len(p), 1), np.float32)
    return shift + light * scale


def _groups(p: np.ndarray, channels: int, most: int) -> Iterator[tuple[list[int], int, bool]]:
    """At most `most` rows of p, at which of the four places their hue is turned (4: at none), and whether they get grey."""
    order = p[:, COLUMN["order"]].astype(np.int64)
    turned = np.argmax(_PLACES[order] == _HUE, axis=1)
    turned[(order < 0) | (p[:, COLUMN["hue"]] == 0) | (channels != 3)] = _NEVER
    gray = (p[:, COLUMN["gray"]] > 0) & (channels == 3)
    for kind in np.unique(2 * turned + gray).tolist():
        rows = np.flatnonzero(2 * turned + gray == kind).tolist()
        for start in range(0, len(rows), most):
            yield rows[start : start + most], kind // 2, bool(kind % 2)


def _blend(x: Tensor, p: np.ndarray, places: range) -> None:
    """Brightness, contrast and saturation where they are at one of `places`, in place of [M,C,S,S] with parameters [M,P].

    PIL's ImageEnhance: factor * x + (1 - factor) * (black, the mean grey level, or grey), cut to levels.
    """
    colour = x.shape[1] == 3
    factors = p[:, COLUMN["brightness"] : COLUMN["hue"] + 1]
    rests = 1 - factors
    for i, order in enumerate(p[:, COLUMN["order"]].astype(int).tolist()):
        for op in [ORDERS[order][place] for place in places] if order >= 0 else ():
            if factors[i, op] == 1 or op == _HUE or (op == _SATURATION and not colour):
                continue
            image = x[i : i + 1]
            other: Tensor | None = None
            if op != _BRIGHTNESS:
                other = luma(image) if colour else image
            if op == _CONTRAST and other is not None:
                other = other.mean(dim=(2, 3), keepdim=True).add_(0.5).floor_()  # of each channel, or of the grey
            image.mul_(float(factors[i, op]))
            if other is not None:
                image.add_(other, alpha=float(rests[i, op]))
            image.clamp_(0, 255).floor_()


def _blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Those of [M,C,S,S] whose sigma [M] is not 0, a kind of matrices at a time."""
    reach = np.where(sigma > 0, reaches(sigma), 0)
    for kind in np.unique(reach[reach > 0]).tolist():
        rows = np.flatnonzero(reach == kind)
        if rows.size == len(x):
            return blurred_in_tiles(x, sigma, kind)
        index = torch.from_numpy(rows)
        x.index_copy_(0, index, blurred_in_tiles(x.index_select(0, index), sigma[rows], kind))
    return x
