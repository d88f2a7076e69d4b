"""Which classes are taken for which: the matrix as a picture, and its worst cells."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .canvas import INK, MUTED, new_figure, save
from .class_figures import class_name

LARGEST = 100
"""Classes; a larger matrix is no picture."""

_WITH_NUMBERS = 20  # with more classes than this the cells are too small for their numbers


def matrix(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 [classes, classes]: images of class (row) taken for class (column). labels, predicted: int64 [N]."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def worst(
    labels: np.ndarray, predicted: np.ndarray, names: Sequence[str] | None, count: int = 10
) -> list[dict[str, Any]]:
    """The most frequent confusions: {"true", "predicted", "count", "share"}; share: of the images of the true class."""
    wrong = labels != predicted
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]], 1), axis=0, return_counts=True)  # [P, 2], [P]
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -counts))[:count]
    return [
        {
            "true": class_name(names, int(pairs[i, 0])),
            "predicted": class_name(names, int(pairs[i, 1])),
            "count": int(counts[i]),
            "share": float(counts[i] / (labels == pairs[i, 0]).sum()),
        }
        for i in order
    ]


def draw(counts: np.ndarray, names: Sequence[str] | None, title: str, path: Path) -> Path:
    """The matrix with rows that sum to 1, darker for more; counts: int64 [K, K], K at most LARGEST."""
    classes = len(counts)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(12.0, 3.2 + 0.45 * classes)
    figure = new_figure(side + 0.6, side)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    shown = [class_name(names, i) for i in range(classes)]
    size = 9 if classes <= _WITH_NUMBERS else max(3, 9 - classes // 16)
    axes.set_xticks(range(classes), shown, rotation=90, fontsize=size)
    axes.set_yticks(range(classes), shown, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", color=MUTED)
    axes.set_ylabel("true", color=MUTED)
    if classes <= _WITH_NUMBERS:
        for row, column in np.argwhere(counts > 0).tolist():
            colour = "white" if share[row, column] > 0.5 else INK
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, path)
