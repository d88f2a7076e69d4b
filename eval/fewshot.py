"""`selfsup eval fewshot`: top-1 with 1, 5, 10 labelled images of each class, over many choices of them.

The classifier has nothing to tune: features are centred by the mean of all training images, scaled to length 1, and the nearest
mean of a class wins (Wang et al., 2019, "SimpleShot", CL2N; the mean needs no labels).
"""

from pathlib import Path
from typing import Any

import numpy as np

from selfsup import dist
from selfsup.randomness import generator

from . import results
from .labelled import labelled_features
from .settings import resolve
from .settings_scores import FewshotSettings

_CHOICE = 0xFE5  # keeps these draws apart from other uses of the same seed


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Print the result, write it to `out` or RUN/eval/fewshot.json."""
    settings = resolve("fewshot", overrides)
    assert isinstance(settings, FewshotSettings)
    found = labelled_features(target, settings, out)
    if not dist.is_main():
        return {}
    bank, labels, queries, truth = found.arrays()
    mean = bank.mean(axis=0, dtype=np.float64)
    bank, queries = unit(bank - mean), unit(queries - mean)
    table, metrics = [], {}
    for shots in settings.shots:
        scores = [
            episode(
                bank, labels, queries, truth, chosen_rows(labels, shots, generator(_CHOICE, settings.seed, shots, i))
            )
            for i in range(settings.repeats)
        ]
        average, half = mean_and_half(np.array(scores))
        table.append({"shots": shots, "top1": average, "low_top1": average - half, "high_top1": average + half})
        metrics[f"top1_{shots}shot"] = average
    smallest = int(np.bincount(labels)[np.unique(labels)].min())
    protocol = {
        "classifier": "nearest class mean of centred features of length 1 (SimpleShot, CL2N)",
        "shots": list(settings.shots),
        "repeats": settings.repeats,
        "interval": "95 % of the mean over the repeats, by Student's t",
        **found.protocol(settings.seed),
    }
    if smallest < max(settings.shots):
        protocol["note"] = f"a class has only {smallest} training images: of such a class all are used"
    result = results.result("fewshot", found.target, metrics, protocol, table)
    results.save(result, found.target, out)
    results.show(result, out)
    return result


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def chosen_rows(labels: np.ndarray, shots: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of `shots` images of every class, or all of a class that has fewer."""
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in np.unique(labels)])


def episode(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray, rows: np.ndarray) -> float:
    """Top-1 of the nearest class mean; classes that the rows do not hold are never right."""
    present = np.unique(labels[rows])
    means = np.stack([bank[rows][labels[rows] == c].mean(axis=0) for c in present])
    # |q - m|^2 without |q|^2, which is the same for all
    return float((present[(np.square(means).sum(axis=1) - 2 * queries @ means.T).argmin(axis=1)] == truth).mean())


def mean_and_half(scores: np.ndarray) -> tuple[float, float]:
    """(mean, half the width of its 95 % interval) of scores [N >= 2]."""
    from scipy.stats import t

    return float(scores.mean()), float(t.ppf(0.975, len(scores) - 1) * scores.std(ddof=1) / np.sqrt(len(scores)))
