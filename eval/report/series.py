"""Curves for the page: which charts there are, and few enough points of each that a long run stays a small page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfsup.health import FEATURE_STD, INFORMATION, SLOW_DATA

from .story import Story

POINTS = 1200
"""Of a curve, at most, for one run; several share them."""
_LEAST_POINTS = 150
_MOST_EVALUATIONS = 8
_ALIKE = 20.0
"""Parts of a loss share a chart if their sizes differ by no more than this factor: else one would be a flat line."""

Data = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """Some figures over steps that share an axis."""

    title: str
    keys: tuple[tuple[str, str], ...]
    """(key of `columns.KEYS` or of an evaluation, what it is called)."""
    unit: str = ""
    factor: float = 1.0
    zero: bool = False
    """Whether the axis begins at 0."""
    level: float | None = None
    """A line to stay clear of."""
    level_means: str = ""


CHARTS = (
    Chart("Loss", (("loss", "loss"),)),
    Chart(
        "Health",
        (("health.teacher_entropy", "teacher entropy / ln K"), ("health.feature_std", "feature spread")),
        zero=True,
        level=FEATURE_STD,
        level_means="a spread below it is a collapse",
    ),
    Chart(
        "Information in the teacher's output",
        (("health.information", "information"), ("health.kl", "student-teacher KL")),
        unit="nats",
        zero=True,
        level=INFORMATION,
        level_means="information below it is a collapse",
    ),
    Chart("Learning rate", (("lr", "learning rate"),), zero=True),
    Chart("Gradient norm", (("grad_norm", "gradient norm"),), zero=True),
    Chart("Throughput", (("img_per_s", "images a second"),), unit="img/s", zero=True),
    Chart(
        "Waiting for data",
        (("data_wait", "waiting"),),
        unit="% of the time",
        factor=100.0,
        zero=True,
        level=100 * SLOW_DATA,
        level_means="above it, workers are too few",
    ),
)


def charts(stories: Sequence[Story]) -> list[dict[str, Any]]:
    """What the page's script draws: {"title", "unit", "zero", "series": [{"name", "color", "last", "x", "y"[, "lo", "hi"]}]}.

    Of one run the curves of a chart are its figures; of several each figure has a chart, and its curves are the runs.
    """
    points = max(_LEAST_POINTS, POINTS // len(stories))
    wanted = list(CHARTS)
    wanted[2:2] = _evaluations(stories)
    wanted[1:1] = _parts(stories)
    if len(stories) > 1:
        wanted = [
            Chart(_alone(each, name), ((key, name),), each.unit, each.factor, each.zero)
            for each in wanted
            for key, name in each.keys
        ]
    found = []
    for chart in wanted:
        several = len(stories) > 1
        series = []
        for place, story in enumerate(stories):
            for colour, (key, name) in enumerate(chart.keys):
                if data := thinned(*_known(story, key), points, chart.factor):
                    series.append(
                        {"name": story.name if several else name, "color": place if several else colour, **data}
                    )
        if series:
            one = {"title": chart.title, "unit": chart.unit, "zero": chart.zero, "series": series}
            if chart.level is not None:
                one |= {"level": chart.level, "levelMeans": chart.level_means}
            found.append(one)
    return found


def _alone(chart: Chart, name: str) -> str:
    return chart.title if len(chart.keys) == 1 else name[:1].upper() + name[1:]


def _evaluations(stories: Sequence[Story]) -> list[Chart]:
    """One chart of all figures that are fractions of 1, in percent; one for each of the others."""
    names = sorted({name for story in stories for name in story.curves.evaluations}, key=lambda name: (len(name), name))
    shares: list[str] = []
    others: list[str] = []
    for name in names[:_MOST_EVALUATIONS]:
        values = [v for story in stories for _, v in story.curves.evaluations.get(name, ())]
        (shares if all(0 <= v <= 1 for v in values) else others).append(name)
    found = [Chart("Evaluation", tuple((name, _called(name)) for name in shares), "%", 100.0)] if shares else []
    return found + [Chart(name, ((name, name),)) for name in others]


def _parts(stories: Sequence[Story]) -> list[Chart]:
    """Charts of the figures that a method gives beside its loss: shares of right answers in percent, and parts of a size."""
    sizes: dict[str, float] = {}
    for story in stories:
        for name, (_, values) in story.curves.parts.items():
            sizes.setdefault(name, float(np.median(np.abs(values))))
    shares = [name for name in sizes if "top1" in name or name.endswith("agreement")]
    groups: list[list[str]] = []
    for name in sizes:
        if name in shares:
            continue
        alike = (g for g in groups if len(g) < 8 and _ratio(sizes[g[0]], sizes[name]) <= _ALIKE)
        if (group := next(alike, None)) is None:
            groups.append(group := [])
        group.append(name)
    found = []
    for group in groups:
        title = "Parts of the loss" if len(group) > 1 else f"Part of the loss: {_part_name(group[0])}"
        found.append(Chart(title, tuple((f"parts.{name}", _part_name(name)) for name in group)))
    if shares:
        keys = tuple((f"parts.{name}", name.replace("_", " ")) for name in shares)
        found.append(Chart("Answers for the images of a step", keys, "%", 100.0, zero=True))
    return found


def _ratio(a: float, b: float) -> float:
    return max(a, b) / max(min(a, b), 1e-12)


def _part_name(name: str) -> str:
    return name.removeprefix("loss/").removesuffix("_loss").replace("_", " ")


def _called(name: str) -> str:
    return {"knn_top1": "k-NN top-1", "top1": "top-1", "top5": "top-5"}.get(name, name)


def _known(story: Story, key: str) -> tuple[np.ndarray, np.ndarray]:
    if key in story.curves.columns:
        return story.curves.known(key)
    if key.startswith("parts."):
        return story.curves.parts.get(key.removeprefix("parts."), (np.zeros(0, np.int64), np.zeros(0)))
    pairs = story.curves.evaluations.get(key, [])
    return np.array([step for step, _ in pairs], dtype=np.int64), np.array([value for _, value in pairs])


def thinned(steps: np.ndarray, values: np.ndarray, points: int, factor: float = 1.0) -> Data:
    """{"last", "x", "y"}; of more than `points`, the means of as many pieces, with the least and the largest as "lo" and "hi".

    So a single step that spikes is still seen. {} for no values. Values have five digits.
    """
    if not len(values):
        return {}
    values = values * factor
    last = _digits(values[-1:])[0]
    if len(values) <= points:
        return {"last": last, "x": steps.tolist(), "y": _digits(values)}
    starts = np.linspace(0, len(values), points, endpoint=False).astype(np.int64)
    counts = np.diff(np.append(starts, len(values)))
    return {
        "last": last,
        "x": steps[starts + counts // 2].tolist(),
        "y": _digits(np.add.reduceat(values, starts) / counts),
        "lo": _digits(np.minimum.reduceat(values, starts)),
        "hi": _digits(np.maximum.reduceat(values, starts)),
    }


def _digits(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
