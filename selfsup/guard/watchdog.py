"""Notices a run that hangs, or whose other ranks have ended, and says which, where and why.

A thread writes this rank's state to RUN/ranks every few seconds. The others' files are read only while the main thread
makes no progress: a run that is well pays for one small write an interval.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from selfsup.errors import EarlyStop, RankLost, UserError
from selfsup.guard import hang_report, processes, ranks
from selfsup.guard.processes import Process
from selfsup.guard.ranks import Beat, Peers

DUMP, REPORT, SILENT, PAUSE = 0.7, 0.85, 0.5, 0.4
"""Parts of the timeout: without progress until the stack is written, until the hang is reported; without a heartbeat until
a rank counts as silent; a sleep of this thread that must be the whole process's (stopped, suspended)."""
_MOST = 64
"""Ranks that a rank other than 0 looks at, so that a large job does not read its files in squares."""
_LAST_WORDS_S = 10.0
_left: float | None = None
_current: "Watchdog | None" = None


def alive() -> None:
    """Long work inside one phase of a run (an evaluation) goes on; nothing where no run is watched."""
    if _current is not None:
        _current.at(*_current.where())


"""When an earlier watch in this process ended."""


class Watchdog:
    """Context manager around a run; `at` is called by its loop."""

    def __init__(
        self,
        folder: Path,
        timeout_s: float,
        *,
        rank: int,
        world: int,
        interval_s: float | None = None,
        on_abort: Callable[[], None] = lambda: None,
    ) -> None:
        """folder: RUN/ranks. timeout_s: a run without progress for so long is ended, with a report. interval_s: between
        heartbeats; an eighth of the timeout, at most 5 s. on_abort: called, if it does not take long, before such an end.
        """
        self._folder, self._timeout_s, self._world = folder, timeout_s, world
        self._interval_s = interval_s or min(5.0, timeout_s / 8)
        self._on_abort = on_abort
        self._own = Beat(rank, Process.current())
        self._now = ("start", 0, time.monotonic())
        self._resumed = 0.0  # when the whole process last went on after a pause
        self._pid = os.getpid()
        self._stop = threading.Event()
        self._lock = threading.Lock()  # around the own file
        self._final = False
        self._explaining = False
        self._unexplained: BaseException | None = None
        self._failing = False
        self._written = (0, 0.0)
        self._since_ns = 0
        self._stack: int | None = None
        self._head = 0
        self._alarm = False
        self._peers: Peers | None = None
        self._suspected: Process | None = None
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def at(self, phase: str, step: int) -> None:
        """The main thread has come to this phase of this step."""
        self._now = (phase, step, time.monotonic())

    def where(self) -> tuple[str, int]:
        """Phase and step that were last told."""
        return self._now[:2]

    def __enter__(self) -> "Watchdog":
        global _current
        self._now = ("start", 0, time.monotonic())
        age = processes.age() if _left is None else time.monotonic() - _left
        rank = self._own.rank
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:  # of an earlier start with more ranks
                for path in self._folder.glob("rank_*"):
                    number = path.name.split(".")[0].removeprefix("rank_")
                    if number.isdigit() and int(number) >= self._world:
                        path.unlink()
        self._write(self._own, first=True)
        self._since_ns = self._written[0] - int((age + 0.1) * 1e9)
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
            self._stack = os.open(ranks.stack_of(self._folder, rank), flags, 0o644)
            self._head = os.write(self._stack, f"{hang_report.MAIN}{threading.main_thread().ident:016x}\n".encode())
        self._claim_alarm()
        self._arm()
        self._thread.start()
        _current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _left, _current
        if os.getpid() != self._pid:
            return  # a forked child
        _current = None
        self._stop.set()
        self._thread.join(timeout=5)
        self._drop_alarm()
        phase, step, _ = self._now
        own = replace(self._own, phase=phase, step=step, beat=self._own.beat + 1)
        if error is None or isinstance(error, EarlyStop) or (isinstance(error, SystemExit) and not error.code):
            own = replace(own, state="done")
        else:
            own = ranks.failure(own, error, explained=error is not self._unexplained)
        self._write(own, final=True)
        _left = time.monotonic()
        if self._stack is not None:
            if own.state == "done" or not self._has_stack():
                with contextlib.suppress(OSError):
                    ranks.stack_of(self._folder, own.rank).unlink()
            os.close(self._stack)
            self._stack = None

    def explain(self, error: BaseException) -> None:
        """For an error of a collective on this rank: raise UserError or RankLost if another rank's end explains it.

        Looks for 2 s if all ranks are on this host, else for three intervals; returns if nothing is found.
        """
        self._explaining = True  # the thread keeps out of it
        try:
            peers = self._make_peers()
            began = time.monotonic()
            while peers.peers:
                peers.look(self._written)
                if (found := peers.ended(2.5 * self._interval_s)) is not None:
                    raise found[1] from error
                if time.monotonic() - began > (2.0 if peers.all_local() else 3 * self._interval_s):
                    if (found := peers.ended()) is not None:  # at least it ended first, with a traceback of its own
                        raise found[1] from error
                    break
                time.sleep(min(0.2, self._interval_s / 4))
            self._unexplained = error
        finally:
            self._now = (*self._now[:2], time.monotonic())
            self._explaining = False

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._interval_s):
            now = time.monotonic()
            if (gap := now - last) > max(PAUSE * self._timeout_s, 2 * self._interval_s):
                self._resumed = now
                _print(f"selfsup: this process stood still for {gap:.0f} s and goes on")
            last = now
            try:
                self._beat(now)
            except Exception as error:  # it must outlive whatever the disk does
                self._complain(f"{type(error).__name__}: {error}")

    def _beat(self, now: float) -> None:
        phase, step, at = self._now
        stuck = now - max(at, self._resumed)
        self._own = replace(self._own, phase=phase, step=step, beat=self._own.beat + 1, stuck_s=max(0.0, stuck))
        self._write(self._own)
        self._arm()
        if stuck < 2 * self._interval_s or self._explaining:
            self._peers, self._suspected = None, None
            if self._stack is not None and stuck < self._interval_s and self._has_stack():
                os.ftruncate(self._stack, self._head)  # it went on after all
            return
        if stuck > DUMP * self._timeout_s and self._stack is not None and not self._has_stack():
            faulthandler.dump_traceback(self._stack, all_threads=True)
        if self._peers is None:
            self._peers = self._make_peers()
        self._peers.look(self._written)
        found = self._peers.ended()
        if found is not None:
            if found[0].process == self._suspected:  # seen twice, so no remnant of an earlier start
                self._abort(f"selfsup: {found[1]}", found[1])
            self._suspected = found[0].process
            return
        self._suspected = None
        silent = SILENT * self._timeout_s
        others = [p for p in self._peers.peers if p.alive is not False and p.silent_s() < silent]
        running = [(p.rank, p.beat.stuck_s) for p in others if p.beat is not None and p.beat.state == "running"]
        if any(seconds < DUMP * self._timeout_s for _, seconds in running):
            return  # somebody works, the others wait for it: an evaluation by rank 0
        before = sum(rank < self._own.rank for rank, _ in running)
        if stuck > REPORT * self._timeout_s + min(before, 4) * 4 * self._interval_s:
            self._report(silent)

    def _make_peers(self) -> Peers:
        seen = range(self._world if self._own.rank == 0 else min(self._world, _MOST))
        return Peers.of(self._folder, seen, self._own.rank, self._since_ns)

    def _report(self, silent: float) -> None:
        peers = self._peers
        assert peers is not None
        if len(peers.peers) < self._world - 1:
            peers = Peers.of(self._folder, range(self._world), self._own.rank, self._since_ns)
            peers.look(self._written)
        end = time.monotonic() + 2 * self._interval_s
        while time.monotonic() < end and (
            peers is not self._peers
            or hang_report.stack_missing(self._folder, self._own, peers.peers, silent, self._since_ns)
        ):
            time.sleep(self._interval_s / 4)
            peers.look(self._written)
            if self._now[2] > time.monotonic() - self._own.stuck_s:
                return  # it went on after all
        text = hang_report.report(self._folder, self._own, peers.peers, self._timeout_s, silent, self._since_ns)
        suspected = hang_report.suspects(self._own, peers.peers, silent)
        names = "; ".join(f"rank {rank} {why}" for rank, why in suspected.items()) or "no rank stands out"
        self._abort(f"{text}\ngo on with --resume", RankLost(f"rank {self._own.rank} reports a hang: {names}"))

    def _abort(self, text: str, error: Exception) -> None:
        """End the process: 2 for what the user can mend, else 1. Whatever blocks on the way is not waited for."""

        def last_words() -> None:
            _print(text)  # before the others see that this rank ended, and their ends make a launcher kill it
            self._write(ranks.failure(self._own, error), final=True)
            self._on_abort()

        thread = threading.Thread(target=last_words, name="last words", daemon=True)
        thread.start()
        thread.join(timeout=_LAST_WORDS_S)
        os._exit(2 if isinstance(error, UserError) else 1)

    def _arm(self) -> None:
        """A hang that holds the interpreter stops this thread too: then an alarm has C write the main thread's stack.

        Not faulthandler's own timer: that one walks the frames from another thread, and crashes a process that goes on
        after having been stopped; and a forked child waits for it for ever at its exit.
        """
        if self._alarm and signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, signal.SIG_IGN):
            signal.setitimer(signal.ITIMER_REAL, DUMP * self._timeout_s)
        else:
            self._alarm = False  # somebody else uses it now

    def _claim_alarm(self) -> None:
        """Alone, the stack goes to stderr: no other rank will report it."""
        free = signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, signal.SIG_IGN)
        if free and signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                file = sys.__stderr__.fileno() if self._world == 1 and sys.__stderr__ is not None else self._stack
                if file is not None:
                    faulthandler.register(signal.SIGALRM, file=file, all_threads=False)
                    self._alarm = True

    def _drop_alarm(self) -> None:
        if self._alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if not self._thread.is_alive():  # it might set it once more, and without a handler that kills
                faulthandler.unregister(signal.SIGALRM)
            self._alarm = False

    def _has_stack(self) -> bool:
        return self._stack is not None and os.fstat(self._stack).st_size > self._head

    def _write(self, own: Beat, first: bool = False, final: bool = False) -> None:
        with self._lock:
            if self._final:
                return
            self._final = final
            try:
                mtime_ns = own.write(self._folder, first)
            except OSError as error:
                self._complain(error.strerror or str(error))
                return
            if mtime_ns is not None:
                self._written = (mtime_ns, time.monotonic())
            self._failing = False

    def _complain(self, what: str) -> None:
        if not self._failing:
            _print(f"selfsup: {ranks.file_of(self._folder, self._own.rank)}: heartbeat: {what}; trying again")
        self._failing = True


def _print(text: str) -> None:
    with contextlib.suppress(Exception):
        print(text, file=sys.stderr, flush=True)
