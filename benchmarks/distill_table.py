"""What the runs of `distill.py` say: a row's mean over seeds, its gain over the row it is compared with, table and picture."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.distill_rows import GROUPS, ROWS, Row

Runs = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""{row: {seed: {"top1": ..., "classifiers": {name: top1}, "seconds": ..., ...}}}, as in the JSON."""


@dataclass(frozen=True)
class Line:
    """A line of the table: a row, or one exit of a row that has several."""

    group: str
    name: str
    title: str
    values: tuple[float, ...]
    """Top-1, one a seed."""
    against: str | None
    gains: tuple[float, ...]
    """Over `against`, one a seed that both have."""
    spread: float
    """Standard deviation over the seeds, of this row and the one it is compared with, pooled."""
    seconds: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def gain(self) -> float | None:
        """Mean over the seeds; None where there is nothing to compare."""
        return statistics.fmean(self.gains) if self.gains else None

    @property
    def verdict(self) -> str:
        """Whether the gain or loss is larger than what the seed alone changes."""
        if self.gain is None:
            return ""
        if len(self.gains) < 2:
            return "one seed says nothing"
        if abs(self.gain) <= self.spread:
            return "within the seeds' spread"
        return "gain" if self.gain > 0 else "loss"


def lines(runs: Runs, rows: Sequence[Row] = ROWS) -> list[Line]:
    """Of every row that has run, in the order of `rows`; the exits of a row that has several come under it."""
    out = []
    for row in rows:
        found = runs.get(row.name)
        if not found:
            continue
        out.append(_line(row.group, row.name, row.title, _values(found, None), runs, row.against, found))
        names = list(next(iter(found.values()))["classifiers"])
        for name in sorted(names) if len(names) > 1 else []:
            out.append(_line(row.group, f"{row.name}: {name}", "", _values(found, name), runs, row.against, found))
    return out


def _values(found: Mapping[str, Mapping[str, Any]], classifier: str | None) -> dict[str, float]:
    """Top-1 by seed, of a classifier or of the main one."""
    return {
        s: run["top1"] if classifier is None else run["classifiers"][classifier] for s, run in sorted(found.items())
    }


def _line(
    group: str,
    name: str,
    title: str,
    mine: Mapping[str, float],
    runs: Runs,
    against: str | None,
    found: Mapping[str, Any],
) -> Line:
    other = _values(runs[against], None) if against is not None and against in runs else {}
    both = [seed for seed in mine if seed in other]
    sides = [list(mine.values()), list(other.values())] if both else [list(mine.values())]
    variances = [statistics.variance(side) for side in sides if len(side) > 1]
    return Line(
        group,
        name,
        title,
        tuple(mine.values()),
        against if both else None,
        tuple(mine[seed] - other[seed] for seed in both),
        statistics.fmean(variances) ** 0.5 if variances else 0.0,
        statistics.fmean(run["seconds"] for run in found.values()),
    )


_COLUMNS = ("row", "what", "top-1 %", "± seeds", "gain over", "gain", "verdict", "CPU s a run")


def _cells(line: Line) -> tuple[str, ...]:
    own = statistics.stdev(line.values) if len(line.values) > 1 else None
    gain = "" if line.gain is None else f"{100 * line.gain:+.2f}"
    return (
        line.name, line.title, f"{100 * line.mean:.2f}", "" if own is None else f"{100 * own:.2f}", line.against or "",
        gain, line.verdict, f"{line.seconds:.0f}",
    )  # fmt: skip


def markdown(runs: Runs, setting: Mapping[str, Any]) -> str:
    """The table of every group, with the setting above it."""
    out = [_setting(setting, runs), ""]
    every = lines(runs)
    for group, title in GROUPS.items():
        mine = [line for line in every if line.group == group]
        if mine:
            out += [f"**{title}**", "", "| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
            out += ["| " + " | ".join(_cells(line)) + " |" for line in mine] + [""]
    return "\n".join(out)


def _setting(setting: Mapping[str, Any], runs: Runs) -> str:
    count = sum(len(found) for found in runs.values())
    seconds = sum(run["seconds"] for found in runs.values() for run in found.values())
    shown = ", ".join(f"{key} {value}" for key, value in setting.items())
    return f"{shown}; {count} runs, {seconds / 3600:.2f} hours of CPU"


def show(runs: Runs, setting: Mapping[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 160)
    console.print(_setting(setting, runs), highlight=False)
    every = lines(runs)
    for group, title in GROUPS.items():
        mine = [line for line in every if line.group == group]
        if not mine:
            continue
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(_COLUMNS):
            table.add_column(name, justify="left" if i in (0, 1, 4, 6) else "right")
        for line in mine:
            table.add_row(*_cells(line))
        console.print(table)


def picture(runs: Runs, path: Path) -> Path | None:
    """A panel a group, a dot a seed, a bar for the mean: green for a gain, red for a loss, grey within the seeds' spread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    every = lines(runs)
    groups = [group for group in GROUPS if any(line.group == group for line in every)]
    if not groups:
        return None
    counts = [sum(line.group == group for line in every) for group in groups]
    height = sum(0.9 + 0.3 * n for n in counts)
    figure = Figure(figsize=(8.5, height), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[n + 2 for n in counts])[:, 0]
    colours = {"gain": "#3b8f5a", "loss": "#c0504d"}
    for axes, group in zip(panels, groups, strict=True):
        mine = [line for line in every if line.group == group]
        for y, line in enumerate(mine):
            colour = colours.get(line.verdict, "#8a8f98")
            axes.plot(
                [100 * v for v in line.values], [y] * len(line.values), "o", color=colour, markersize=4, alpha=0.6
            )
            axes.plot([100 * line.mean] * 2, [y - 0.3, y + 0.3], color=colour, linewidth=2.5)
            gain = "" if line.gain is None else f" ({100 * line.gain:+.2f})"
            axes.annotate(
                f"{100 * line.mean:.2f}{gain}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8,
            )  # fmt: skip
        axes.set_yticks(range(len(mine)), [line.name for line in mine], fontsize=8)
        axes.invert_yaxis()
        axes.set_title(GROUPS[group], fontsize=10, loc="left")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=8)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    panels[-1].set_xlabel("top-1 (%); a dot a seed, in brackets the gain over the row it is compared with", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
