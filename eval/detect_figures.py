"""Figures of a detector: COCO's average precision by torchmetrics, and its interval by a bootstrap over images.

Average precision is the mean over IoU thresholds 0.5, 0.55, ... 0.95, and over the classes that occur, of precision at 101
recalls, at most 100 boxes an image (Lin et al., 2014, and their code, pycocotools). Small objects are those of less than 32^2
pixels, large ones those of more than 96^2, by the area of the object.

torchmetrics does not say what each image adds. `matches` finds it again by the same rules, so that a bootstrap only sums: it
agrees with pycocotools to rounding (tested).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup.errors import UserError
from selfsup.randomness import generator

from .detect_data import Picture

Found = dict[str, Tensor]
"""boxes [N, 4], scores [N], labels [N] of an image, best first."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0, 1, 101)
_MOST = 100
_BOOTSTRAP, _RESAMPLES = 0xB0075, 200


def check_installed() -> str:
    """What counts, for the protocol. Raises UserError if it is not there, before anything is trained."""
    from importlib import metadata

    try:
        import pycocotools.cocoeval  # noqa: F401
    except ImportError:
        raise UserError("eval detect needs pycocotools for its figures: pip install 'selfsup[detect]'") from None
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torchmetrics", "pycocotools"))


def precision(
    found: Sequence[Found], truth: Sequence[Picture], names: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """({"map", "map50", "map75", "map_small", ..., "mar100"}, a row a class): fractions of 1, without what no object asks for."""
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(
        box_format="xyxy", class_metrics=True, extended_summary=True, backend="pycocotools",
        iou_thresholds=THRESHOLDS.tolist(), rec_thresholds=_RECALLS.tolist(),  # its own are rounded to float32: 0.05 points off
    )  # fmt: skip
    metric.warn_on_many_detections = False
    for boxes, picture in zip(found, truth):
        wanted = {
            "boxes": torch.from_numpy(picture.boxes), "labels": torch.from_numpy(picture.labels),
            "iscrowd": torch.from_numpy(picture.ignored.astype(np.int64)), "area": torch.from_numpy(picture.areas),
        }  # fmt: skip
        metric.update([boxes], [wanted])
    out = metric.compute()
    keys = {
        "map": "map", "map_50": "map50", "map_75": "map75", "map_small": "map_small", "map_medium": "map_medium",
        "map_large": "map_large", "mar_100": "mar100",
    }  # fmt: skip
    figures = {ours: float(out[key]) for key, ours in keys.items() if float(out[key]) >= 0}
    table = out["precision"].numpy()[:, :, :, 0, -1]  # [T, R, classes that were seen]
    seen = [int(k) for k in out["classes"].reshape(-1)]
    counts = np.bincount(np.concatenate([p.labels[~p.ignored] for p in truth]), minlength=len(names))
    rows = []
    for k, name in enumerate(names):
        own = table[:, :, seen.index(k)] if k in seen else np.full(table.shape[:2], -1.0)
        there = bool((own >= 0).any())
        ap = {"map": own, "map50": own[0], "map75": own[5]}
        rows.append(
            {"class": name, "objects": int(counts[k])}
            | {key: float(v.mean()) if there else None for key, v in ap.items()}
        )
    return figures, rows


# --------------------------------------------------------------------------------------------------------------- interval


@dataclass
class Matches:
    """Detections of one class over all images, best first."""

    image: np.ndarray
    """int64 [D]: where each was found."""
    right: np.ndarray
    """bool [T, D]: matched with an object at each threshold."""
    void: np.ndarray
    """bool [T, D]: matched with an ignored one, and so not counted."""
    objects: np.ndarray
    """int64 [N]: objects of each image that count."""


def matches(found: Sequence[Found], truth: Sequence[Picture], classes: int) -> list[Matches]:
    """Of each class: pycocotools' matching, greedy by score, one detection an object but for ignored ones."""
    rows: list[list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]] = [[] for _ in range(classes)]
    objects = np.zeros((classes, len(truth)), np.int64)
    for i, (boxes, picture) in enumerate(zip(found, truth)):
        kinds = boxes["labels"].numpy()
        for k in set(kinds.tolist()) | set(picture.labels.tolist()):
            mine, own = picture.labels == k, np.flatnonzero(kinds == k)[:_MOST]
            objects[k, i] = (mine & ~picture.ignored).sum()
            if len(own):
                right, void = _matched(boxes["boxes"][own], picture.boxes[mine], picture.ignored[mine])
                rows[k].append((boxes["scores"].numpy()[own], right, void, i))
    out = []
    for k in range(classes):
        scores = np.concatenate([r[0] for r in rows[k]]) if rows[k] else np.zeros(0)
        order = np.argsort(-scores, kind="stable")
        image = np.concatenate([np.full(len(r[0]), r[3]) for r in rows[k]] or [np.zeros(0, np.int64)])
        blank = np.zeros((len(THRESHOLDS), 0), bool)
        right, void = (np.concatenate([r[c] for r in rows[k]] or [blank], axis=1)[:, order] for c in (1, 2))
        out.append(Matches(image[order], right, void, objects[k]))
    return out


def _matched(boxes: Tensor, truth: np.ndarray, ignored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(right, void), bool [T, D]. The overlap with an ignored object is the part of the detection inside it."""
    right, void = (np.zeros((len(THRESHOLDS), len(boxes)), bool) for _ in range(2))
    if not len(truth):
        return right, void
    order = np.argsort(ignored, kind="stable")  # those that count first
    truth, ignored = truth[order], ignored[order]
    overlap = _overlap(boxes.numpy().astype(float), truth.astype(float), ignored)
    for t, least in enumerate(THRESHOLDS):
        free = np.ones(len(truth), bool)
        for d in range(len(boxes)):
            best, at = min(least, 1 - 1e-10), -1
            for g in range(len(truth)):
                if (not free[g] and not ignored[g]) or overlap[d, g] < best:
                    continue
                if at >= 0 and not ignored[at] and ignored[g]:
                    break  # what counts goes before what does not
                best, at = overlap[d, g], g
            if at >= 0:
                free[at] = False
                (void if ignored[at] else right)[t, d] = True
    return right, void


def _overlap(boxes: np.ndarray, truth: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    low = np.maximum(boxes[:, None, :2], truth[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], truth[None, :, 2:])
    both = (high - low).clip(0).prod(-1)
    own, other = ((b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, truth))
    union = np.where(ignored[None], own[:, None], own[:, None] + other[None] - both)
    return both / np.maximum(union, 1e-12)


def mean_precision(found: Sequence[Matches], weights: np.ndarray | None = None) -> np.ndarray:
    """[T]: mean AP over the classes that occur, images counted `weights` [N] times."""
    each = [_average(m, weights) for m in found]
    there = [a for a in each if a is not None]
    return np.mean(there, axis=0) if there else np.zeros(len(THRESHOLDS))


def _average(m: Matches, weights: np.ndarray | None) -> np.ndarray | None:
    times = np.ones(len(m.objects)) if weights is None else weights
    total = float((times * m.objects).sum())
    if not total:
        return None
    own = times[m.image]  # [D]
    right = np.cumsum(m.right * own, 1)
    wrong = np.cumsum(~(m.right | m.void) * own, 1)
    recall = right / total
    share = right / np.maximum(right + wrong, np.spacing(1))
    share = np.maximum.accumulate(share[:, ::-1], axis=1)[:, ::-1]
    out = np.zeros(len(THRESHOLDS))
    for t in range(len(THRESHOLDS)):
        at = np.searchsorted(recall[t], _RECALLS, side="left")
        inside = at < recall.shape[1]
        out[t] = share[t][at[inside]].sum() / len(_RECALLS)
    return out


def interval(found: Sequence[Matches], seed: int = 0) -> dict[str, list[float]]:
    """95 % percentile bootstrap intervals over images: {"map_interval_95", "map50_interval_95"}."""
    count = len(found[0].objects)
    draws = generator(_BOOTSTRAP, seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES).astype(float)
    values = np.stack([mean_precision(found, weights) for weights in draws])  # [R, T]
    columns = {"map_interval_95": values.mean(1), "map50_interval_95": values[:, 0]}
    return {key: [round(float(v), 4) for v in np.percentile(column, (2.5, 97.5))] for key, column in columns.items()}
