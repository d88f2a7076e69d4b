"""The figures of a run's metrics.jsonl in columns, of a log of any age, whole, cut short, or with lines that are none."""

import json
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.errors import UserError

KEYS = (
    *("loss", "lr", "grad_norm", "data_wait", "img_per_s", "time", "loss_scale", "refused_in_row", "left_out"),
    *("health.teacher_entropy", "health.information", "health.feature_std", "health.kl", "feature_std"),
)
"""What is read of a line; one that it does not have is a gap."""
_MOST_PARTS = 48
"""Of a method's own figures, so many are kept."""


@dataclass
class Curves:
    """The figures of a log in columns."""

    step: np.ndarray
    """int64 [N]."""
    columns: dict[str, np.ndarray]
    """float64 [N] for each of KEYS; NaN where a line has no such number."""
    not_finite: np.ndarray
    """bool [N]: whether the loss is written as nan or inf."""
    states: list[tuple[int, str]] = field(default_factory=list)
    """(step, health.state) where it is not 'ok'."""
    evaluations: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """(steps, finite values) of each of a method's own figures, such as the parts of its loss, in the order of the log."""
    broken: int = 0
    """Lines that are none."""

    def __len__(self) -> int:
        return len(self.step)

    def known(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) where `key` is a finite number."""
        values = self.columns[key]
        there = np.isfinite(values)
        return self.step[there], values[there]


def read_curves(path: Path) -> Curves:
    """The columns of a metrics.jsonl, of any age, whole or cut short; none of one that is not there. Raises UserError."""
    steps, columns = array("q"), {key: array("d") for key in KEYS}
    not_finite, found = array("b"), Curves(np.zeros(0), {}, np.zeros(0))
    parts: dict[str, tuple[array[int], array[float]]] = {}
    try:
        with open(path, "rb") as file:
            for raw in file:
                line = _parsed(raw)
                if line is None:
                    found.broken += bool(raw.strip())
                    continue
                steps.append(line["step"])
                for key, column in columns.items():
                    column.append(_number(line, key))
                not_finite.append(isinstance(line.get("loss"), (str, float)) and not math.isfinite(columns["loss"][-1]))
                _note(line, found)
                _note_parts(line, parts)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    found.step = np.array(steps, dtype=np.int64)
    found.columns = {key: np.array(column, dtype=np.float64) for key, column in columns.items()}
    found.not_finite = np.array(not_finite, dtype=bool)
    found.parts = {name: (np.array(at, dtype=np.int64), np.array(values)) for name, (at, values) in parts.items()}
    return found


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    step = line.get("step") if isinstance(line, dict) else None
    return line if isinstance(step, int) and not isinstance(step, bool) and abs(step) < 2**62 else None


def _number(line: dict[str, Any], key: str) -> float:
    value: Any = line
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None or isinstance(value, (dict, list)):
        return math.nan
    try:
        return float(value)  # 'nan' and 'inf' are text in JSON
    except (ValueError, OverflowError):
        return math.nan


def _note(line: dict[str, Any], found: Curves) -> None:
    health, evaluations = line.get("health"), line.get("eval")
    state = health.get("state", "ok") if isinstance(health, dict) else "ok"
    if isinstance(state, str) and state != "ok":
        found.states.append((line["step"], state))
    evaluations = evaluations if isinstance(evaluations, dict) else {}
    for name in evaluations:
        value = _number(evaluations, name) if "." not in name else math.nan
        if math.isfinite(value):
            found.evaluations.setdefault(str(name), []).append((line["step"], value))


def _note_parts(line: dict[str, Any], parts: "dict[str, tuple[array[int], array[float]]]") -> None:
    """A line has what the method gave between its loss and the gradients' norm (see `recorder`)."""
    inside = False
    for name, value in line.items():
        if name == "grad_norm":
            return
        if inside and name not in KEYS and _is_figure(value):
            if name not in parts:
                if len(parts) == _MOST_PARTS:
                    continue
                parts[name] = array("q"), array("d")
            parts[name][0].append(line["step"])
            parts[name][1].append(value)
        inside = inside or name == "loss"


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
