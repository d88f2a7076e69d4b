"""How far a run has come: step, speed, time left, and the newest figure of each evaluation. From the ends of its files."""

import contextlib
import itertools
import json
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfsup.log import last_step

from . import submission

_TAIL = 1 << 17
"""Bytes of metrics.jsonl that speed and loss are read from: some hundred lines."""
_STAMPS = 50
"""Lines with a time stamp, the newest, that the speed is taken from."""
_FAR = 1 << 21
"""Bytes of it that are searched, from its end, for the newest evaluation."""
_EVALUATIONS = 20
"""Evaluated checkpoints, the newest, that are looked at."""
_SMALL = 1 << 20
"""No file of figures is longer; what is, is something else."""
_CHECKPOINT = re.compile(r"step_(\d{8,18})")
_DURATION = re.compile(r"^steps: *(\d{1,18}) *$", re.M)


@dataclass(frozen=True)
class Figures:
    """What the files of a run say."""

    step: int
    steps: int | None
    """The last one; None as long as it depends on the number of images, and no checkpoint tells it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """loss, img_per_s, top1 and knn_top1 with top1_step and knn_step (at which they were measured), linear_top1, ..."""
    seconds_a_step: float | None = None
    stopped_early: bool = False
    """Its evaluations got no better: `step` was its last one, before `steps`."""

    @property
    def finished(self) -> bool:
        return self.stopped_early or (self.steps is not None and self.step >= self.steps)

    @property
    def eta_s(self) -> float | None:
        """Seconds of training that are left."""
        if self.steps is None or self.seconds_a_step is None:
            return None
        return round(max(0, self.steps - self.step) * self.seconds_a_step, 1)


def read(run: Path, since: float | None = None) -> Figures:
    """since: epoch seconds; what happened before, in an earlier start, says nothing about the speed now."""
    log = run / "metrics.jsonl"
    raw = tail(log, _TAIL)
    newest = next(_lines(raw, newest_first=True), {})
    lines = list(itertools.islice(_lines(raw, newest_first=True, holding=b'"time": '), _STAMPS))[::-1]
    step = newest["step"] if newest else _last_step(log)
    metrics: dict[str, float] = {}
    if (loss := _number(newest.get("loss"))) is not None:
        metrics["loss"] = loss
    speed = next((x for line in reversed(lines) if (x := _number(line.get("img_per_s"))) is not None), None)
    if speed is not None:
        metrics["img_per_s"] = speed
    metrics |= _evaluations(run, log, step)
    steps = total_steps(run)
    early = (steps is None or step < steps) and _stopped_early(run, step)
    return Figures(step, steps, metrics, _seconds_a_step(lines, newest, since, speed), early)


CHOSEN_BY = ("top1", "classify_top1", "knn_top1")
"""What tells whether a run is good, the first that there is: of what it learned to tell during training or after, or k-NN."""


def chosen_by(metrics: Iterable[Mapping[str, float]]) -> str | None:
    """The figure of CHOSEN_BY that runs with these metrics are compared by: the first that any has."""
    there = {name for each in metrics for name in each}
    return next((name for name in CHOSEN_BY if name in there), None)


def step_key(name: str) -> str:
    """The key of the step at which a figure of CHOSEN_BY was measured."""
    return f"{name.removesuffix('_top1')}_step"


def total_steps(run: Path) -> int | None:
    """From the configuration where it says so, else from the newest checkpoint that does."""
    if (found := _DURATION.search(_text(run / "config.yaml"))) is not None:
        return int(found[1])
    for _, trainer in _trainers(run):
        steps = trainer.get("steps")
        if type(steps) is int:
            return steps
    found = _DURATION.search(_text(run / submission.CONFIG))
    return int(found[1]) if found else None


def _trainers(run: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(step, trainer.json) of the newest checkpoints, the newest first."""
    try:
        folders = sorted(
            (int(m[1]), name) for name in os.listdir(run / "checkpoints") if (m := _CHECKPOINT.fullmatch(name))
        )
    except OSError:
        return
    for step, name in reversed(folders[-3:]):
        yield step, read_object(run / "checkpoints" / name / "trainer.json")


def _stopped_early(run: Path, step: int) -> bool:
    """Whether the newest checkpoint is of this step and says that no further one was to follow."""
    at, trainer = next(_trainers(run), (-1, {}))
    told = trainer.get("early_stop")
    return at == step and isinstance(told, dict) and told.get("stopped") is True


def _seconds_a_step(
    lines: list[dict[str, Any]], newest: dict[str, Any], since: float | None, speed: float | None
) -> float | None:
    """Median over the pieces between two time stamps, so that an evaluation or a pause in between does not count."""
    stamps = [(line["step"], t) for line in lines if (t := _number(line.get("time"))) is not None]
    stamps = [(step, t) for step, t in stamps if since is None or t > since]
    pieces = [
        (t - t0) / (step - step0) for (step0, t0), (step, t) in itertools.pairwise(stamps) if step > step0 and t >= t0
    ]
    if pieces:
        return statistics.median(pieces)
    samples = _number(newest.get("samples"))
    if not speed or not samples or not newest["step"]:
        return None
    return samples / newest["step"] / speed


# -------------------------------------------------------------------------------------------------------- evaluations


def _evaluations(run: Path, log: Path, step: int) -> dict[str, float]:
    """The newest of each: of the log, of RUN/eval/TASK.json and of RUN/eval/step_N/TASK.json, by the step it was made at."""
    found: dict[str, tuple[int, float]] = {}  # name -> (step, figure)

    def offer(name: str, at: int, value: float) -> None:
        if name not in found or at >= found[name][0]:
            found[name] = (at, value)

    for line in _lines(_last_evaluation(log)):
        values = line.get("eval")
        for name, value in values.items() if isinstance(values, dict) else ():
            if re.fullmatch(r"(\w+_)?top1", name) and (number := _number(value)) is not None:
                offer(name, line["step"], number)
    for file, at in _result_files(run / "eval", step):
        name, value = _figure(file)
        target = read_object(file).get("target")
        told = target.get("step") if isinstance(target, dict) else None
        if value is not None:
            offer(name, told if type(told) is int else at, value)
    out: dict[str, float] = {}
    for name, (at, value) in sorted(found.items()):
        out[name] = value
        if name in CHOSEN_BY:
            out[step_key(name)] = at
    return out


def _result_files(folder: Path, step: int) -> Iterator[tuple[Path, int]]:
    """(file, the step it belongs to unless it says so): of the newest checkpoint that has any, then of the run itself."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    steps = sorted(((int(m[1]), name) for name in names if (m := _CHECKPOINT.fullmatch(name))), reverse=True)
    seen: set[str] = set()
    for at, name in steps[:_EVALUATIONS]:
        for file in _json_files(folder / name):
            if file.name not in seen:
                seen.add(file.name)
                yield file, at
    for file in _json_files(folder):
        yield file, step


def _json_files(folder: Path) -> list[Path]:
    """TASK.json, not those of a student, a checkpoint or random weights."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if re.fullmatch(r"[a-z]+\.json", name))
    except OSError:
        return []


def evaluation_jobs(run: Path) -> list[tuple[str, str]]:
    """(what it is, number) of each job that evaluates a checkpoint beside the training, and has no result yet."""
    try:
        names = [name for name in os.listdir(run / "eval") if _CHECKPOINT.fullmatch(name)]
    except OSError:
        return []
    found = []
    for name in sorted(names)[-_EVALUATIONS:]:
        told = read_object(run / "eval" / name / "job.json")
        task, job = told.get("task"), told.get("job")
        if isinstance(task, str) and isinstance(job, str) and not (run / "eval" / name / f"{task}.json").exists():
            found.append((f"{task} of {name}", job))
    return found


def _figure(file: Path) -> tuple[str, float | None]:
    """(its name, the figure): of several metrics top1, else the first."""
    metrics = read_object(file).get("metrics")
    numbers = {k: x for k, v in metrics.items() if (x := _number(v)) is not None} if isinstance(metrics, dict) else {}
    name = "top1" if "top1" in numbers else next(iter(numbers), "top1")
    return f"{file.stem}_{name}", numbers.get(name)


def _last_evaluation(log: Path) -> bytes:
    """The newest line of a log that holds one, or nothing."""
    raw = tail(log, _TAIL)
    if (at := raw.rfind(b'"eval": {')) < 0:
        raw = tail(log, _FAR)
        at = raw.rfind(b'"eval": {')
    if at < 0:
        return b""
    end = raw.find(b"\n", at)
    return raw[raw.rfind(b"\n", 0, at) + 1 : end + 1] if end >= 0 else b""


# -------------------------------------------------------------------------------------------------------------- files


def _last_step(log: Path) -> int:
    """Of a log whose end is no text, as a crash may leave it."""
    with contextlib.suppress(OSError):
        return last_step(log)
    return 0


def tail(path: Path, size: int) -> bytes:
    """The last bytes of a file, from the beginning of a line on; nothing if it cannot be read."""
    try:
        with open(path, "rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            raw = file.read(size)
    except OSError:
        return b""
    return raw if length <= size else raw[raw.find(b"\n") + 1 :]


def _lines(raw: bytes, newest_first: bool = False, holding: bytes = b"") -> Iterator[dict[str, Any]]:
    """Whole lines of metrics.jsonl that hold these bytes; what is no such line is passed over."""
    lines = raw.split(b"\n")[:-1]
    for line in reversed(lines) if newest_first else lines:
        if holding not in line:
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            yield values


def _text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_SMALL)
    except OSError:
        return ""


def read_object(path: Path) -> dict[str, Any]:
    """{} for a file that is not there, or holds something else."""
    try:
        values = json.loads(_text(path))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _number(value: Any) -> float | None:
    """None for what JSON has no number for: NaN is written as text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None
