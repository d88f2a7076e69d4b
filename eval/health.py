"""`selfsup health RUN`: what `selfsup.diagnosis` finds, in words, as sparklines, as JSON, and as a picture."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.diagnosis import LEAST, Curves, Diagnosis, Finding, diagnose, knobs, read_curves
from selfsup.errors import UserError
from selfsup.health import FEATURE_STD, INFORMATION, SLOW_DATA
from selfsup.wording import one_line

from .canvas import BLUE, GREEN, INK, MUTED, ORANGE, PURPLE, new_figure, save
from .curves import Series, panel
from .runfacts import remarks_on, stored_config

_RED = "#c23b3b"
_POINTS = 4000
"""Of a curve in the picture."""
_WIDTH = 48
_SPARKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_SHOWN = (
    ("loss", "loss", 1.0),
    ("health.teacher_entropy", "teacher entropy", 1.0),
    ("health.information", "information", 1.0),
    ("health.feature_std", "feature spread", 1.0),
    ("grad_norm", "gradient norm", 1.0),
    ("lr", "learning rate", 1.0),
    ("data_wait", "data wait, %", 100.0),
)


def run(
    folder: Path, state: str | None = None, as_json: bool = False, picture: bool = True, check: bool = False
) -> None:
    """Print the diagnosis of a run, and draw RUN/health.png.

    state: as `selfsup status` has it, where that is known. Raises UserError for what is no run folder; with `check`, after all
    is told, also for a run with a problem.
    """
    log = folder / "metrics.jsonl"
    if not log.exists() and not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no run folder: it has neither config.yaml nor metrics.jsonl")
    curves = read_curves(log)
    config = stored_config(folder)
    row = config.get("max_nonfinite")
    found = diagnose(curves, row if isinstance(row, int) else 10)
    remarks = remarks_on(folder, curves)
    drawn: Path | None = None
    if picture and len(curves):
        try:
            drawn = draw(curves, found, folder / "health.png", folder.resolve().name)
        except OSError as error:
            remarks.append(f"{folder / 'health.png'} cannot be written: {error.strerror or error}")
    if as_json:
        print(json.dumps(_object(folder, state, curves, found, config, remarks, drawn), indent=1, allow_nan=False))
    else:
        print("\n".join(lines(folder, state, curves, found, config, remarks, drawn, _sparks())))
    if check and found.healthy is False:
        raise UserError(f"{folder}: {found.verdict}")


def _object(
    folder: Path,
    state: str | None,
    curves: Curves,
    found: Diagnosis,
    config: dict[str, Any],
    remarks: list[str],
    drawn: Path | None,
) -> dict[str, Any]:
    newest = {}
    for key, _, _ in _SHOWN:
        steps, values = curves.known(key)
        if len(values):
            newest[key] = {"step": int(steps[-1]), "value": float(values[-1])}
    return {
        "run": str(folder),
        "state": state,
        "step": int(curves.step[-1]) if len(curves) else 0,
        "verdict": found.verdict,
        "healthy": found.healthy,
        "findings": [
            {
                "kind": each.kind,
                "problem": each.problem,
                "since": each.since,
                "until": each.until,
                "text": each.text,
                "figures": each.figures,
                "advice": _advice(each, folder),
                "now": knobs(each.kind, config),
            }
            for each in found.findings
        ],
        "newest": newest,
        "remarks": remarks,
        "picture": str(drawn) if drawn is not None else None,
    }


def _advice(finding: Finding, folder: Path) -> str:
    return finding.advice.replace("RUN", str(folder))


# ----------------------------------------------------------------------------------------------------------------- words


def lines(
    folder: Path,
    state: str | None,
    curves: Curves,
    found: Diagnosis,
    config: dict[str, Any],
    remarks: list[str],
    drawn: Path | None,
    blocks: str = _SPARKS,
) -> list[str]:
    """What the terminal shows."""
    step = int(curves.step[-1]) if len(curves) else 0
    out = [f"{folder}: {found.verdict}" + (f" ({state}, step {step:,})" if state else f" (step {step:,})")]
    if not len(curves):
        out.append("  no step is logged yet")
    elif found.healthy is None:
        out.append(f"  fewer than {LEAST} steps with a loss: too early to say")
    for each in found.findings:
        span = f"since step {each.since:,}" if each.until is None else f"steps {each.since:,} to {each.until:,}"
        out.append(f"  {each.kind}, {span}: {each.text}")
        if each.problem:
            now = knobs(each.kind, config)
            out.append(f"    {_advice(each, folder)}" + (f" (now {now})" if now else ""))
    for key, title, factor in _SHOWN:
        _, values = curves.known(key)
        if len(values):
            values = values * factor
            ends = f"{values[0]:>9.4g}", f"{values[-1]:<9.4g}"
            out.append(f"  {title:16}{ends[0]} {sparkline(values, blocks)} {ends[1]}".rstrip())
    out += [f"  {remark}" for remark in remarks]
    if drawn is not None:
        out.append(f"  the curves: {drawn}")
    return out


def sparkline(values: np.ndarray, blocks: str = _SPARKS, width: int = _WIDTH) -> str:
    """Medians of `width` equal pieces, one character each, from the lowest value to the highest."""
    if not len(values):
        return ""
    pieces = np.array([np.median(piece) for piece in np.array_split(values, min(width, len(values)))])
    low, high = float(pieces.min()), float(pieces.max())
    if not high > low:
        return blocks[0] * len(pieces)
    place = ((pieces - low) / (high - low) * (len(blocks) - 1)).round().astype(int)
    return "".join(blocks[i] for i in place)


def _sparks() -> str:
    """Blocks, if the terminal can show them."""
    try:
        _SPARKS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeError, LookupError):
        return _PLAIN
    return _SPARKS


# --------------------------------------------------------------------------------------------------------------- picture


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
    ]
    panel(grid[0, 1], "health (collapse: entropy at 1 or 0, or spread at 0)", health, bottom=0.0, smooth=True)
    panel(
        grid[0, 2],
        "information in the teacher's output (nats)",
        [("information", series("health.information"), GREEN)],
        bottom=0.0,
        smooth=True,
    )
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
