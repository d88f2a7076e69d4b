"""Which patches of an image are hidden: random and blockwise masks.

Drawn on the host for a whole micro-batch at once, each a pure function of (seed, step, place in the global batch, view),
so that counts are known without asking the device, and neither ranks nor micro-batches change what is drawn.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfsup.data.sampler import Order
from selfsup.data.views import uniforms
from selfsup.randomness import mix

_ATTEMPTS = 32
_TAG, _RATIO, _RANDOM, _BLOCK, _ORDER = 0x3A5C, 1, 2, 3, 4


@dataclass(frozen=True)
class Masks:
    """Masked tokens of N images of T tokens; M masked ones in all. On the device but for `counts`."""

    masked: Tensor
    """bool [N, T]."""
    index: Tensor
    """int64 [M]: the masked tokens in the flattened [N * T], ascending."""
    weights: Tensor
    """float64 [M]: one by the number of masked tokens of its image."""
    counts: np.ndarray
    """int64 [N], on the host."""

    @property
    def total(self) -> int:
        """M."""
        return self.index.shape[0]

    @classmethod
    def of(cls, masked: np.ndarray, device: torch.device) -> "Masks":
        """From bool [N, T]."""
        counts = masked.sum(1, dtype=np.int64)
        weights = np.repeat(1 / np.maximum(counts, 1), counts)
        return cls(
            to_device(masked, device), to_device(np.flatnonzero(masked), device), to_device(weights, device), counts
        )


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy there, which the host does not wait for."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def draws(seed: int, step: int, places: np.ndarray, view: int, count: int, purpose: int) -> np.ndarray:
    """float64 [B, count] in [0, 1) for what the number `purpose` stands for; none of it is what augmentation draws."""
    return uniforms(mix(seed, _TAG, purpose), np.full(len(places), step), places, view, count)


def ratios(
    seed: int,
    step: int,
    places: np.ndarray,
    view: int,
    *,
    tokens: int,
    probability: float,
    low: float,
    high: float,
    slots: int | None = None,
    first: int = 0,
) -> np.ndarray:
    """How many of its tokens each image has masked, int64 [B]: none, or with `probability` a share in [low, high].

    slots: the number of images of the step that share the draw. Then exactly `probability` of them (rounded down) are
    masked, and their ratios are spread evenly, one in each of as many parts of [low, high], as in DINOv2's code
    (facebookresearch/dinov2, data/collate.py); this image is number first + place among them. None: each for itself.
    """
    u = draws(seed, step, places, view, 2, _RATIO)  # [B, 2]
    if slots is None:
        chosen, share = u[:, 0] < probability, u[:, 1]
    else:
        _, slot = Order(slots, mix(seed, _TAG, _ORDER, step)).at(first + places)  # [B], a permutation of the step
        used = int(slots * probability)
        chosen, share = slot < used, (slot + u[:, 1]) / max(1, used)
    counts = np.rint((low + share * (high - low)) * tokens).astype(np.int64)
    return np.where(chosen, np.clip(counts, 0, tokens), 0)


def random_masks(seed: int, step: int, places: np.ndarray, view: int, *, tokens: int, count: int) -> np.ndarray:
    """bool [B, tokens] with exactly `count` masked in each row, every choice as likely as any other."""
    order = np.argsort(draws(seed, step, places, view, tokens, _RANDOM), axis=1, kind="stable")  # [B, T]
    masked = np.zeros(order.shape, dtype=bool)
    np.put_along_axis(masked, order[:, :count], True, axis=1)
    return masked


def magnified(masked: np.ndarray, grid: tuple[int, int], factor: int) -> np.ndarray:
    """Masks [B, h*w] of units on a grid (h, w) as masks [B, (h*factor) * (w*factor)] of what they consist of."""
    units = masked.reshape(-1, *grid)  # [B, h, w]
    return units.repeat(factor, axis=1).repeat(factor, axis=2).reshape(len(masked), -1)


def block_masks(
    seed: int,
    step: int,
    places: np.ndarray,
    view: int,
    *,
    grid: tuple[int, int],
    counts: np.ndarray,
    least: int = 4,
    largest: float = 0.5,
    aspect: float = 0.3,
) -> np.ndarray:
    """bool [B, h*w] with exactly counts[b] masked: rectangles, then single tokens for what is left.

    Blockwise masking of BEiT (Bao et al., 2022, algorithm 1): rectangles of an area uniform between `least` tokens and
    what is still to be masked (at most `largest` of the image), of an aspect ratio log-uniform in [aspect, 1/aspect], are
    added where they fit, may overlap, and mask no more than there is to. BEiT's code tries ten rectangles for each that it
    adds and may end with fewer tokens than asked for; here 32 are tried in all and the rest is drawn token by token.
    """
    (height, width), batch = grid, len(places)
    u = draws(seed, step, places, view, 4 * _ATTEMPTS + height * width, _BLOCK)
    rectangles, singles = u[:, : 4 * _ATTEMPTS].reshape(batch, _ATTEMPTS, 4), u[:, 4 * _ATTEMPTS :]
    rows, columns = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
    masked = np.zeros((batch, height, width), dtype=bool)
    left = np.asarray(counts, dtype=np.int64).copy()  # [B], still to be masked
    cap = max(1.0, largest * height * width)
    for attempt in range(_ATTEMPTS):
        area, shape, down, right = rectangles[:, attempt].T  # [B] each
        most = np.minimum(left, cap)
        smallest = np.minimum(least, most)
        area = smallest + area * (most - smallest)
        ratio = np.exp((2 * shape - 1) * np.log(1 / aspect))
        h, w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        top, start = np.floor(down * (height - h + 1)), np.floor(right * (width - w + 1))
        inside = (rows >= top[:, None, None]) & (rows < (top + h)[:, None, None])  # [B, height, 1]
        box = inside & (columns >= start[:, None, None]) & (columns < (start + w)[:, None, None])  # [B, height, width]
        added = (box & ~masked).sum((1, 2))
        good = (h <= height) & (w <= width) & (added <= left)
        masked |= box & good[:, None, None]
        left -= np.where(good, added, 0)
    flat = masked.reshape(batch, -1)  # [B, h*w]
    order = np.argsort(singles + flat, axis=1, kind="stable")  # those masked already come last
    rest = np.arange(height * width) < left[:, None]  # [B, h*w], by rank
    more = np.zeros_like(flat)
    np.put_along_axis(more, order, rest, axis=1)
    return flat | more
