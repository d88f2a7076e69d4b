"""`selfsup cancel RUN`: end a run, or all of a sweep, with the evaluations that wait for it."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from selfsup.errors import UserError
from selfsup.wording import one_line

from . import figures, history, requeue, slurm, state, status, submission
from .slurm import JobInfo
from .state import FINAL, Story
from .status import RunStatus
from .submission import Submission

_LIVE = slurm.WAITING | slurm.RUNNING | slurm.ENDING | slurm.HALTED - {"PREEMPTED"}
_TIMEOUT_S = 60.0


def cancel(run: Path) -> None:
    """Of a run of a sweep its job alone; of a sweep's folder all its jobs, and the one that writes its table.

    That it was asked for is written down before Slurm is told: a job that is told to end must not ask for a requeue.
    Says what it did, also when nothing was left to do. Raises UserError for what was never submitted, and if Slurm refuses.
    """
    submitted = submission.read(run)
    if submitted is None:
        if not run.is_dir():
            raise UserError(f"{run}: no such folder; name a run folder")
        raise UserError(f"{run} was not submitted; a run of `selfsup train` is ended with Ctrl-C, where it was started")
    seen = dict(zip(_runs(run, submitted), status.describe([run])))
    going = [each for each, found in seen.items() if found.state not in FINAL]
    if submitted.kind != "slurm":
        _stop_here(run, going, seen)
        return
    if submitted.job is None:
        raise UserError(f"{run}: its job has no number yet, or sbatch never took it; try again in a moment")
    named = _jobs(run, submitted, list(seen))
    answers = slurm.jobs(named)
    if not answers:  # nobody knows: Slurm is told all the same, unless the runs themselves say that they are over
        going = [each for each in seen if _own_account(each).over() is None]
    live = {job: what for job, what in named.items() if _lives(job, answers, going)}
    if not live:
        print(f"{run}: nothing to cancel, it is over: {_tally(seen)}")
        return
    _note(going, "cancel")
    if (refused := _scancel(list(live))) is not None:
        _note(going, "cancel refused")
        raise UserError(f"scancel refuses: {refused}")
    print(f"{run}: cancelled {', '.join(f'{what} (job {job})' for job, what in live.items())}")


def _jobs(run: Path, submitted: Submission, runs: list[Path]) -> dict[str, str]:
    """What each of its jobs does, by number. An array's stands for all its jobs; a run may have been submitted again, alone."""
    named: dict[str, str] = {}
    for folder, told in [(run, submitted), *((each, submission.read(each)) for each in runs if each != run)]:
        own = [(told.job, "training"), *((then.job, then.task) for then in told.then)] if told is not None else []
        for job, what in [*own, *((job, what) for what, job in figures.evaluation_jobs(folder))]:
            if job is not None and job.split("_")[0] not in named:
                named[job] = what
    if submitted.table:
        named[submitted.table] = "table"
    return named


def _runs(run: Path, submitted: Submission) -> list[Path]:
    return status.expand(run) if submitted.runs != (".",) else [run]


def _lives(job: str, answers: Mapping[str, JobInfo], going: list[Path]) -> bool:
    info = answers.get(job)
    return bool(going) if info is None else info.state in _LIVE


def _own_account(run: Path) -> Story:
    told = submission.read(run)
    job = told.job if told is not None else None
    return state.tell(history.read(run), job, "train", requeue.read_outcome(run))


def _tally(seen: Mapping[Path, RunStatus]) -> str:
    """'completed', or of several '3 completed, 1 failed'."""
    states = [found.state for found in seen.values()]
    if len(states) == 1:
        return states[0]
    return ", ".join(f"{states.count(each)} {each}" for each in state.STATES if each in states)


def _stop_here(run: Path, going: list[Path], seen: Mapping[Path, RunStatus]) -> None:
    from . import local

    follows = any(found.state == "completed" for found in seen.values())  # evaluations, and a sweep's table
    if not going and not (follows and local.supervisor_alive(run)):
        print(f"{run}: nothing to cancel, it is over: {_tally(seen)}")
        return
    _note(going, "cancel")
    try:
        local.stop(run)
    except UserError:
        _note(going, "cancel refused")
        raise
    what = f"{len(going)} runs" if len(going) > 1 else "training" if going else "what follows the training"
    print(f"{run}: cancelled {what}")


def _note(runs: list[Path], event: str) -> None:
    """Into each run's history. One that cannot be written is told about; Slurm is told all the same."""
    for run in runs:
        told = submission.read(run)
        if told is None or told.job is None:
            continue
        try:
            history.append(run, event, job=told.job, restart=_own_account(run).restart or 0, task="train")
        except OSError as error:
            print(f"{run / history.FILE}: cannot be written: {error.strerror or error}", file=sys.stderr)


def _scancel(jobs: list[str]) -> str | None:
    """None, or what scancel said when it refused."""
    try:
        done = subprocess.run(
            ["scancel", *jobs], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except FileNotFoundError:
        return "scancel is not found; cancel where Slurm is, or load its module"
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT_S:g} s; try again"
    said = done.stderr.replace("scancel: error: ", "").strip()
    return None if done.returncode == 0 else one_line(said or f"exit code {done.returncode}")
