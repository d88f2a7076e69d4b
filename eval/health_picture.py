"""The picture of `selfsup health RUN`: the curves, with what is wrong marked where it began."""

import itertools
from pathlib import Path

import numpy as np

from selfsup.columns import Curves
from selfsup.diagnosis import Diagnosis
from selfsup.health import FEATURE_STD, INFORMATION, SLOW_DATA
from selfsup.wording import one_line

from .canvas import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, new_figure, save
from .curves import Series, panel

_RED = "#c23b3b"
_HEALTH = "health (collapse: entropy at 1 or 0, or spread at 0)"
_POINTS = 4000
"""Of a curve."""


def draw(curves: Curves, found: Diagnosis, path: Path, name: str) -> Path:
    """Loss, health, information, gradient norm, learning rate and waiting over steps; what is wrong is marked where it began."""
    figure = new_figure(12, 6.4)
    grid = figure.subplots(2, 3)

    def series(key: str, factor: float = 1.0) -> Series:
        steps, values = curves.known(key)
        stride = max(1, len(steps) // _POINTS)
        return steps[::stride], values[::stride] * factor

    panel(grid[0, 0], "loss", [("loss", series("loss"), BLUE)], smooth=True)
    health = [
        ("teacher entropy / ln K", series("health.teacher_entropy"), BLUE),
        ("feature spread", series("health.feature_std"), ORANGE),
        ("feature spread (not judged)", series("feature_std"), PURPLE),
    ]
    known = [name for name, (_, values), _ in health if len(values)]  # of one alone the title tells what it is
    what = f"{known[0]}{'' if 'not' in known[0] else ' (collapse: at 0)'}" if len(known) == 1 else _HEALTH
    panel(grid[0, 1], what, health, bottom=0.0, smooth=True)
    if len(curves.known("health.information")[0]):
        information = [("information", series("health.information"), GREEN)]
        panel(grid[0, 2], "information in the teacher's output (nats)", information, bottom=0.0, smooth=True)
    else:  # a method without prototypes
        colours = itertools.cycle((GREEN, BLUE, ORANGE, PURPLE))
        shown = [(name, _columns(rows), next(colours)) for name, rows in curves.evaluations.items()]
        panel(grid[0, 2], "evaluations", shown, marks=True)
    panel(grid[1, 0], "gradient norm", [("gradient norm", series("grad_norm"), PURPLE)], smooth=True)
    _, norms = series("grad_norm")
    norms = norms[norms > 0]
    if len(norms) and norms.max() > 100 * np.median(norms):
        grid[1, 0].set_yscale("log")
    elif len(norms):
        grid[1, 0].set_ylim(bottom=0.0)
    panel(grid[1, 1], "learning rate", [("lr", series("lr"), BLUE)], bottom=0.0)
    panel(grid[1, 2], "waiting for data (% of the time)", [("waiting", series("data_wait", 100), ORANGE)], bottom=0.0)
    for axes, key, level in (
        (grid[0, 1], "health.feature_std", FEATURE_STD),
        (grid[0, 2], "health.information", INFORMATION),
        (grid[1, 2], "data_wait", 100 * SLOW_DATA),
    ):
        if len(curves.known(key)[0]):
            axes.axhline(level, color=_RED, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.set_ylim(top=max(axes.get_ylim()[1], 1.3 * level))
    refused = curves.step[(np.nan_to_num(curves.columns["refused_in_row"]) > 0) | curves.not_finite]
    if len(refused):
        marks = np.full(len(refused), 0.02)
        grid[0, 0].plot(
            refused, marks, "|", color=_RED, transform=grid[0, 0].get_xaxis_transform(), label="refused", markersize=7
        )
        grid[0, 0].legend(frameon=False, fontsize=8)
    last = max(int(curves.step[-1]), 1)
    for place, each in enumerate(f for f in found.findings if f.problem):
        for axes in grid[0, :] if each.kind != "starves for data" else grid[1, 2:]:
            if place == 0 or each.kind == "starves for data":
                axes.axvspan(each.since, each.until or last, color=_RED, alpha=0.07, linewidth=0)
            axes.axvline(each.since, color=_RED, linewidth=1.0)
    for axes in grid.flat:
        axes.set_xlim(0, last)
    for axes in grid[1]:
        axes.set_xlabel("step", fontsize=8, color=MUTED)
    figure.suptitle(_title(name, curves, found), fontsize=11, color=INK if found.healthy is not False else _RED)
    return save(figure, path)


def _title(name: str, curves: Curves, found: Diagnosis) -> str:
    problem = next((each for each in found.findings if each.problem), None)
    since = f" since step {problem.since:,}" if problem is not None else ""
    return f"{one_line(name, 60)}: {found.verdict}{since}; {int(curves.step[-1]):,} steps"


def _columns(rows: list[tuple[int, float]]) -> Series:
    steps, values = zip(*rows)
    return np.array(steps), np.array(values)
