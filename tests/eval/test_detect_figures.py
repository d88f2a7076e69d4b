"""Average precision against pycocotools, which torchmetrics calls; the interval's sums are the same figures."""

from pathlib import Path

import numpy as np
import pytest
import torch

from selfsup.eval.detect_data import Picture
from selfsup.eval.detect_figures import interval, matches, mean_precision, precision


def random_set(seed: int, images: int = 12, classes: int = 3) -> tuple[list[dict], list[Picture]]:
    """Boxes of all sizes, some ignored; detections near them, doubled, of other classes and of nothing."""
    rng = np.random.default_rng(seed)
    found, truth = [], []
    for i in range(images):
        n = int(rng.integers(0, 5))
        corner, side = rng.uniform(0, 150, (n, 2)), rng.uniform(8, 140, (n, 2))
        boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
        labels = rng.integers(0, classes - (i % 2), n)
        ignored = rng.random(n) < 0.2
        areas = side.prod(1).astype(np.float32) * (0.6 if i % 3 else 1.0)
        truth.append(Picture(Path(f"{i}"), (300, 300), boxes, labels, ignored, areas.astype(np.float32)))
        near = np.repeat(boxes, 2, axis=0) + rng.normal(0, 6, (2 * n, 4))
        corner = rng.uniform(0, 200, (3, 2))
        near = np.concatenate([near, np.concatenate([corner, corner + 40], 1)])
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        kinds = np.concatenate([np.repeat(labels, 2), rng.integers(0, classes, 3)])
        kinds = np.where(rng.random(len(kinds)) < 0.15, 0, kinds)
        scores = np.sort(rng.random(len(kinds)).round(1 if i % 2 else 4))[::-1].copy()  # ties as well
        mixed = rng.permutation(len(kinds))
        found.append(
            {
                "boxes": torch.tensor(near[mixed], dtype=torch.float32),
                "scores": torch.tensor(scores, dtype=torch.float32),
                "labels": torch.tensor(kinds[mixed], dtype=torch.int64),
            }
        )
    return found, truth


@pytest.mark.parametrize("seed", range(4))
def test_own_sums_are_those_of_pycocotools(seed: int):
    found, truth = random_set(seed)
    figures, rows = precision(found, truth, ["a", "b", "c"])
    own = mean_precision(matches(found, truth, 3))
    assert 0.1 < figures["map"] < 0.9
    assert own.mean() == pytest.approx(figures["map"], abs=1e-5)
    assert (own[0], own[5]) == pytest.approx((figures["map50"], figures["map75"]), abs=1e-5)
    assert np.mean([r["map"] for r in rows if r["map"] is not None]) == pytest.approx(figures["map"], abs=1e-5)
    assert sum(r["objects"] for r in rows) == sum((~p.ignored).sum() for p in truth)
    twice = mean_precision(matches(found + found, truth + truth, 3))
    weighted = mean_precision(matches(found, truth, 3), np.full(len(truth), 2.0))
    assert np.abs(twice - weighted).max() < 0.02  # ties in the scores may fall otherwise


def test_interval_holds_the_figure():
    found, truth = random_set(5, 30)
    figures, _ = precision(found, truth, ["a", "b", "c"])
    spans = interval(matches(found, truth, 3))
    assert spans == interval(matches(found, truth, 3))
    for key in ("map", "map50"):
        low, high = spans[f"{key}_interval_95"]
        assert low < figures[key] < high and 0.02 < high - low < 0.6


def test_perfect_and_nothing():
    _, truth = random_set(7)
    truth = [Picture(p.path, p.size, p.boxes, p.labels, np.zeros(len(p.labels), bool), p.areas) for p in truth]
    sure = [
        {"boxes": torch.tensor(p.boxes), "scores": torch.ones(len(p.labels)), "labels": torch.tensor(p.labels)}
        for p in truth
    ]
    names = ["a", "b", "c", "never"]
    figures, rows = precision(sure, truth, names)
    assert figures["map"] == figures["map75"] == 1.0 and rows[3] == {
        "class": "never", "objects": 0, "map": None, "map50": None, "map75": None,
    }  # fmt: skip
    none = [{"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0).long()} for _ in truth]
    assert precision(none, truth, names)[0]["map"] == 0.0
    assert interval(matches(none, truth, 4))["map_interval_95"] == [0.0, 0.0]
