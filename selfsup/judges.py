"""What can be wrong with a run, by its curves: it collapses, diverges, refuses steps, learns nothing, waits for data."""

import math
from dataclasses import dataclass

import numpy as np

from selfsup.columns import Curves
from selfsup.health import GRACE, PATIENCE, SLOW_DATA, collapse_of

RISE = 0.1
"""Part of the loss at the beginning by which a loss above it has diverged."""

EXPLODED = 1000.0
"""Times the first loss: above it a loss has diverged, after however few steps."""

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


@dataclass(frozen=True)
class Finding:
    """One thing that was seen."""

    kind: str
    """A key of `remedies.SEEN`."""
    problem: bool
    """False: worth knowing, and no more."""
    since: int
    """Step at which it began."""
    until: int | None
    """Last step of what is over; None: it lasts."""
    text: str
    figures: dict[str, float]


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
    if exploded := _exploded(curves):
        return [exploded]
    risen = _risen(curves, "loss")
    # of prototypes: the loss follows the teacher's entropy, up and down; a student that is lost has a divergence that rises too
    if risen is None or (len(curves.known("health.kl")[0]) and _risen(curves, "health.kl") is None):
        return []
    since, start, best, final = risen
    text = f"the loss is {final:.4g}; it began at {start:.4g} and was {best:.4g} at its lowest"
    return [Finding("diverges", True, since, None, text, {"loss": final, "loss_at_first": start, "loss_lowest": best})]


def _exploded(curves: Curves) -> Finding | None:
    """The last three losses are far above the first one: too few steps for `_risen`, if gradients soon are no numbers."""
    steps, values = curves.known("loss")
    if len(values) < 4:
        return None
    limit = EXPLODED * max(
        abs(float(values[0])), 0.01
    )  # some losses begin at 0, and none that is healthy goes to tens then
    if values[-3:].min() <= limit:
        return None
    since = int(steps[int(np.flatnonzero(values <= limit)[-1]) + 1])
    text = f"the loss is {values[-1]:.4g}; it began at {values[0]:.4g}"
    return Finding("diverges", True, since, None, text, {"loss": float(values[-1]), "loss_at_first": float(values[0])})


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
