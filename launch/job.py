"""What a task of a job runs: one rank of a training, or an evaluation; and what it leaves behind of how it went."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from selfsup import config, durable
from selfsup.config import Config
from selfsup.errors import DiskError, EarlyStop, RankLost, UserError

from . import environment, history, rendezvous, requeue, submission
from .environment import Place

TRAINING = "train"
_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def member(folder: Path) -> Path:
    """The run of this job: the folder itself, or of a sweep, whose jobs are an array, the run of this one's index.

    Raises UserError if that cannot be told.
    """
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    told = submission.read(folder)
    if told is None:
        raise UserError(f"{submission.path(folder)}: not there; jobs are made by `selfsup submit`")
    if told.runs == (".",):
        return folder
    if index is None:
        raise UserError(f"{folder} is a sweep of {len(told.runs)} runs, and SLURM_ARRAY_TASK_ID is not set")
    if not (index.isdecimal() and int(index) < len(told.runs)):
        raise UserError(f"SLURM_ARRAY_TASK_ID={index!r}: {folder} has {len(told.runs)} runs")
    return folder / told.runs[int(index)]


def run_training(folder: Path, train: Callable[[Config, Path], None]) -> None:
    """One rank: meet the others, train, and say how it ended. Raises what the training does.

    A signal to stop is heeded from here on, also during the seconds that imports take.
    """
    with _signals_wait():
        from selfsup.signals import StopSignals

        signals = StopSignals()
        signals.__enter__()  # for good: the training's own, inside it, begins with what this one received
    run = member(folder)
    place = environment.find()
    environment.export(place)
    with _told(run, place, TRAINING):
        configuration = config.load(str(run / submission.CONFIG))
        if place.world > 1:
            _meet(run, place, lambda: signals.received is not None)
        _record(run, place, TRAINING, "start", host=place.node, world=place.world, step=_step(run))
        try:
            train(configuration, run)
        except EarlyStop as error:
            if configuration.stop_at is not None and _step(run) >= configuration.stop_at:
                raise _StopAt(str(error)) from None
            raise


def run_evaluation(
    folder: Path, task: str, overrides: list[str], evaluate: Callable[[str, Path, list[str]], None]
) -> None:
    """An evaluation of the run, of one task. Raises what it does."""
    run = member(folder)
    place = environment.find()
    if place.world > 1:
        raise UserError(f"an evaluation is one task, not {place.world}: cluster key evaluation.tasks_per_node")
    environment.export(place)
    _record(run, place, task, "start", host=place.node, world=1, step=_step(run))
    with _told(run, place, task):
        evaluate(task, run, overrides)


class _StopAt(EarlyStop):
    """It has come as far as the configuration lets it: to start it again would change nothing."""


class _DiskFailed(RankLost):
    """Exit code 1, as of a rank that is gone: started again, a bounded number of times. It may pass without the user."""


def _meet(run: Path, place: Place, stopped: Callable[[], bool]) -> None:
    from selfsup import dist

    told = submission.read(run)
    store, port = rendezvous.meet(place, ports=told.cluster.ports if told is not None else None, stopped=stopped)
    environment.export(place, port)
    dist.use_store(store, place.rank, place.world)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals to stop are kept until the end of this. No child process may be started inside: it would never get them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before - set(_STOP_SIGNALS))


@contextlib.contextmanager
def _told(run: Path, place: Place, task: str) -> Iterator[None]:
    """How this ends, in the history and, of a training, in outcome.json: rank 0 alone writes them."""
    code, why = requeue.DONE, ""
    try:
        yield
    except EarlyStop as error:
        code, why = requeue.STOPPED, f"stop_at: {error}" if isinstance(error, _StopAt) else str(error)
        raise
    except DiskError as error:
        code, why = requeue.CRASH, str(error)
        raise _DiskFailed(why) from None
    except UserError as error:
        code, why = requeue.USER_ERROR, str(error)
        raise
    except BaseException as error:
        code, why = requeue.CRASH, f"{type(error).__name__}: {error}"[:500]
        raise
    finally:
        _record(run, place, task, "end", code=code, why=why, step=_step(run))
        if place.rank == 0 and task == TRAINING:
            _write_outcome(run, place, code, why)


def _write_outcome(run: Path, place: Place, code: int, why: str) -> None:
    """Unless a later start of the job has written its own: this one was on a node that was thought lost."""
    before = requeue.read_outcome(run)
    if before is not None and before.get("job") == place.job and (before.get("restart") or 0) > place.restart:
        return
    values = {
        "job": place.job,
        "restart": place.restart,
        "task": TRAINING,
        "code": code,
        "why": why,
        "step": _step(run),
    }
    try:
        durable.write_atomically(run / requeue.OUTCOME, json.dumps(values) + "\n")
    except OSError as error:
        _say(f"{run / requeue.OUTCOME}: cannot be written: {error.strerror or error}")


def _record(run: Path, place: Place, task: str, event: str, **fields: object) -> None:
    if place.rank != 0:
        return
    try:
        history.append(run, event, job=place.job, restart=place.restart, task=task, **fields)
    except OSError as error:
        _say(f"{run / history.FILE}: cannot be written: {error.strerror or error}")


def _step(run: Path) -> int:
    return requeue.newest_step(run) or 0


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"selfsup: {text}", file=sys.stderr, flush=True)
