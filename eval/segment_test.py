"""Prediction at the original size: sliding windows or the whole image, over scales and mirrored, probabilities averaged."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .segment_crops import resized

Forward = Callable[[Tensor], Tensor]
"""Normalised images [B, C, h, w] -> logits [B, K, h, w]."""
_WINDOWS = 16  # at a time


class Predictor:
    """What turns uint8 images into class numbers.

    size: of the windows, and of the shorter side at scale 1. multiple: sizes that the model takes are multiples of it.
    """

    def __init__(
        self, forward: Forward, *, mean: Sequence[float], std: Sequence[float], size: int, multiple: int, inference: str,
        scales: Sequence[float], flip: bool, device: torch.device,
    ) -> None:  # fmt: skip
        self.forward, self.size, self.multiple, self.inference = forward, size, multiple, inference
        self.scales, self.flip, self.device = tuple(scales), flip, device
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> Tensor:
        """uint8 [H, W, C] -> int64 [H, W] on the CPU."""
        height, width = pixels.shape[:2]
        total: Tensor | None = None
        for scale in self.scales:
            factor = self.size * scale / min(height, width)
            new = max(1, round(height * factor)), max(1, round(width * factor))
            x = torch.from_numpy(resized(pixels, new).copy()).to(self.device).permute(2, 0, 1).float()
            x = ((x / 255 - self.mean) / self.std)[None]
            for mirrored in (False, True) if self.flip else (False,):
                logits = self._logits(x.flip(-1) if mirrored else x)
                logits = logits.flip(-1) if mirrored else logits
                logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
                if len(self.scales) == 1 and not self.flip:
                    return logits[0].argmax(0).cpu()
                p = torch.softmax(logits[0], 0)
                total = p if total is None else total + p
        assert total is not None
        return total.argmax(0).cpu()

    def _logits(self, x: Tensor) -> Tensor:
        """[1, C, h, w] -> [1, K, h, w]: where the image is smaller than a window, or no multiple, it is filled with the mean."""
        h, w = x.shape[-2:]
        if self.inference == "whole":
            high, wide = (-(-n // self.multiple) * self.multiple for n in (h, w))
            return self.forward(F.pad(x, (0, wide - w, 0, high - h)))[..., :h, :w].float()
        side = self.size
        x = F.pad(x, (0, max(0, side - w), 0, max(0, side - h)))
        places = [(t, s) for t in _starts(x.shape[-2], side) for s in _starts(x.shape[-1], side)]
        total, seen = None, x.new_zeros(x.shape[-2:])
        for first in range(0, len(places), _WINDOWS):
            some = places[first : first + _WINDOWS]
            out = self.forward(torch.cat([x[..., t : t + side, s : s + side] for t, s in some])).float()
            if total is None:
                total = out.new_zeros(1, out.shape[1], *x.shape[-2:])
            for (t, s), one in zip(some, out):
                total[0, :, t : t + side, s : s + side] += one
                seen[t : t + side, s : s + side] += 1
        assert total is not None
        return (total / seen)[..., :h, :w]


def _starts(length: int, side: int) -> list[int]:
    """Where windows begin so that neighbours share a third at least, and the last one ends with the image."""
    step = max(1, side * 2 // 3)
    count = -(-max(0, length - side) // step) + 1
    return [min(i * step, length - side) for i in range(count)]
