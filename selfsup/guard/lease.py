"""One writer for a run folder, on whatever host: a lease file with a heartbeat, checked before everything that is written.

`flock` alone would not do: many cluster file systems do not pass it on to other hosts. It only guards the moment in which
a lease changes hands; a start that lost the folder meanwhile (stopped, cut off from the disk) finds that out in `check`.

A job that a scheduler starts again does not wait for its earlier start, which it may have lost sight of: it takes the lease,
and the earlier one, whose heartbeat sees that, ends its process (see `fence`).
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from selfsup.errors import DiskError, UserError
from selfsup.guard.fence import end_process, superseded
from selfsup.guard.incarnation import Incarnation
from selfsup.guard.leasefile import FILE, Seen, create, look
from selfsup.guard.processes import Process

LOCK = ".lease-lock"
TEMPORARY = ".lease-tmp-"
PATIENCE_S = 60.0
_SETTLE_S = 1.0
"""Where flock does not work, two may take over at once; after this long the one whose file is still there has won."""
_LOCK_WAIT_S = 10.0


class Lease:
    """The right to write to a run folder; a context manager that gives it back."""

    def __init__(
        self,
        run: Path,
        interval_s: float,
        say: Callable[[str], None],
        on_superseded: Callable[[str], None] = end_process,
    ) -> None:
        self.token = secrets.token_hex(16)
        self._incarnation = Incarnation.of_environment()
        self._on_superseded = on_superseded
        self._superseded = False
        self._run, self._path, self._say = run, run / FILE, say
        self._pid = os.getpid()
        self._fd: int | None = None
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @classmethod
    def acquire(
        cls,
        run: Path,
        *,
        interval_s: float = 5.0,
        patience_s: float = PATIENCE_S,
        say: Callable[[str], None],
        on_superseded: Callable[[str], None] = end_process,
    ) -> "Lease":
        """Write RUN/lease.json and renew it every `interval_s` seconds.

        A lease whose process is gone from this host is taken over at once. That of another host (or container, or one that
        cannot be read) is watched for `patience_s` seconds, and taken over if it is not renewed.

        That of an earlier start of this process's job is taken over at once, also if it lives: then two intervals are
        waited, in which all its ranks notice and end. on_superseded: called with the reason, in any thread, where that
        happens to this lease; it should end the process.
        Raises UserError if the run is in use, a later start of this job has it, or the folder cannot be written.
        """
        lease = cls(run, interval_s, say, on_superseded)
        try:
            lease._acquire(patience_s)
        except OSError as error:
            lease._close()
            raise DiskError(
                f"{run}: cannot be written: {error.strerror or error}; make it writable, or name another"
            ) from None
        except BaseException:
            lease._close()
            raise
        lease._thread.start()  # it beats, and may itself be superseded, during the wait
        if lease._superseded:
            try:
                time.sleep(2 * interval_s)
            except BaseException:
                lease.release()
                raise
        return lease

    def check(self) -> None:
        """Raise UserError if the lease on disk is no longer this one: whoever gets that must not write.

        If a later start of this process's job has it, the process ends here (see `acquire`).
        """
        try:
            seen = look(self._path)
        except OSError as error:
            raise DiskError(
                f"{self._path}: cannot be read: {error.strerror or error}; nothing more is written"
            ) from None
        if seen is not None and seen.token == self.token:
            return
        self._end_if_superseded(seen)
        if seen is not None:
            raise UserError(f"{self._run} was taken over by {seen.who()}; nothing more is written here")
        what = self._path if self._run.is_dir() else self._run
        raise UserError(f"{what} was removed while this process was writing to the run; nothing more is written")

    def release(self) -> None:
        """Remove the lease if it is still this one; does nothing a second time, or in a forked child."""
        if self._fd is None or os.getpid() != self._pid:
            return
        self._stop.set()
        self._thread.join(timeout=10)  # longer if the disk hangs: then it is left to end with the process
        with contextlib.suppress(OSError), _lock(self._run):
            if self._is_ours():
                os.unlink(self._path)
        if not self._thread.is_alive():
            self._close()
        self._fd = None

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    # ------------------------------------------------------------------------------------------------ taking it

    def _acquire(self, patience_s: float) -> None:
        give_up = time.monotonic() + 2 * patience_s + 30
        while time.monotonic() < give_up:
            with _lock(self._run):
                found = look(self._path)
                if found is None and self._put(replace=False):
                    return
            if found is None:
                time.sleep(0.05)
                continue
            alive = found.process.alive() if found.process else None
            supersedes = self._supersedes(found) and alive is not False
            if not supersedes:
                if alive:
                    raise UserError(f"{self._run} is in use by {found.who()}; wait for it or stop it")
                if alive is None and not self._is_silent(found, patience_s):
                    continue  # given back meanwhile
            with _lock(self._run) as locked:
                now = look(self._path)
                same = now == found or (supersedes and now is not None and now.token == found.token)  # it still beats
                if not same or not self._put(replace=True):
                    continue
            if not locked:
                time.sleep(_SETTLE_S)
            if not self._is_ours():
                continue
            if supersedes:
                self._superseded = True
                state = f"an earlier start of {self._incarnation}; waiting {2 * self._interval_s:g} s for it to end"
            else:
                state = "which is silent" if alive is None else "which is gone"
            self._say(f"taking over {self._run} from {found.who()}, {state}")
            return
        raise UserError(f"{self._path}: cannot be taken; remove it if no process is using the run")

    def _supersedes(self, found: "Seen") -> bool:
        """Whether an earlier start of our job holds it. Raises UserError if a later one does."""
        own, theirs = self._incarnation, found.incarnation
        if own is None or theirs is None:
            return False
        if theirs.supersedes(own):
            raise UserError(
                f"{self._run}: a later start of job {own.job} (restart {theirs.restart}) has it: {found.who()}; "
                f"this is restart {own.restart}\nif that job is over, and its number was given to a new one, remove {self._path}"
            )
        return own.supersedes(theirs)

    def _is_silent(self, found: "Seen", patience_s: float) -> bool:
        """Watch a lease whose process cannot be asked: True if nothing renewed it, False if it is no more there.

        Only changes count: the clocks of two hosts are not compared.
        """
        self._say(f"{self._run} was last used by {found.who()}: watching for {patience_s:g} s whether it is alive")
        end = time.monotonic() + patience_s
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self._interval_s / 4, 1.0))
            now = look(self._path)
            if now is None:
                return False
            if now != found:
                raise UserError(
                    f"{self._run} is in use by {now.who()}, whose heartbeat goes on; wait for it or stop it"
                )
        return True

    def _put(self, replace: bool) -> bool:
        """Put our lease in place; the descriptor stays open, so that a heartbeat can never touch another's file."""
        self._close()
        for old in self._run.glob(TEMPORARY + "*"):
            with contextlib.suppress(OSError):
                old.unlink()
        temporary = self._run / (TEMPORARY + self.token)
        since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        own = asdict(self._incarnation) if self._incarnation is not None else {}
        text = json.dumps({"token": self.token, **asdict(Process.current()), "since": since, **own}) + "\n"
        try:
            self._fd = create(temporary, text)
            if replace:
                os.replace(temporary, self._path)
            else:
                self._link(temporary, text)
        except (FileExistsError, FileNotFoundError):
            if not self._run.is_dir():
                raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        return self._is_ours()

    def _link(self, temporary: Path, text: str) -> None:
        try:
            os.link(temporary, self._path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            self._close()  # no hard links here (exFAT, some network drives)
            self._fd = create(self._path, text)

    def _is_ours(self) -> bool:
        seen = look(self._path)
        return seen is not None and seen.token == self.token

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    # ------------------------------------------------------------------------------------------------ keeping it

    def _beat(self) -> None:
        failing = False
        fd = self._fd
        assert fd is not None
        while not self._stop.wait(self._interval_s):
            try:
                os.utime(fd)
            except OSError as error:
                if not failing:
                    self._tell(f"{self._path}: cannot be renewed: {error.strerror or error}; trying again")
                failing = True
            else:
                if failing:
                    self._tell(f"{self._path}: renewed again")
                failing = False
            if self._incarnation is not None:
                with contextlib.suppress(OSError):
                    if self._end_if_superseded(look(self._path)):
                        return

    def _end_if_superseded(self, seen: Seen | None) -> bool:
        reason = superseded(seen, self._incarnation, self._run)
        if reason is not None:
            self._on_superseded(reason)
        return reason is not None

    def _tell(self, text: str) -> None:
        with contextlib.suppress(Exception):  # a closed terminal must not end the heartbeat
            self._say(text)


def holder(run: Path, patience_s: float = PATIENCE_S) -> str | None:
    """'process 123 on host X since ...' if the run seems to be in use, else None.

    For a process of another host, by the age of its heartbeat: `patience_s` seconds at most, if the clocks agree.
    """
    try:
        seen = look(run / FILE)
    except OSError:
        return None
    if seen is None:
        return None
    alive = seen.process.alive() if seen.process else None
    if alive is None:
        alive = time.time() - seen.mtime_ns / 1e9 < patience_s
    return seen.who() if alive else None


@contextlib.contextmanager
def _lock(run: Path) -> Iterator[bool]:
    """Hold RUN/.lease-lock; yields False where locks do not work (or somebody sits on it), and goes on without."""
    try:
        fd = os.open(run / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        yield False
        return
    try:
        yield _flock(fd)
    finally:
        os.close(fd)


def _flock(fd: int) -> bool:
    end = time.monotonic() + _LOCK_WAIT_S
    while time.monotonic() < end:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.005)
        except OSError:
            return False
    return False
