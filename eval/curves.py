"""Training curves from a run's metrics.jsonl."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from selfsup.errors import UserError
from selfsup.log import read_metrics

from .canvas import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, new_figure, save

Series = tuple[np.ndarray, np.ndarray]


def curves(run: Path, path: Path) -> Path:
    """Loss, health, k-NN, learning rate and speed over steps, from RUN/metrics.jsonl. Raises UserError if it is empty."""
    lines = read_metrics(run / "metrics.jsonl")
    if not lines:
        raise UserError(f"{run / 'metrics.jsonl'}: no line to draw; train for at least one logging step")
    figure = new_figure(12, 6.4)
    grid = figure.subplots(2, 3)
    panel(grid[0, 0], "loss", [("loss", _series(lines, "loss"), BLUE)], smooth=True)
    entropy, spread = _series(lines, "health.teacher_entropy"), _series(lines, "health.feature_std")
    health = [("teacher entropy / ln K", entropy, BLUE), ("feature spread", spread, ORANGE)]
    panel(grid[0, 1], "health (collapse: entropy at 1, or spread at 0)", health, bottom=0.0, smooth=True)
    keys = sorted({k for line in lines for k in (line.get("eval") or {})}, key=lambda k: (len(k), k))[:4]
    colours = (GREEN, BLUE, ORANGE, PURPLE)
    panel(
        grid[0, 2],
        "periodic evaluation (%)",
        [(k, _series(lines, f"eval.{k}", 100), c) for k, c in zip(keys, colours)],
        marks=True,
        span=10.0,
    )
    kl, information = _series(lines, "health.kl"), _series(lines, "health.information")
    output = [("student-teacher KL (nats)", kl, PURPLE), ("information (nats)", information, GREEN)]
    panel(grid[1, 0], "information in the teacher's output", output, bottom=0.0, smooth=True)
    panel(grid[1, 1], "learning rate", [("lr", _series(lines, "lr"), BLUE)], bottom=0.0)
    panel(grid[1, 2], "speed", [("img/s", _series(lines, "img_per_s"), BLUE)], bottom=0.0)
    wait = _series(lines, "data_wait", 100)
    if len(wait[0]):
        right = grid[1, 2].twinx()
        right.plot(*wait, color=ORANGE, linewidth=1.2, label="waiting for data (%)")
        right.set_ylim(0, max(25.0, 1.1 * float(np.nanmax(wait[1]))))
        right.tick_params(labelsize=8, colors=ORANGE, length=0)
        for spine in right.spines.values():
            spine.set_visible(False)
        handles = [*grid[1, 2].get_lines(), *right.get_lines()]
        grid[1, 2].legend(handles, [str(h.get_label()) for h in handles], frameon=False, fontsize=8)
    for axes in grid[1]:
        axes.set_xlabel("step", fontsize=8, color=MUTED)
    figure.suptitle(f"{run.name or run}: {lines[-1]['step']:,} steps", fontsize=11, color=INK)
    return save(figure, path)


def _series(lines: Sequence[dict[str, Any]], key: str, factor: float = 1.0) -> Series:
    """(steps, values) of a dotted key; 'nan' and 'inf', which JSON holds as text, become gaps."""
    steps, values = [], []
    for line in lines:
        value: Any = line
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None or isinstance(value, bool):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        steps.append(line["step"])
        values.append(number * factor if math.isfinite(number) else math.nan)
    return np.array(steps, dtype=np.int64), np.array(values)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a fortieth of the points, gaps left out."""
    half = len(values) // 80
    if half < 1:
        return values
    kernel = np.ones(2 * half + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    return np.where(known, total / np.maximum(np.convolve(known.astype(float), kernel, "same"), 1), np.nan)


def panel(
    axes: Axes,
    title: str,
    lines: list[tuple[str, Series, str]],
    *,
    bottom: float | None = None,
    smooth: bool = False,
    marks: bool = False,
    span: float = 0.0,
) -> None:
    """Lines on one pair of axes; `span` is the least range of y, so that noise does not look like a trend."""
    drawn = [(name, series, colour) for name, series, colour in lines if np.isfinite(series[1]).any()]
    for name, (steps, values), colour in drawn:
        marker = "o" if marks or len(steps) == 1 else None
        if smooth and len(values) >= 80:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = smoothed(values)
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=name)
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for name in ("top", "right", "left"):
        axes.spines[name].set_visible(False)
    axes.spines["bottom"].set_color("#c8ccd2")
    if not drawn:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(
            0.5,
            0.5,
            "not logged in this run",
            ha="center",
            va="center",
            fontsize=9,
            color=MUTED,
            transform=axes.transAxes,
        )
        return
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    low, high = axes.get_ylim()
    if high - low < span:
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)
    axes.set_xlim(left=0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_fontsize(8)
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=8)
