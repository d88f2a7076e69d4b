"""Jobs without Slurm: a process that supervises the runs of a submission on this machine, in the background or here.

It does what the scheduler and the job's script do on a cluster: starts the ranks, tells them of the time limit, decides by
the same policy whether they are started again (`requeue.decide`), and then runs the evaluations and a sweep's table.
TERM and INT to it cancel: the ranks save and end. USR2 and USR1 have them save and start again. A third TERM kills.
"""

import concurrent.futures
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from selfsup import durable
from selfsup.errors import EarlyStop, RankLost, UserError
from selfsup.guard.processes import Process

from . import history, submission
from .environment import OF_A_RANK
from .local_task import Asked, Task
from .requeue import CRASH, DONE, STOPPED, USER_ERROR, Decision
from .submission import Submission

FILE = "job/supervisor.json"
_START_S = 120.0
_OF_ANOTHER_JOB = ("SLURM_", "SLURMD_", "SUBMITIT_", "TORCHELASTIC_", "PMI_", "PMIX_")
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SAVES = (signal.SIGUSR1, signal.SIGUSR2)


def start(folder: Path, submission: Submission, *, foreground: bool) -> None:
    """Run a submission: in the background, returning once its supervisor is up; or here, until all is over.

    Raises UserError if it cannot be started; in the foreground also what became of the training: EarlyStop, RankLost.
    """
    _refuse_another(folder)
    if foreground:
        _supervise(folder, terminal=True)
        return
    told = _told(folder)
    log = (folder / told.logs).resolve() / f"{told.job}_log.out"
    code = str((folder / told.code).resolve())
    env = _environment(code)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [code, env.get("PYTHONPATH")]))
    words = [sys.executable, "-P", "-m", "selfsup.cli", "job", "supervise", str(folder.absolute())]
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as out:
            began = subprocess.Popen(
                words, cwd=told.cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot start in the background: {error.strerror}") from None
    try:
        _wait_for(began, folder, log)
    except BaseException:  # who gets this takes the submission back: nothing of it may go on
        began.kill()
        began.wait()
        raise


def _wait_for(began: "subprocess.Popen[bytes]", folder: Path, log: Path) -> None:
    """Until it has written who it is. Raises UserError with its last line if it ends, or takes too long."""
    end = time.monotonic() + _START_S
    while (seen := _read(folder)) is None or seen.pid != began.pid:
        if began.poll() is not None or time.monotonic() > end:
            lines = log.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
            raise UserError(f"{folder}: its supervisor does not start: {lines[-1]}\nIts log: {log}")
        time.sleep(0.05)


def supervise(folder: Path) -> None:
    """What the background process runs. Raises as `start` does in the foreground."""
    _supervise(folder, terminal=False)


def supervisor_alive(run: Path) -> bool | None:
    """Whether a process supervises this run or sweep; None if that cannot be told from this host."""
    found = [process.alive() for _, process in _supervisors(run)]
    return True if True in found else None if None in found else False


def stop(run: Path) -> None:
    """Have a run, or all of a sweep, save and end. Does nothing if nobody supervises it; UserError on another host."""
    for folder, process in _supervisors(run):
        alive = process.alive()
        if alive is None:
            raise UserError(f"{run} is run on host {process.host}, by process {process.pid}: cancel it there")
        if alive and folder == run:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)
        elif alive:  # of its sweep: the others go on
            _ask_to_cancel(run)


def _ask_to_cancel(run: Path) -> None:
    """An event that the supervisor looks for; once is enough."""
    told, events = _told(run), history.read(run)
    if events and events[-1]["event"] == "cancel":
        return
    restart = max((e["restart"] for e in events if e.get("job") == told.job and e["event"] == "start"), default=0)
    try:
        history.append(run, "cancel", job=told.job, restart=restart, task="train")
    except OSError as error:
        raise UserError(f"{run / history.FILE}: cannot be written: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------------------ who supervises


def _supervisors(run: Path) -> Iterator[tuple[Path, Process]]:
    """(folder, process): its own, and that of the sweep it is part of."""
    if (own := _read(run)) is not None:
        yield run, own
    told = submission.read(run)
    if told is not None and told.part_of is not None:
        sweep = run / told.part_of
        if (other := _read(sweep)) is not None:
            yield sweep, other


def _read(folder: Path) -> Process | None:
    try:
        return Process.parse(json.loads((folder / FILE).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None


def _refuse_another(folder: Path) -> None:
    for where, process in _supervisors(folder):
        if process != Process.current() and process.alive():
            raise UserError(f"{where} is supervised by process {process.pid} already; `selfsup cancel {where}` ends it")


def _told(folder: Path) -> Submission:
    told = submission.read(folder)
    if told is None or told.job is None:
        raise UserError(
            f"{submission.path(folder)}: {'not there' if told is None else 'has no job'}; use `selfsup submit`"
        )
    return told


def _environment(code: str) -> dict[str, str]:
    """This process's, without marks of a job that it may itself be part of. Devices stay as they are.

    Nor is the snapshot on PYTHONPATH, which the supervisor itself runs from: each command puts it there.
    """
    foreign = {name for name in os.environ if name.startswith(_OF_ANOTHER_JOB) and name != "SLURM_CONF"}
    env = {name: value for name, value in os.environ.items() if name not in foreign | OF_A_RANK}
    first, _, rest = env.get("PYTHONPATH", "").partition(os.pathsep)
    if first == code:
        env.pop("PYTHONPATH")
        env |= {"PYTHONPATH": rest} if rest else {}
    return env


# --------------------------------------------------------------------------------------------------------- supervising


def _supervise(folder: Path, *, terminal: bool) -> None:
    """All runs, then the table."""
    folder = folder.absolute()
    told = _told(folder)
    _refuse_another(folder)
    asked = Asked(since=time.time())

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number in _SAVES:
            asked.saves += 1
        else:
            asked.stops += 1

    before = {number: signal.signal(number, on_signal) for number in (*_STOPS, *_SAVES)}
    try:
        (folder / told.logs).mkdir(parents=True, exist_ok=True)
        durable.write_atomically(folder / FILE, json.dumps(asdict(Process.current())) + "\n")
        env = _environment(str((folder / told.code).resolve()))
        several = told.runs != (".",)
        at_once = 1 if terminal else min(told.cluster.array_parallelism or 1, len(told.runs))
        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            waiting = [pool.submit(_run, folder / name, asked, env, terminal) for name in told.runs]
            while not all(each.done() for each in waiting):
                time.sleep(0.1)  # in slices: it is the main thread that hears signals
        decisions = [each.result() for each in waiting]
        if several and not asked.stops:
            Task.table(folder, told, asked, env, shown=terminal).run()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror or error}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    _raise(folder, told, decisions)


def _run(run: Path, asked: Asked, env: dict[str, str], shown: bool) -> Decision:
    """One run and the evaluations that follow it; how the training ended."""
    told = _told(run)
    decision = Task.training(run, told, asked, env, shown=shown).run()
    if decision.reason == "done":
        for then in told.then:
            Task.evaluation(run, told, then, asked, env, shown=shown).run()
    return decision


def _raise(folder: Path, told: Submission, decisions: list[Decision]) -> None:
    """What became of the worst of the runs, if not all are done; names its log."""
    order = (CRASH, USER_ERROR, STOPPED, DONE)
    worst = min(decisions, key=lambda each: order.index(each.code) if each.code in order else 0)
    where = (folder / told.logs).resolve()
    if worst.code == STOPPED or worst.reason == "cancelled":
        raise EarlyStop(f"{worst.reason}; go on with: selfsup submit ... --out {folder} --resume")
    if worst.code == USER_ERROR:
        raise UserError(f"the training was refused; what it says is in {where}")
    if worst.code != DONE:
        raise RankLost(f"the training failed with code {worst.code} ({worst.reason}); its logs: {where}")
