"""`selfsup health RUN`: what `selfsup.diagnosis` finds, in words, as sparklines, as JSON, and as a picture."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.columns import Curves, read_curves
from selfsup.diagnosis import LEAST, Diagnosis
from selfsup.errors import UserError
from selfsup.remedies import knobs

from .health_picture import draw
from .runfacts import advised, judged, remarks_on, stored_config

_WIDTH = 48
_SPARKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_SHOWN = (
    ("loss", "loss", 1.0),
    ("health.teacher_entropy", "teacher entropy", 1.0),
    ("health.information", "information", 1.0),
    ("health.feature_std", "feature spread", 1.0),
    ("feature_std", "feature spread", 1.0),  # of reconstruction, which needs none: shown, not judged
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
    found = judged(curves, config)
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
                "advice": advised(each, config, folder),
                "now": knobs(each.kind, config),
            }
            for each in found.findings
        ],
        "newest": newest,
        "remarks": remarks,
        "picture": str(drawn) if drawn is not None else None,
    }


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
            out.append(f"    {advised(each, config, folder)}" + (f" (now {now})" if now else ""))
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
