"""One writer for a run folder, on whatever host: a lease file with a heartbeat, checked before everything that is written.

`flock` alone would not do: many cluster file systems do not pass it on to other hosts. It only guards the moment in which
a lease changes hands; a start that lost the folder meanwhile (stopped, cut off from the disk) finds that out in `check`.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from selfsup.errors import UserError
from selfsup.guard.processes import Process

FILE = "lease.json"
LOCK = ".lease-lock"
TEMPORARY = ".lease-tmp-"
PATIENCE_S = 60.0
_SETTLE_S = 1.0
"""Where flock does not work, two may take over at once; after this long the one whose file is still there has won."""
_LOCK_WAIT_S = 10.0


class Lease:
    """The right to write to a run folder; a context manager that gives it back."""

    def __init__(self, run: Path, interval_s: float, say: Callable[[str], None]) -> None:
        self.token = secrets.token_hex(16)
        self._run, self._path, self._say = run, run / FILE, say
        self._pid = os.getpid()
        self._fd: int | None = None
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @classmethod
    def acquire(
        cls, run: Path, *, interval_s: float = 5.0, patience_s: float = PATIENCE_S, say: Callable[[str], None]
    ) -> "Lease":
        """Write RUN/lease.json and renew it every `interval_s` seconds.

        A lease whose process is gone from this host is taken over at once. That of another host (or container, or one that
        cannot be read) is watched for `patience_s` seconds, and taken over if it is not renewed.
        Raises UserError if the run is in use, or the folder cannot be written.
        """
        lease = cls(run, interval_s, say)
        try:
            lease._acquire(patience_s)
        except OSError as error:
            lease._close()
            raise UserError(
                f"{run}: cannot be written: {error.strerror or error}; make it writable, or name another"
            ) from None
        except BaseException:
            lease._close()
            raise
        lease._thread.start()
        return lease

    def check(self) -> None:
        """Raise UserError if the lease on disk is no longer this one: whoever gets that must not write."""
        try:
            seen = _look(self._path)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be read: {error.strerror or error}; nothing more is written"
            ) from None
        if seen is not None and seen.token == self.token:
            return
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
                found = _look(self._path)
                if found is None and self._put(replace=False):
                    return
            if found is None:
                time.sleep(0.05)
                continue
            alive = found.process.alive() if found.process else None
            if alive:
                raise UserError(f"{self._run} is in use by {found.who()}; wait for it or stop it")
            if alive is None and not self._is_silent(found, patience_s):
                continue  # given back meanwhile
            with _lock(self._run) as locked:
                if _look(self._path) != found or not self._put(replace=True):
                    continue
            if not locked:
                time.sleep(_SETTLE_S)
            if self._is_ours():
                self._say(
                    f"taking over {self._run} from {found.who()}, which {'is silent' if alive is None else 'is gone'}"
                )
                return
        raise UserError(f"{self._path}: cannot be taken; remove it if no process is using the run")

    def _is_silent(self, found: "_Seen", patience_s: float) -> bool:
        """Watch a lease whose process cannot be asked: True if nothing renewed it, False if it is no more there.

        Only changes count: the clocks of two hosts are not compared.
        """
        self._say(f"{self._run} was last used by {found.who()}: watching for {patience_s:g} s whether it is alive")
        end = time.monotonic() + patience_s
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self._interval_s / 4, 1.0))
            now = _look(self._path)
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
        text = json.dumps({"token": self.token, **asdict(Process.current()), "since": since}) + "\n"
        try:
            self._fd = _create(temporary, text)
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
            self._fd = _create(self._path, text)

    def _is_ours(self) -> bool:
        seen = _look(self._path)
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

    def _tell(self, text: str) -> None:
        with contextlib.suppress(Exception):  # a closed terminal must not end the heartbeat
            self._say(text)


def holder(run: Path, patience_s: float = PATIENCE_S) -> str | None:
    """'process 123 on host X since ...' if the run seems to be in use, else None.

    For a process of another host, by the age of its heartbeat: `patience_s` seconds at most, if the clocks agree.
    """
    try:
        seen = _look(run / FILE)
    except OSError:
        return None
    if seen is None:
        return None
    alive = seen.process.alive() if seen.process else None
    if alive is None:
        alive = time.time() - seen.mtime_ns / 1e9 < patience_s
    return seen.who() if alive else None


@dataclass(frozen=True)
class _Seen:
    """A lease file as it was once; two are equal if nothing touched it in between."""

    raw: bytes
    mtime_ns: int
    inode: int

    @property
    def _values(self) -> dict[str, Any]:
        try:
            values = json.loads(self.raw)
        except (ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}

    @property
    def token(self) -> str | None:
        return self._values.get("token")

    @property
    def process(self) -> Process | None:
        return Process.parse(self._values)

    def who(self) -> str:
        process, since = self.process, self._values.get("since")
        since = since if isinstance(since, str) and since.isprintable() and len(since) < 40 else None
        if process is None:
            return f"an unknown process ({FILE} cannot be read)"
        state = process.state()
        shown = f" ({state})" if state.startswith("stopped") else ""
        return f"process {process.pid}{shown} on host {process.host}" + (f" since {since}" if since else "")


def _look(path: Path) -> _Seen | None:
    """Through a fresh descriptor: network file systems ask the server again at each open."""
    for attempt in range(3):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                with contextlib.suppress(IsADirectoryError, BlockingIOError):
                    return _Seen(os.read(fd, 1 << 16), status.st_mtime_ns, status.st_ino)
                return _Seen(b"", status.st_mtime_ns, status.st_ino)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None
        except PermissionError:
            status = os.stat(path)
            return _Seen(b"", status.st_mtime_ns, status.st_ino)
        except OSError as error:
            if error.errno != errno.ESTALE or attempt == 2:
                raise
    raise AssertionError("unreachable")


def _create(path: Path, text: str) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        left = text.encode()
        while left:  # a disk that is nearly full takes a part, and refuses the next
            left = left[os.write(fd, left) :]
        os.fsync(fd)  # a full network disk says so only now
    except BaseException:
        os.close(fd)
        path.unlink()
        raise
    return fd


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
