"""Is a run well? Judged from its metrics.jsonl, while it runs or afterwards: what is wrong, since which step, by which figures.

The trainer itself names a collapse as it happens (`health.CollapseMonitor`); here the same rule is applied to the whole log,
which also shows what needs hindsight: a loss that rises or never fell, and how much of the time went into waiting.
"""

import json
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.errors import UserError
from selfsup.health import ADVICE, GRACE, PATIENCE, SLOW_DATA, collapse_of

KEYS = (
    *("loss", "lr", "grad_norm", "data_wait", "img_per_s", "time", "loss_scale", "refused_in_row", "left_out"),
    *("health.teacher_entropy", "health.information", "health.feature_std", "health.kl"),
)
"""What is read of a line; one that it does not have is a gap."""

LEAST = 20
"""Steps with a loss; of fewer, nothing but a certain fault is told."""

RISE = 0.1
"""Part of the loss at the beginning by which a loss above it has diverged."""

FLAT = 0.01
"""Part of the loss at the beginning by which it must have fallen ..."""

FLAT_STEPS = 500
"""... after so many steps."""

REFUSED = 0.01
"""Part of the newest thousand steps that may be refused without a word."""

REFUSED_SCALED = 0.05
"""The same with a loss scale (fp16), which is found by refusing steps."""

BETTER = 0.02
"""Gain of an evaluation that shows that something is learned, whatever the loss does."""


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
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    found.step = np.array(steps, dtype=np.int64)
    found.columns = {key: np.array(column, dtype=np.float64) for key, column in columns.items()}
    found.not_finite = np.array(not_finite, dtype=bool)
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


@dataclass(frozen=True)
class Finding:
    """One thing that was seen."""

    kind: str
    """A key of `health.ADVICE`."""
    problem: bool
    """False: worth knowing, and no more."""
    since: int
    """Step at which it began."""
    until: int | None
    """Last step of what is over; None: it lasts."""
    text: str
    figures: dict[str, float]

    @property
    def advice(self) -> str:
        """What to change."""
        return ADVICE.get(self.kind, "")


@dataclass(frozen=True)
class Diagnosis:
    """All that was seen, the worst first."""

    verdict: str
    """'fine', 'unknown', or the kind of the first problem."""
    findings: list[Finding]

    @property
    def healthy(self) -> bool | None:
        """None: there are too few steps with a loss to say."""
        return None if self.verdict == "unknown" else self.verdict == "fine"


def diagnose(curves: Curves, max_nonfinite: int = 10) -> Diagnosis:
    """Judge a log. max_nonfinite: refused steps in a row that end a run, as its configuration says."""
    judges: list[Callable[[Curves], list[Finding]]] = [
        collapse,
        lambda c: diverges(c, max_nonfinite),
        lambda c: refuses(c, max_nonfinite),
        flat,
        starves,
    ]
    found = [(rank, each) for rank, judge in enumerate(judges) for each in judge(curves)]
    if any(each.problem and rank < 2 for rank, each in found):
        found = [(rank, each) for rank, each in found if each.kind != "flat loss"]  # it is why
    # a cause comes before what it causes; that data is slow harms no weights
    found.sort(
        key=lambda item: (not item[1].problem, item[0] >= 3, item[0] if item[0] >= 3 else 0, item[1].since, item[0])
    )
    findings = [each for _, each in found]
    problem = next((each.kind for each in findings if each.problem), None)
    return Diagnosis(problem or ("fine" if len(curves.known("loss")[0]) >= LEAST else "unknown"), findings)


# -------------------------------------------------------------------------------------------------------------- judges


def collapse(curves: Curves) -> list[Finding]:
    """Each stretch of at least PATIENCE steps that show a collapse. Of a log without these figures: what the run said itself."""
    names = ("teacher_entropy", "information", "feature_std")
    columns = {name: curves.columns[f"health.{name}"] for name in names}
    seen = [name for name in names if np.isfinite(columns[name]).any()]
    if not seen:
        return _told(curves)
    rows = zip(*(columns[name].tolist() for name in seen))
    kinds = [
        collapse_of({n: v for n, v in zip(seen, row) if math.isfinite(v)}) if step >= GRACE else "ok"
        for step, row in zip(curves.step.tolist(), rows)
    ]
    found = []
    for first, end in _stretches(np.array([kind != "ok" for kind in kinds], dtype=bool)):
        if end - first < PATIENCE:
            continue
        kind = max(set(kinds[first:end]), key=kinds[first:end].count)
        lasts = end == len(kinds)
        figures = {
            name: float(np.nanmedian(columns[name][first:end]))
            for name in seen
            if np.isfinite(columns[name][first:end]).any()
        }
        words = {
            "teacher_entropy": "teacher entropy {:.3f} of ln K",
            "information": "information {:.4f} nats",
            "feature_std": "feature spread {:.3f}",
        }
        shown = ", ".join(words[name].format(value) for name, value in figures.items())
        until = None if lasts else int(curves.step[end - 1])
        text = f"{shown} (median of {end - first} steps)" + ("" if lasts else "; it is over")
        found.append(Finding(kind, lasts, int(curves.step[first]), until, text, figures))
    return found


def _told(curves: Curves) -> list[Finding]:
    if not curves.states:
        return []
    step, kind = curves.states[-1]
    lasts = bool(step == curves.step[-1])
    places = np.searchsorted(curves.step, [at for at, _ in curves.states])
    apart = np.flatnonzero(np.diff(places) > 1)  # where it was well in between
    first = curves.states[int(apart[-1]) + 1 if len(apart) else 0][0]
    return [
        Finding(
            kind, lasts, int(first), None if lasts else int(step), "as the run said; its figures are not in the log", {}
        )
    ]


def diverges(curves: Curves, max_nonfinite: int = 10) -> list[Finding]:
    """A loss that is no number any more, or has risen above what it was at the beginning."""
    bad = curves.not_finite
    last = _stretches(bad)[-1:] if len(bad) else []
    if last and last[0][1] == len(bad):
        first, row = last[0][0], last[0][1] - last[0][0]
        scaled = np.isfinite(curves.columns["loss_scale"]).any()  # a scale that is too large is halved, some ten times
        if row >= (max_nonfinite if scaled else 3):
            before = curves.columns["loss"][:first]
            known = before[np.isfinite(before)]
            figures = {"not_finite_in_row": float(row), **({"loss_before": float(known[-1])} if len(known) else {})}
            was = f"; before it {known[-1]:.4g}" if len(known) else ""
            return [
                Finding(
                    "diverges",
                    True,
                    int(curves.step[first]),
                    None,
                    f"the loss is no number for {row} steps in a row{was}",
                    figures,
                )
            ]
    risen = _risen(curves, "loss")
    # of prototypes: the loss follows the teacher's entropy, up and down; a student that is lost has a divergence that rises too
    if risen is None or (len(curves.known("health.kl")[0]) and _risen(curves, "health.kl") is None):
        return []
    since, start, best, final = risen
    text = f"the loss is {final:.4g}; it began at {start:.4g} and was {best:.4g} at its lowest"
    return [Finding("diverges", True, since, None, text, {"loss": final, "loss_at_first": start, "loss_lowest": best})]


def _risen(curves: Curves, key: str) -> tuple[int, float, float, float] | None:
    """(step since which, level at first, lowest, last) if a figure has risen above its beginning and stays there."""
    at, level, _, noise = _levels(curves, key)
    if len(level) < 6:
        return None
    # its beginning is the highest of it: some losses rise at first, as while a queue fills
    start, best, final = float(level[: max(1, len(level) // 4)].max()), float(level.min()), float(np.median(level[-2:]))
    threshold = start + max(RISE * max(abs(start), start - best, 1e-12), 4 * noise)
    if final <= threshold:
        return None
    low = int(np.flatnonzero(level <= threshold)[-1])
    return (int(at[low + 1]) if low + 1 < len(at) else int(at[-1])), start, best, final


def refuses(curves: Curves, max_nonfinite: int = 10) -> list[Finding]:
    """Steps that were not taken because loss or gradients were not finite."""
    refused = np.nan_to_num(curves.columns["refused_in_row"]) > 0
    refused |= curves.not_finite
    count = int(refused.sum())
    if not count:
        return []
    newest = refused[-1000:]
    share = float(newest.mean())
    longest = max(end - first for first, end in _stretches(refused))
    allowed = REFUSED_SCALED if np.isfinite(curves.columns["loss_scale"]).any() else REFUSED
    problem = bool((newest.sum() >= 3 and share > allowed) or longest >= max_nonfinite)
    first, last = (int(curves.step[i]) for i in np.flatnonzero(refused)[[0, -1]])
    text = f"{count} of {len(curves):,} steps refused ({share:.1%} of the newest {len(newest):,}), at most {longest} in a row; "
    text += f"the last {last}"
    figures = {"refused": float(count), "share_of_newest": share, "longest_row": float(longest)}
    return [Finding("refuses steps", problem, first, None if refused[-1] else last, text, figures)]


def flat(curves: Curves) -> list[Finding]:
    """A loss that never fell below its beginning, and does not fall; unless other figures show that something is learned."""
    at, level, size, noise = _levels(curves, "loss")
    if len(level) < 8 or len(curves) < FLAT_STEPS:
        return []
    quarter = len(level) // 4
    start, best = float(level[0]), float(level.min())
    least = max(FLAT * max(abs(start), 1e-12), 4 * noise)
    falls = float(np.median(level[quarter : 2 * quarter]) - np.median(level[-quarter:]))
    if start - best > least or falls > least:
        return []
    grows = [key for key in ("health.information", "health.feature_std") if _grows(curves, key)]
    gains = {n: v[-1][1] - v[0][1] for n, v in curves.evaluations.items() if "top1" in n and len(v) > 1}
    if max(gains.values(), default=0.0) > BETTER:
        grows.append(max(gains, key=lambda name: gains[name]))
    text = f"the loss began at {start:.4g} and was {best:.4g} at its lowest (medians of {size} steps)"
    text += f"; yet {' and '.join(grows)} grows" if grows else ""
    return [Finding("flat loss", not grows, int(at[0]), None, text, {"loss_at_first": start, "loss_lowest": best})]


def _grows(curves: Curves, key: str) -> bool:
    """Whether a figure is higher by a tenth in the last quarter than in the second."""
    _, level, _, _ = _levels(curves, key)
    quarter = len(level) // 4
    return quarter > 0 and bool(np.median(level[-quarter:]) > 1.1 * np.median(level[quarter : 2 * quarter]))


def starves(curves: Curves) -> list[Finding]:
    """More than SLOW_DATA of the time waited for data, over the newer half of the log; while workers start does not count."""
    steps, wait = curves.known("data_wait")
    skip = 3 if len(wait) >= 6 else 1
    steps, wait = steps[skip:], wait[skip:]
    if len(wait) < 2:
        return []
    share = float(wait[len(wait) // 2 :].mean())
    if share <= SLOW_DATA:
        return []
    near = np.array([wait[max(0, i - 1) : i + 2].mean() for i in range(len(wait))])
    fast = np.flatnonzero(near <= SLOW_DATA)
    since = int(steps[min(fast[-1] + 1, len(steps) - 1) if len(fast) else 0])
    _, speed = curves.known("img_per_s")
    figures = {"data_wait": share, **({"img_per_s": float(np.median(speed[len(speed) // 2 :]))} if len(speed) else {})}
    text = f"{share:.0%} of the time is spent waiting for data" + (
        f", at {figures['img_per_s']:.4g} img/s" if len(speed) else ""
    )
    return [Finding("starves for data", True, since, None, text, figures)]


def _stretches(mask: np.ndarray) -> list[tuple[int, int]]:
    """[first, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _levels(curves: Curves, key: str) -> tuple[np.ndarray, np.ndarray, int, float]:
    """(step, median) of about forty equal pieces of a figure, steps in each, and the noise of such a median."""
    steps, values = curves.known(key)
    size = max(5, len(values) // 40)
    pieces = len(values) // size
    if not pieces:
        return steps[:0], values[:0], size, 0.0
    steps, values = steps[-pieces * size :].reshape(pieces, size), values[-pieces * size :].reshape(pieces, size)
    level = np.median(values, axis=1)
    deviation = float(np.median(np.abs(values - level[:, None])))
    return steps[:, 0], level, size, 1.4826 * deviation * 1.2533 / size**0.5  # of the median of normal numbers


# --------------------------------------------------------------------------------------------------- what is set now

_KNOBS: Mapping[str, tuple[str, ...]] = {
    "collapse: uniform": ("method.teacher_temp", "method.warmup_teacher_temp", "optimizer.lr", "optimizer.base_lr"),
    "collapse: constant": ("method.center_momentum", "method.teacher_temp", "optimizer.lr", "optimizer.base_lr"),
    "collapse: features": ("optimizer.lr", "optimizer.base_lr", "optimizer.warmup", "views.global.scale"),
    "diverges": ("optimizer.lr", "optimizer.base_lr", "optimizer.warmup", "optimizer.clip"),
    "refuses steps": ("precision", "optimizer.lr", "optimizer.base_lr"),
    "flat loss": ("optimizer.lr", "optimizer.base_lr", "optimizer.warmup"),
    "starves for data": ("workers", "global_batch"),
}


def knobs(kind: str, config: Mapping[str, Any]) -> str:
    """The keys that the advice for `kind` is about, as a run's config.yaml has them: 'workers=2 global_batch=64'."""
    shown = []
    for key in _KNOBS.get(kind, ()):
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            shown.append(f"{key}={value}")
    if any(word.startswith("optimizer.lr=") for word in shown):  # which leaves base_lr without effect
        shown = [word for word in shown if not word.startswith("optimizer.base_lr=")]
    return " ".join(shown)
