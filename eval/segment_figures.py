"""Figures of a segmentation: counts an image, and from them IoU, Dice, boundary IoU, and how sure they are.

Counts are whole numbers a class and image, so that a figure over any choice of images, such as a bootstrap's, is a sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.randomness import generator

from .segment_data import IGNORE

_BOOTSTRAP = 0xB0075
_RESAMPLES = 2000


@dataclass
class Counts:
    """int64 [N, K] each: pixels of N images by class; those that are ignored are in none."""

    both: np.ndarray
    """Truth and prediction agree on the class."""
    truth: np.ndarray
    predicted: np.ndarray
    edge_both: np.ndarray
    """The same three for the pixels near the outline."""
    edge_truth: np.ndarray
    edge_predicted: np.ndarray

    def __len__(self) -> int:
        return len(self.both)

    @classmethod
    def stacked(cls, rows: Sequence[Sequence[np.ndarray]]) -> "Counts":
        """From what `count` gave for each image."""
        return cls(*(np.stack(column) for column in zip(*rows)))


def count(predicted: Tensor, truth: Tensor, classes: int, width: float) -> list[np.ndarray]:
    """The six rows of `Counts` of one image. predicted, truth: int64 [H, W]; width: as `boundary_pixels` takes it."""
    known = truth != IGNORE
    guess = torch.where(known, predicted, torch.full_like(predicted, IGNORE))
    distance = boundary_pixels(truth.shape[-2], truth.shape[-1], width)
    near = [torch.where(inner_boundary(x, distance) & known, x, torch.full_like(x, IGNORE)) for x in (truth, guess)]
    out = []
    for t, g in ((truth, guess), (near[0], near[1])):
        agree = torch.where(t == g, t, torch.full_like(t, IGNORE))
        out += [_bins(x, classes) for x in (agree, t, g)]
    return out


def _bins(x: Tensor, classes: int) -> np.ndarray:
    return torch.bincount(x.reshape(-1) + 1, minlength=classes + 1)[1:].cpu().numpy()


def boundary_pixels(height: int, width: int, part: float) -> int:
    """How many pixels a boundary is wide: `part` of the diagonal, at least 1 (Cheng et al., 2021, section 5)."""
    return max(1, round(part * float(np.hypot(height, width))))


def inner_boundary(ids: Tensor, distance: int) -> Tensor:
    """bool [H, W]: pixels within `distance` of another id or of the image's edge, those of every class at once.

    ids: int64 [H, W]. The part of each class's mask that `distance` erosions with a 3 x 3 square take away, the image being
    surrounded by nothing: `mask_to_boundary` of the authors' code. A pixel stays if the square of 2 distance + 1 around it
    holds one id.
    """
    x = F.pad(ids[None, None].float(), (distance,) * 4, value=-2.0)
    side = 2 * distance + 1
    high, low = x, -x
    for kernel in ((side, 1), (1, side)):
        high, low = F.max_pool2d(high, kernel, stride=1), F.max_pool2d(low, kernel, stride=1)
    return (high != -low)[0, 0]


def ratios(counts: Counts, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """{"iou", "dice", "boundary_iou", "accuracy"}: [..., K] of the images weighted by weights [..., N]; NaN for a class that is
    neither in the truth nor in the prediction."""
    rows = np.ones(len(counts)) if weights is None else weights
    both, truth, guess, near, edge_truth, edge_guess = (
        rows @ part.astype(float)
        for part in (
            counts.both, counts.truth, counts.predicted, counts.edge_both, counts.edge_truth, counts.edge_predicted,
        )
    )  # fmt: skip
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "iou": both / (truth + guess - both),
            "dice": 2 * both / (truth + guess),
            "boundary_iou": near / (edge_truth + edge_guess - near),
            "accuracy": both / truth,
        }


def figures(counts: Counts) -> dict[str, float]:
    """miou, mdice, boundary_miou (means over the classes that occur), and the accuracy of pixels, as fractions of 1."""
    found = ratios(counts)
    return {
        "miou": _mean(found["iou"]),
        "mdice": _mean(found["dice"]),
        "boundary_miou": _mean(found["boundary_iou"]),
        "pixel_accuracy": float(counts.both.sum() / counts.truth.sum()),
    }


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0


def per_class(counts: Counts, names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class {"class", "pixels", "iou", "dice", "boundary_iou", "accuracy"}; None where there is no such pixel."""
    found = ratios(counts)
    return [
        {"class": name, "pixels": int(counts.truth[:, k].sum())}
        | {key: None if np.isnan(values[k]) else float(values[k]) for key, values in found.items()}
        for k, name in enumerate(names)
    ]


def interval(counts: Counts, seed: int = 0, other: Counts | None = None) -> list[float]:
    """95 % percentile bootstrap interval over images of the mIoU; with `other` of the paired difference to it (this - other)."""
    rng = generator(_BOOTSTRAP, seed)
    draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=_RESAMPLES).astype(float)  # [R, N]
    values = [np.nanmean(ratios(c, draws)["iou"], axis=1) for c in ([counts] if other is None else [counts, other])]
    found = values[0] if other is None else values[0] - values[1]
    return [round(float(v), 4) for v in np.percentile(found, (2.5, 97.5))]
