"""Figures of a classifier: top-1, top-5, calibration, accuracy of each class."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Answers(NamedTuple):
    """What a classifier says of N images: float64 [N] each, on the CPU."""

    predicted: Tensor
    """The class."""
    place: Tensor
    """Classes that are thought likelier than the true one; 0: right."""
    confidence: Tensor
    """Probability of the predicted class."""
    readable: Tensor
    """1; 0 for an image that could not be read, whose other figures mean nothing."""


def figures(answers: Answers, labels: np.ndarray, classes: int, bins: int = 15) -> dict[str, float]:
    """top1, top5 (with more than 5 classes) and ece, as fractions of 1; labels: int64 [N]."""
    seen = answers.readable > 0
    place = answers.place[seen]
    out = {"top1": (place == 0).double().mean().item()}
    if classes > 5:
        out["top5"] = (place < 5).double().mean().item()
    right = answers.predicted[seen] == torch.from_numpy(labels)[seen]
    out["ece"] = calibration_error(answers.confidence[seen], right, bins)
    return out


def calibration_error(confidence: Tensor, right: Tensor, bins: int) -> float:
    """Expected calibration error (Guo et al., 2017, equation 3): mean |accuracy - confidence| over bins of equal width.

    confidence [N] in [0, 1], of the predicted class; right [N], bool. With these two torchmetrics' binary form is its
    multi-class form (`MulticlassCalibrationError`, norm l1).
    """
    from torchmetrics.functional.classification import binary_calibration_error

    return float(binary_calibration_error(confidence.clamp(0, 1), right.long(), n_bins=bins, norm="l1"))


def per_class(
    labels: np.ndarray, predicted: np.ndarray, classes: int, names: Sequence[str] | None
) -> list[dict[str, Any]]:
    """For each class {"class", "images", "top1"}; top1 is None for a class without val images."""
    images = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[labels == predicted], minlength=classes)
    return [
        {
            "class": class_name(names, i),
            "images": int(images[i]),
            "top1": float(right[i] / images[i]) if images[i] else None,
        }
        for i in range(classes)
    ]


def class_name(names: Sequence[str] | None, label: int) -> str:
    """'7_sneaker' -> 'sneaker' where all names are numbered so."""
    if names is None or label >= len(names):
        return str(label)
    if all(re.match(r"\d+[_-]\D", name) for name in names):
        return re.sub(r"^\d+[_-]", "", names[label])
    return names[label]
