"""What the runs of `methods.py` say: a table with a row a method, and accuracy over time."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PEER = "lightly_"
Runs = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""{row: {seed: {"knn", "linear", "rankme", "img_per_s", "peak_mb", "steps", "curve", ...}}}, as in the JSON."""

# two-sided 95 % points of Student's t, by degrees of freedom
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def values(found: Mapping[str, Mapping[str, Any]], key: str) -> list[float]:
    """One a seed, in order."""
    return [run[key] for _, run in sorted(found.items(), key=lambda item: int(item[0]))]


def interval(differences: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean of paired differences, by Student's t; None of fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    half = _T.get(n - 1, 1.96) * statistics.stdev(differences) / n**0.5
    return statistics.fmean(differences) - half, statistics.fmean(differences) + half


def time_to(curve: list[list[float]], target: float) -> float | None:
    """Part of the budget after which a curve of (part, accuracy) first reaches `target`, between points in a line."""
    before = None
    for at, accuracy in curve:
        if accuracy >= target:
            if before is None or accuracy == before[1]:
                return at
            return float(before[0] + (at - before[0]) * (target - before[1]) / (accuracy - before[1]))
        before = (at, accuracy)
    return None


def markdown(runs: Runs, budget: float) -> str:
    """The table, best k-NN first, and below it our methods against lightly's examples of them."""
    count = sum(len(found) for found in runs.values())
    lines = [f"{budget:g} s of one core each, {count} runs", ""]
    lines += [
        "| method | seeds | k-NN % | linear % | RankMe (of) | img/s | memory, MB | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, found in sorted(runs.items(), key=lambda item: -statistics.fmean(values(item[1], "knn"))):
        if not found:
            continue
        shown = [_spread(values(found, key)) for key in ("knn", "linear")]
        size = next(iter(found.values()))["dimensions"]
        means = [statistics.fmean(values(found, key)) for key in ("rankme", "img_per_s", "peak_mb", "steps")]
        name = f"{row.removeprefix(PEER)}, lightly's example" if row.startswith(PEER) else row
        shown += [f"{means[0]:.0f} ({size})", *(f"{mean:.0f}" for mean in means[1:])]
        lines.append(f"| {name} | {len(found)} | {' | '.join(shown)} |")
    peers = [row for row in runs if row.startswith(PEER) and row.removeprefix(PEER) in runs]
    if peers:
        lines += [
            "",
            "| against lightly's example | k-NN, points (95 %) | ours reaches its final k-NN after |",
            "|---|---|---|",
        ]
        lines += [
            f"| {row.removeprefix(PEER)} | {_difference(runs, row)} | {_when(runs, row)} |" for row in sorted(peers)
        ]
    return "\n".join(lines) + "\n"


def _spread(numbers: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{100 * statistics.fmean(numbers):.2f}{deviation}"


def _pairs(runs: Runs, peer: str) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    ours, theirs = runs[peer.removeprefix(PEER)], runs[peer]
    return [(ours[seed], theirs[seed]) for seed in sorted(ours) if seed in theirs]


def _difference(runs: Runs, peer: str) -> str:
    differences = [100 * (a["knn"] - b["knn"]) for a, b in _pairs(runs, peer)]
    if not differences:
        return ""
    found = interval(differences)
    return f"{statistics.fmean(differences):+.2f}" + (f" [{found[0]:+.2f}, {found[1]:+.2f}]" if found else ", one seed")


def _when(runs: Runs, peer: str) -> str:
    parts = [time_to(a["curve"], b["knn"]) for a, b in _pairs(runs, peer)]
    reached = [part for part in parts if part is not None]
    if len(reached) < len(parts):
        return f"not within the budget in {len(parts) - len(reached)} of {len(parts)} runs"
    return f"{100 * statistics.fmean(reached):.0f} % of its time" if reached else ""


def picture(runs: Runs, budget: float, path: Path) -> Path:
    """k-NN over seconds, a line a method, mean over the seeds; lightly's examples dashed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = sorted({row.removeprefix(PEER) for row in runs})
    for row, found in sorted(runs.items(), key=lambda item: -statistics.fmean(values(item[1], "knn"))):
        curves = [run["curve"] for run in found.values()]
        points = [
            list(zip(*at, strict=True)) for at in zip(*curves, strict=False)
        ]  # for each point (parts, accuracies)
        x = [budget * statistics.fmean(parts) for parts, _ in points]
        y = [100 * statistics.fmean(accuracies) for _, accuracies in points]
        number = names.index(row.removeprefix(PEER))
        style = "--" if row.startswith(PEER) else "-"
        axes.plot(
            x,
            y,
            style,
            marker=".",
            color=f"C{number % 10}",
            linewidth=1.4,
            alpha=1 - 0.4 * (number // 10 % 2),
            label=row,
        )
    axes.set_xlabel("seconds of one core")
    axes.set_ylabel("k-NN top-1 (%)")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
