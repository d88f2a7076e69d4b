"""The table of a sweep, SWEEP/sweep.json and sweep.txt: one row a run, as far as they have come."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfsup import durable
from selfsup.errors import UserError
from selfsup.wording import one_line, printable

from . import columns, figures, status, submission
from .status import RunStatus
from .submission import Submission

JSON, TEXT = "sweep.json", "sweep.txt"
_LEFT_OUT = ("img_per_s", *map(figures.step_key, figures.CHOSEN_BY))
"""Figures that do not tell runs apart."""


def write(folder: Path) -> None:
    """Write and print it. Raises UserError for a folder that is no sweep's, or cannot be written."""
    submitted = submission.read(folder)
    if submitted is None or submitted.runs == (".",):
        raise UserError(f"{folder} is no sweep: {submission.path(folder)} tells of no runs")
    rows = table(submitted, status.describe([folder]))
    text = show(rows, [*submitted.sweep])
    try:
        durable.write_atomically(folder / JSON, json.dumps(rows, indent=1) + "\n")
        durable.write_atomically(folder / TEXT, text + "\n")
    except OSError as error:
        raise UserError(f"{folder / JSON}: cannot be written: {error.strerror or error}") from None
    print(text)


def table(submitted: Submission, found: Sequence[RunStatus]) -> list[dict[str, Any]]:
    """Rows of {"run", "values": by key that varies, "state", "step", "steps", "metrics", "best"}; found: of all its runs.

    best: whether no run has a higher accuracy, of `figures.CHOSEN_BY` the first that any has; false where none was measured.
    """
    combinations = [*itertools.product(*submitted.sweep.values())]  # in the order in which runs are named
    if len(combinations) != len(submitted.runs):
        combinations = [() for _ in submitted.runs]
    by = figures.chosen_by(each.metrics for each in found)
    scores = [each.metrics[by] for each in found if by is not None and by in each.metrics]
    return [
        {
            "run": name,
            "values": dict(zip(submitted.sweep, values)),
            "state": each.state,
            "step": each.step,
            "steps": each.steps,
            "metrics": each.metrics,
            "best": by is not None and each.metrics.get(by) == max(scores),
        }
        for name, values, each in zip(submitted.runs, combinations, found)
    ]


def show(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Aligned columns, the best marked with a *."""
    named = {name: None for row in rows for name in row["metrics"] if name not in _LEFT_OUT}
    by = figures.chosen_by(row["metrics"] for row in rows)
    metrics = sorted(named, key=lambda name: (name != "loss", name != by, name))
    lines = [["", *(keys or ("run",)), "state", "step", *metrics]]
    for row in rows:
        values = [one_line(row["values"].get(key, ""), 40) for key in keys] if keys else [printable(row["run"])]
        step = f"{row['step']}/{row['steps']}" if row["steps"] is not None else str(row["step"])
        shown = [_figure(name, row["metrics"].get(name)) for name in metrics]
        lines.append(["*" if row["best"] else "", *values, row["state"], step, *shown])
    text = "\n".join(columns.aligned(lines))
    return text + (f"\n* highest {by}" if any(row["best"] for row in rows) else "")


def _figure(name: str, value: float | None) -> str:
    """Accuracies are shares of 1."""
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if "top1" in name else f"{value:.4f}"
