"""Gaussian noise and salt and pepper, at the end of the augmentation.

The noise of a value, and whether a pixel becomes white or black, is a function of the image's own draw and of the pixel's place:
no generator is used, and the device is never waited for.
"""

import numpy as np
import torch
from torch import Tensor

from selfsup.config import Crops
from selfsup.data.rows import on_rows, send
from selfsup.randomness import keyed_normal, keyed_uniform, mix

_NORMAL, _PIXELS = mix(0x401E, 0), mix(0x401E, 1)
_KEYS = 1 << 24
_WHETHER, _HOW_MUCH, _KEY, _WHETHER_SALT, _PART, _SALT_KEY, DRAWS = range(7)
STD, KEY, PART, SALT_KEY = range(4)
"""Columns of what `drawn` gives."""


def drawn(u: np.ndarray, crops: Crops) -> np.ndarray:
    """Uniform u [B,DRAWS] -> [B,4]: standard deviation in levels and key of Gaussian noise, part of the pixels and key of
    salt and pepper; deviation or part 0: none."""
    (low, high), (least, most) = crops.noise_std, crops.salt_pepper_part
    std = (low + u[:, _HOW_MUCH] * (high - low)) * (u[:, _WHETHER] < crops.noise)
    part = (least + u[:, _PART] * (most - least)) * (u[:, _WHETHER_SALT] < crops.salt_pepper)
    key, salt_key = np.floor(u[:, _KEY] * _KEYS) * (std > 0), np.floor(u[:, _SALT_KEY] * _KEYS) * (part > 0)
    return np.stack([std, key, part, salt_key], axis=1)


def add(x: Tensor, rows: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> Tensor:
    """x [N,C,H,W] = levels * scale [C] + shift [C], which is overwritten, with rows [N,4] on the host.

    Noise is drawn for each value, and cut to 0..255 levels; salt and pepper are all channels of a pixel at 255 or at 0.
    """
    noisy, salted = (np.flatnonzero(rows[:, k] > 0) for k in (STD, PART))
    if not (noisy.size or salted.size):
        return x
    ends = np.stack([scale, shift, shift + 255 * scale]).astype(np.float32)
    step, black, white = send(ends, x.device).to(x.dtype)[:, None, :, None, None]  # [1,C,1,1] each
    values, pixels = x[0].numel(), x[0, 0].numel()

    def gauss(some: Tensor, std: Tensor, key: Tensor) -> Tensor:
        place = torch.arange(values, device=x.device).view(some.shape[1:]) + key.long() * values
        noise = keyed_normal(_NORMAL, place).to(x.dtype)
        return (some + noise * (std * step)).clamp(black, white)

    def salt(some: Tensor, part: Tensor, key: Tensor) -> Tensor:
        place = torch.arange(pixels, device=x.device).view(1, *some.shape[2:]) + key.long() * pixels
        u = keyed_uniform(_PIXELS, place)  # [M,1,H,W]
        return torch.where(u < part / 2, black, torch.where(u >= 1 - part / 2, white, some))

    x = on_rows(x, noisy, gauss, rows[:, STD], rows[:, KEY])
    return on_rows(x, salted, salt, rows[:, PART], rows[:, SALT_KEY])
