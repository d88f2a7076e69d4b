"""Figures of a segmentation of volumes: Dice and IoU of each class, the distance between surfaces; slices to look at."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from selfsup.losses.segmentation import IGNORE

Row = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of a sheet: pixels uint8 [H, W, C], truth and prediction [H, W]."""


def counts(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """int64 [3, K]: voxels of each class in both, in the truth, in the prediction; ignored ones are in none."""
    known = truth != IGNORE
    t, p = truth[known], predicted[known]
    return np.stack([np.bincount(x, minlength=classes)[:classes] for x in (t[t == p], t, p)])


def dice(counted: np.ndarray) -> np.ndarray:
    """[..., 3, K] -> [..., K]; NaN for a class that is neither in the truth nor in the prediction."""
    both, truth, found = (counted[..., i, :].astype(float) for i in range(3))
    with np.errstate(invalid="ignore", divide="ignore"):
        return 2 * both / (truth + found)


def mean(values: np.ndarray) -> float:
    """Over those that are known; 0 if none is."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else 0.0


def figures(counted: np.ndarray) -> dict[str, float]:
    """counted: [N, 3, K]. dice: of the classes other than 0, a mean over volumes, then over classes; miou: of all classes, of
    the voxels of all volumes together; voxel_accuracy."""
    each, total = dice(counted), counted.sum(0)
    both, truth, found = total.astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = both / (truth + found - both)
    by_class = np.array([mean(each[:, k]) for k in range(each.shape[1]) if np.isfinite(each[:, k]).any() and k > 0])
    return {"dice": mean(by_class), "miou": mean(iou), "voxel_accuracy": float(both.sum() / max(truth.sum(), 1))}


def per_class(counted: np.ndarray, names: Sequence[str], surfaces: np.ndarray | None) -> list[dict[str, Any]]:
    """For each class {"class", "voxels", "dice"[, "hausdorff95"]}: means over the volumes that have it; None where none has."""
    each, rows = dice(counted), []
    for k, name in enumerate(names):
        row: dict[str, Any] = {"class": name, "voxels": int(counted[:, 1, k].sum()), "dice": _known(each[:, k])}
        if surfaces is not None:
            row["hausdorff95"] = _known(surfaces[:, k])
        rows.append(row)
    return rows


def _known(values: np.ndarray) -> float | None:
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def hausdorff95(
    predicted: np.ndarray, truth: np.ndarray, classes: int, spacing: tuple[float, float, float] | None
) -> np.ndarray:
    """float [K]: the larger 95th percentile of the distances of one surface to the other (MONAI's), ignored voxels being of
    no class; NaN for class 0 and where a class is missing on either side."""
    import torch
    from monai.metrics import compute_hausdorff_distance

    out = np.full(classes, np.nan)
    guess = np.where(truth == IGNORE, IGNORE, predicted)
    for k in range(1, classes):
        p, t = (torch.from_numpy(x == k)[None, None] for x in (guess, truth))  # [1, 1, D, H, W]
        if bool(p.any()) and bool(t.any()):
            found = compute_hausdorff_distance(p, t, include_background=True, percentile=95, spacing=spacing)
            out[k] = float(found[0, 0])
    return out


def slices(volume: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> list[Row]:
    """Three slices through the middle of the classes other than 0, one across each axis, as rows of a sheet."""
    there = np.argwhere(truth > 0)
    middle = there.mean(0).astype(int) if len(there) else np.array(truth.shape) // 2
    pixels = np.rint(volume.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 3, 0)  # [D, H, W, C]
    out: list[Row] = []
    for axis in range(3):
        image, true, found = (np.ascontiguousarray(a.take(middle[axis], axis)) for a in (pixels, truth, predicted))
        out.append((image, true, found))
    return out
