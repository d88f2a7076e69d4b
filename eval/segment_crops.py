"""The crops of images and masks that a segmentation head is trained on."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from selfsup.data.sampler import Order
from selfsup.randomness import generator

from .segment_data import IGNORE, Reader
from .segment_layouts import Pairs
from .segment_settings import SegmentSettings

_AUGMENT = 0xA06E47


def crop(
    pixels: np.ndarray,
    mask: np.ndarray,
    size: int,
    ratio: float,
    place: tuple[float, float],
    flip: bool,
    fill: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A square of `size` of an image whose shorter side was made `size * ratio`, mirrored if `flip`, and the same of its mask.

    pixels: uint8 [H, W, C]; mask: int16 [H, W]; place: of the square, from 0 (top, left) to 1. Where the image does not reach
    there is `fill` [C] and IGNORE. Images are resampled bilinearly with antialiasing (PIL), masks take the nearest.
    """
    height, width = mask.shape
    scale = size * ratio / min(height, width)
    new = max(1, round(height * scale)), max(1, round(width * scale))
    big = resized(pixels, new)
    rows, columns = (np.minimum((np.arange(n) + 0.5) * o / n, o - 1).astype(int) for n, o in zip(new, (height, width)))
    tops = [round(p * (n - size)) if n > size else 0 for p, n in zip(place, new)]
    part = np.s_[tops[0] : tops[0] + size], np.s_[tops[1] : tops[1] + size]
    small, ids = big[part], mask[np.ix_(rows[part[0]], columns[part[1]])]
    image = np.empty((size, size, pixels.shape[2]), np.uint8)
    image[:] = fill
    out = np.full((size, size), IGNORE, np.int16)
    image[: small.shape[0], : small.shape[1]] = small
    out[: ids.shape[0], : ids.shape[1]] = ids
    return (image[:, ::-1].copy(), out[:, ::-1].copy()) if flip else (image, out)


def resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, C] -> [*size, C], bilinear with antialiasing."""
    if pixels.shape[:2] == size:
        return pixels
    planes = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    if pixels.shape[2] in (1, 3, 4):
        out = np.asarray(Image.fromarray(np.ascontiguousarray(planes)).resize(size[::-1], Image.Resampling.BILINEAR))
        return out[:, :, None] if out.ndim == 2 else out
    stacked = [resized(pixels[..., c : c + 1], size) for c in range(pixels.shape[2])]
    return np.concatenate(stacked, axis=2)


class Crops(Dataset[Any]):
    """Item k is the batch of step k: uint8 [B, S, S, C], int16 [B, S, S]; drawn from (seed, step, sample) alone."""

    def __init__(self, pairs: Pairs, reader: Reader, settings: SegmentSettings, size: int, fill: np.ndarray) -> None:
        self.pairs, self.reader, self.settings = pairs, reader, settings
        self.size, self.fill = size, fill
        self.batch = settings.batch
        self.order = Order(len(pairs), settings.seed)

    def numbers(self, step: int) -> np.ndarray:
        """Which images step `step` is made of: int64 [B], each epoch a shuffle of all."""
        return self.order.at(step * self.batch + np.arange(self.batch))[1]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        made = [self.one(step, int(i), position) for position, i in enumerate(self.numbers(step))]
        return torch.from_numpy(np.stack([m[0] for m in made])), torch.from_numpy(np.stack([m[1] for m in made]))

    def one(self, step: int, index: int, position: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Image `index` as step `step` sees it; position: tells the same image apart, twice in a step of a tiny set."""
        pixels, mask = self.reader.pair(self.pairs.images[index], self.pairs.masks[index])
        ratio, place, flip = 1.0, (0.5, 0.5), False
        if self.settings.augment:
            u = generator(_AUGMENT, self.settings.seed, step, index, position).random(4)
            low, high = np.log(self.settings.scale)
            ratio, place = float(np.exp(low + (high - low) * u[0])), (float(u[1]), float(u[2]))
            flip = bool(u[3] < self.settings.flip)
        return crop(pixels, mask, self.size, ratio, place, flip, self.fill)
