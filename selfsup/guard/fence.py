"""Ends the processes of a job's earlier start: a node that its scheduler lost contact with goes on computing, and would write.

They see it in the lease, which the later start takes; that one then waits for two looks' time before it writes anything.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from selfsup.guard.incarnation import Incarnation
from selfsup.guard.leasefile import FILE, Seen, look

_LAST_WORDS_S = 1.0


class Fence:
    """Ends this process when a later start of its job has the run: a context manager, for the ranks that hold no lease.

    Nothing for a process that belongs to no job. lost: what ends it, called with the reason in one line.
    """

    def __init__(self, run: Path, interval_s: float = 5.0, lost: Callable[[str], None] | None = None) -> None:
        self._run, self._interval_s, self._lost = run, interval_s, lost or end_process
        self._own = Incarnation.of_environment()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fence", daemon=True)
        self._pid = os.getpid()

    def __enter__(self) -> "Fence":
        if self._own is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own is not None and os.getpid() == self._pid:
            self._stop.set()
            self._thread.join(timeout=10)  # longer if the disk hangs: then it is left to end with the process

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            with contextlib.suppress(OSError):
                if (reason := superseded(look(self._run / FILE), self._own, self._run)) is not None:
                    self._lost(reason)
                    return


def superseded(seen: Seen | None, own: Incarnation | None, run: Path) -> str | None:
    """Why a process of the start `own` must end, in one line, if the lease it saw is that of a later start; else None."""
    found = seen.incarnation if seen is not None else None
    if own is None or found is None or not found.supersedes(own):
        return None
    return f"selfsup: {run} was taken over by restart {found.restart} of job {own.job}; this is {own}, and ends"


def end_process(reason: str) -> None:
    """Say why and exit 1, at once: no clean-up, for whatever it wrote would be another's. Not held up by a full pipe."""

    def last_words() -> None:
        with contextlib.suppress(Exception):
            print(reason, file=sys.stderr, flush=True)

    thread = threading.Thread(target=last_words, daemon=True)
    thread.start()
    thread.join(timeout=_LAST_WORDS_S)
    os._exit(1)
