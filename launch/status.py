"""How runs stand: `selfsup status`. Slurm is asked about all of them together; a run's folder tells the rest."""

import contextlib
import datetime
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsup.errors import UserError
from selfsup.guard import lease, ranks
from selfsup.log import duration
from selfsup.wording import printable

from . import figures, history, requeue, slurm, state, submission
from .figures import Figures
from .slurm import JobInfo
from .state import State, Story
from .submission import Submission

_ANSWERS_WITHIN_S = 300.0
"""A submission without a number is one that sbatch has yet to answer, or never will."""


@dataclass(frozen=True)
class RunStatus:
    """One run."""

    run: str
    state: State
    step: int
    steps: int | None
    restarts: int
    metrics: dict[str, float]
    host: str | None
    eta_s: float | None
    """Seconds until its last step; None unless it runs."""
    remarks: tuple[str, ...] = ()
    """For people: why it waits, and how its evaluations stand that do not run."""
    over: bool = False
    """Whether nothing more will happen unless somebody submits it again."""
    guessed: bool = False
    """Whether it goes on, as far as its folder tells; Slurm, which would know, does not answer."""

    def as_json(self) -> dict[str, Any]:
        """What programs may rely on."""
        keys = ("run", "state", "step", "steps", "restarts", "metrics", "host", "eta_s")
        return {key: getattr(self, key) for key in keys}


def describe(runs: Sequence[Path]) -> list[RunStatus]:
    """Of run folders, sweeps, and folders that hold some. What is wrong with one of many is told on stderr.

    Raises UserError for a folder that is none of these.
    """
    found = [_Seen.look(run) for run in dict.fromkeys(run for folder in runs for run in expand(folder))]
    answers = slurm.jobs(job for seen in found for job in seen.jobs())
    told: set[str] = set()
    return [seen.status(answers, told) for seen in found]


def of_folder(run: Path) -> RunStatus:
    """How a run stands as its folder tells; Slurm is not asked."""
    return _Seen.look(run).status({}, set())


def expand(folder: Path) -> list[Path]:
    """The runs that a folder stands for: itself, those of a sweep, or those in it. Raises UserError for one without."""
    if (own := _runs_of(folder)) is not None:
        return own
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; name a run folder, or one that holds some") from None
    found = [run for path in inside for run in _runs_of(path) or ()]
    if not found and folder.name != "runs":
        raise UserError(f"{folder} is no run folder, and holds none: there is no config.yaml and no {submission.FILE}")
    return found


def _runs_of(folder: Path) -> list[Path] | None:
    """None for a folder that is neither a run nor a sweep."""
    submitted = submission.path(folder).is_file()
    if not submitted and not (folder / "config.yaml").is_file():
        return None
    if submitted:
        with contextlib.suppress(UserError):  # of a damaged one, told when it is looked at
            found = submission.read(folder)
            if found is not None and found.runs != (".",):
                return [folder / name for name in found.runs]
    return [folder]


@dataclass(frozen=True)
class _Seen:
    """What is in a run's folder."""

    run: Path
    submitted: Submission | None
    sweep: Submission | None
    """Of the sweep that it is part of."""
    events: list[dict[str, Any]]
    story: Story
    figures: Figures

    @classmethod
    def look(cls, run: Path) -> "_Seen":
        submitted, sweep = _read(run), None
        if submitted is not None and submitted.part_of is not None:
            sweep = _read(run / submitted.part_of)
        events = history.read(run)
        job = submitted.job if submitted is not None else None
        story = state.tell(events, job, "train", requeue.read_outcome(run))
        return cls(run, submitted, sweep, events, story, figures.read(run, _number(story.start.get("time"))))

    def jobs(self) -> Iterable[str]:
        """Numbers of all its jobs that Slurm has."""
        if self.submitted is not None and self.submitted.kind == "slurm":
            own = self.submitted.job
            yield from (job for job in (own, *(job for _, job in self._dependents())) if job)

    def _dependents(self) -> Iterable[tuple[str, str | None]]:
        """(what it does, its number) of each job that follows; the table of a sweep follows all its runs."""
        if self.submitted is None:
            return
        here = self.submitted.kind != "slurm"
        for then in self.submitted.then:
            yield then.task, then.job or (f"{self.submitted.job}-{then.task}" if here else None)
        if not here:
            yield from figures.evaluation_jobs(self.run)
        if self.sweep is not None:
            yield "table", self.sweep.table

    def status(self, answers: Mapping[str, JobInfo], told: set[str]) -> RunStatus:
        """told: jobs that were remarked upon already; those of a sweep belong to all its runs."""
        info = answers.get(self.submitted.job or "") if self.submitted is not None else None
        now = self.state(info)
        known = info if info is not None and info.state else None
        restarts = known.restarts if known is not None and known.restarts is not None else self.story.restart
        remarks = []
        if known is not None and known.state in slurm.WAITING and known.reason:
            until = f", until {known.start}" if known.reason == "BeginTime" and known.start else ""
            remarks.append(f"waits: {known.reason}{until}")
        if now == "completed" and self.figures.stopped_early:
            remarks.append(f"stopped early at step {self.figures.step}: its evaluations got no better")
        remarks += self._afterwards(answers, told)
        return RunStatus(
            run=str(self.run),
            state=now,
            step=self.figures.step,
            steps=self.figures.steps,
            restarts=restarts or 0,
            metrics=self.figures.metrics,
            host=None if now == "queued" else self._host(known),
            eta_s=self.figures.eta_s if now == "running" else None,
            remarks=tuple(remarks),
            over=now in state.FINAL or (known is not None and known.state == "PREEMPTED"),
            guessed=not answers and any(self.jobs()) and now not in state.FINAL,
        )

    def state(self, info: JobInfo | None) -> State:
        """info: what Slurm says of its job; None if nobody answered."""
        held = lease.holder(self.run) is not None
        if self.submitted is None or (held and not self._of_a_job()):  # or somebody goes on with it without a job
            beat = self._beat()
            return state.of_plain(self.figures.finished, held, beat.state if beat is not None else None)
        if info is not None and info.state:
            return state.of_slurm(info, self.story, self.figures.finished)
        if self.submitted.kind != "slurm":
            return self._local(held)
        if self.submitted.job is None:
            return "queued" if _age_s(self.submitted.submitted) < _ANSWERS_WITHIN_S else "failed"
        elsewhere = self.submitted.slurm_conf not in (None, os.environ.get("SLURM_CONF"))
        gone = info is not None and not held and not elsewhere
        return state.of_folder(self.story, self.figures.finished, held, gone)

    def _local(self, held: bool) -> State:
        from .local import supervisor_alive

        supervised = supervisor_alive(self.run)
        gone = supervised is False and not held
        if gone and self.story.last in ("", "requeue") and self.story.over() is None:
            return "failed"  # its supervisor was killed: nobody cancelled it
        return state.of_folder(self.story, self.figures.finished, held or supervised is True, gone)

    def _of_a_job(self) -> bool:
        """Whether who trains here is a job's process, which the scheduler knows better than its lease does."""
        told = figures.read_object(self.run / lease.FILE)
        return not told or "job" in told

    def _beat(self) -> ranks.Beat | None:
        try:
            return ranks.Beat.decode(ranks.file_of(self.run / "ranks", 0).read_bytes()[: ranks.SIZE])
        except OSError:
            return None

    def _host(self, info: JobInfo | None) -> str | None:
        if info is not None and info.host:
            return info.host
        if isinstance(host := self.story.start.get("host"), str):
            return printable(host)
        beat = self._beat()
        return beat.process.host if beat is not None else None

    def _afterwards(self, answers: Mapping[str, JobInfo], told: set[str]) -> Iterable[str]:
        """Of the evaluations, and the table of a sweep, that wait or failed."""
        for task, job in self._dependents():
            if job is None or job in told:
                continue
            info = answers.get(job, slurm.UNKNOWN)
            code = state.tell(self.events, job, task, None).code
            if info.state in slurm.WAITING:
                text = f"waits: {info.reason}" if info.reason else "waits"
            elif info.state in slurm.FAILED or (not info.state and code):
                text = f"failed; its log: {self._log(job)}"
            elif info.state == "CANCELLED":
                text = "cancelled"
            else:
                continue
            told.add(job)
            yield f"{task} (job {job}) {text}"

    def _log(self, job: str) -> Path:
        assert self.submitted is not None
        return submission.log(self.run, self.submitted, job)


def _read(run: Path) -> Submission | None:
    """None, and a line on stderr, for one that cannot be read."""
    try:
        return submission.read(run)
    except UserError as error:
        print(f"selfsup: {error}", file=sys.stderr)
        return None


def _age_s(when: str) -> float:
    """Seconds since a time as submission.json has it; endless for what is no time."""
    try:
        then = datetime.datetime.fromisoformat(when)
        return (datetime.datetime.now(datetime.UTC) - then).total_seconds()
    except (ValueError, TypeError):
        return float("inf")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


# ---------------------------------------------------------------------------------------------------------- for people

_HEADS = ("run", "state", "step", "ETA", "img/s", "top-1", "restarts", "host")
_RIGHT = {"step", "ETA", "img/s", "top-1", "restarts"}
_DISPENSABLE = ("restarts", "img/s", "host")
"""On a narrow terminal; the first is the first to go."""


def table(statuses: Sequence[RunStatus]) -> str:
    """One line a run, and below them what waits or failed. On a terminal, columns are left out and names cut to fit it."""
    from . import columns

    if not statuses:
        return "no runs here"
    rows: list[Sequence[str]] = [_HEADS, *map(_cells, statuses)]
    if sys.stdout.isatty():
        rows = columns.fitted(rows, shutil.get_terminal_size().columns, _DISPENSABLE)
    lines = columns.aligned(rows, right=_RIGHT)
    notes = _notes(statuses)
    if any(status.guessed for status in statuses):
        notes.append("Slurm does not answer: runs that are not over are shown as their folders tell")
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _notes(statuses: Sequence[RunStatus]) -> list[str]:
    """Remarks, each once, with the first run it is about; the jobs of an array are one."""
    about: dict[str, list[tuple[str, str]]] = {}
    for status in statuses:
        for remark in status.remarks:
            common = re.sub(r"\(job (\d+)_\d+\) ([^;]*).*", r"(job \1) \2", remark)
            about.setdefault(common, []).append((status.run, remark))
    notes = []
    for common, ((run, remark), *others) in about.items():
        more = f" and {len(others)} more" if others else ""
        notes.append(f"{printable(run)}{more}: {printable(common if others else remark)}")
    return notes


def _cells(status: RunStatus) -> tuple[str, ...]:
    speed, shown = status.metrics.get("img_per_s"), ""
    if (name := figures.chosen_by([status.metrics])) is not None:
        shown = f"{100 * status.metrics[name]:.1f} %" + (" k-NN" if name == "knn_top1" else "")
        at = status.metrics.get(figures.step_key(name))
        if at is not None and at != status.step:
            shown += f" at {at:.0f}"
    return (
        printable(status.run),
        status.state,
        f"{status.step}/{status.steps}" if status.steps is not None else str(status.step),
        duration(status.eta_s) if status.eta_s is not None else "",
        f"{speed:.0f}" if speed is not None and status.state == "running" else "",
        shown,
        str(status.restarts),
        status.host or "",
    )
