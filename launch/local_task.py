"""One training or evaluation without Slurm: started, told of its limit, and started again as its cluster's policy says."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import commands, history, requeue
from .cluster import Cluster
from .job import TRAINING
from .requeue import Decision, Policy
from .submission import Submission, Then

_POLL_S = 0.1
_LOOK_S = 1.0
"""Between two looks at the history, for a `cancel`."""
_KILL_S = 30.0
"""Between the time limit and the end of patience."""
_KILLS = 3
"""The so many-th request to stop kills."""


@dataclass
class Asked:
    """What signals have asked the supervisor for, so many times."""

    since: float
    """When it began, seconds since the epoch."""
    stops: int = 0
    saves: int = 0


class Task:
    """A task of a run: all its starts, until one is the last."""

    def __init__(
        self, run: Path, told: Submission, asked: Asked, env: dict[str, str], *, cluster: Cluster, task: str, job: str,
        command: str, shown: bool,
    ) -> None:  # fmt: skip
        self._run, self._told, self._asked, self._task, self._job = run, told, asked, task, job
        self._cluster, self._command = cluster, command
        self._count = cluster.tasks if task == TRAINING else 1
        self._logs = (run / told.logs).resolve() / job
        self._env, self._shown = env, shown
        self._looked = 0.0
        self._cancelled = False

    @classmethod
    def training(cls, run: Path, told: Submission, asked: Asked, env: dict[str, str], *, shown: bool) -> "Task":
        """Of a run."""
        command = commands.training(run, told.cluster, _code(run, told))
        job = str(told.job)
        return cls(run, told, asked, env, cluster=told.cluster, task=TRAINING, job=job, command=command, shown=shown)

    @classmethod
    def evaluation(
        cls, run: Path, told: Submission, then: Then, asked: Asked, env: dict[str, str], *, shown: bool
    ) -> "Task":
        """Of a run that is done."""
        cluster, job = told.cluster.for_evaluation(), then.job or f"{told.job}-{then.task}"
        command = commands.evaluation(run, cluster, _code(run, told), then.task, then.overrides)
        return cls(run, told, asked, env, cluster=cluster, task=then.task, job=job, command=command, shown=shown)

    @classmethod
    def table(cls, sweep: Path, told: Submission, asked: Asked, env: dict[str, str], *, shown: bool) -> "Task":
        """Of a sweep."""
        cluster, job = told.cluster.for_evaluation(), told.table or f"{told.job}-table"
        command = commands.table(sweep, cluster, _code(sweep, told))
        return cls(sweep, told, asked, env, cluster=cluster, task="table", job=job, command=command, shown=shown)

    def run(self) -> Decision:
        """Until it is done, or not started again; the last decision. Raises OSError if it cannot be started at all."""
        restart = 0
        while True:
            seen: dict[str, Any] = {"JobState": "RUNNING", "Restarts": restart}
            code = requeue.STOPPED
            if not self._is_cancelled(at_once=True):
                code = self._start(restart, seen)
            if code != requeue.DONE and self._is_cancelled(at_once=True):
                seen["JobState"] = "COMPLETING"  # as after scancel
            outcome = requeue.read_outcome(self._run) if self._task == TRAINING else None
            decision = requeue.decide(
                code, job=self._job, restart=restart, task=self._task, outcome=outcome, seen=seen,
                events=history.read(self._run), policy=self._policy(), step=requeue.newest_step(self._run), now=time.time(),
            )  # fmt: skip
            decision, what = requeue.settle(
                self._run, decision, job=self._job, restart=restart, task=self._task, policy=self._policy()
            )
            self._say(what)
            if not decision.requeue:
                return decision
            end = time.monotonic() + decision.delay_s
            while time.monotonic() < end and not self._is_cancelled():
                time.sleep(_POLL_S)
            restart += 1

    def _start(self, restart: int, seen: dict[str, Any]) -> int:
        """One start; its exit code. What Slurm would say of a job at its limit is put into `seen`."""
        limit: float | None = None
        if self._cluster.time is not None:
            limit = time.monotonic() + 60 * self._cluster.time
            seen["EndTime"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 60 * self._cluster.time))
        self._say(f"(restart {restart}) starts: {self._task}, {self._count} rank(s)")
        tail = _Tail(Path(f"{self._logs}_0_log.out")) if self._shown else None
        env = {**self._env, "SELFSUP_JOB": self._job, "SELFSUP_RESTART": str(restart)}
        process = subprocess.Popen(
            ["/bin/bash", "-c", self._script()],
            cwd=self._told.cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        signals = _Signals(process.pid)
        saves = self._asked.saves
        while (code := process.poll()) is None:
            time.sleep(_POLL_S)
            if tail is not None:
                tail.show()
            if self._is_cancelled():
                signals.send(signal.SIGTERM, once=True)
            if self._asked.stops >= _KILLS:
                signals.send(signal.SIGQUIT, once=True)
            if self._asked.saves > saves:
                saves = self._asked.saves
                signals.send(signal.SIGUSR2)
            if limit is not None:
                late = time.monotonic() - limit
                if late > -self._cluster.signal_before_s:
                    signals.send(signal.SIGUSR2, once=True)
                if late > 0:
                    seen.update(JobState="COMPLETING", Reason="TimeLimit")
                    signals.send(signal.SIGTERM, once=True)
                if late > _KILL_S:
                    signals.send(signal.SIGQUIT, once=True)
        if tail is not None:
            tail.show()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what setup lines may have left
        return 128 - code if code < 0 else code

    def _script(self) -> str:
        """The lines of shell, as the script of a job on Slurm has them."""
        ranks = Path(__file__).with_name("local_ranks.py")
        command = f"{self._cluster.container} {self._command}" if self._cluster.container else self._command
        options = ["--count", str(self._count), "--logs", str(self._logs), "--parent", str(os.getpid())]
        words = [sys.executable, "-I", str(ranks), *options, command]
        exports = [f"export {name}={shlex.quote(value)}" for name, value in self._cluster.env.items()]
        return "\n".join([*exports, *self._cluster.setup, f"exec {shlex.join(words)}"])

    def _policy(self) -> Policy:
        wanted = self._cluster.requeue
        return Policy(
            wanted.timeouts, wanted.crashes, wanted.delay_s, wanted.max_delay_s, self._cluster.signal_before_s
        )

    def _is_cancelled(self, at_once: bool = False) -> bool:
        """By a signal, or for this run alone by an event of its history."""
        if self._asked.stops or self._cancelled:
            return True
        if at_once or time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            self._cancelled = any(
                event["event"] == "cancel"
                and event.get("job") == self._told.job
                and event.get("time", 0) > self._asked.since
                for event in history.read(self._run)
            )
        return self._cancelled

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            print(f"selfsup: job {self._job} {text}", flush=True)


class _Signals:
    """Sends signals to one process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._sent: set[int] = set()

    def send(self, number: int, once: bool = False) -> None:
        """once: no second time."""
        if not (once and number in self._sent):
            self._sent.add(number)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, number)


class _Tail:
    """Shows on the terminal what is added to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0

    def show(self) -> None:
        """What is new."""
        with contextlib.suppress(OSError), open(self._path, "rb") as file:
            file.seek(self._at)
            new = file.read()
            self._at += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()


def _code(run: Path, told: Submission) -> Path:
    return (run / told.code).resolve()
