"""RUN/lease.json as others see it, on file systems that may be another host's: read afresh, written to the disk."""

import contextlib
import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfsup.guard.incarnation import Incarnation
from selfsup.guard.processes import Process

FILE = "lease.json"


@dataclass(frozen=True)
class Seen:
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
        """Of the lease that it belongs to."""
        return self._values.get("token")

    @property
    def process(self) -> Process | None:
        """Who wrote it; None if that cannot be read."""
        return Process.parse(self._values)

    @property
    def incarnation(self) -> Incarnation | None:
        """Which start of a job that process belongs to; None if to none."""
        return Incarnation.parse(self._values)

    def who(self) -> str:
        """'process 123 on host X since ...'."""
        process, since = self.process, self._values.get("since")
        since = since if isinstance(since, str) and since.isprintable() and len(since) < 40 else None
        if process is None:
            return f"an unknown process ({FILE} cannot be read)"
        state = process.state()
        shown = f" ({state})" if state.startswith("stopped") else ""
        return f"process {process.pid}{shown} on host {process.host}" + (f" since {since}" if since else "")


def look(path: Path) -> Seen | None:
    """Through a fresh descriptor: network file systems ask the server again at each open."""
    for attempt in range(3):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(fd)
                with contextlib.suppress(IsADirectoryError, BlockingIOError):
                    return Seen(os.read(fd, 1 << 16), status.st_mtime_ns, status.st_ino)
                return Seen(b"", status.st_mtime_ns, status.st_ino)
            finally:
                os.close(fd)
        except FileNotFoundError:
            return None
        except PermissionError:
            status = os.stat(path)
            return Seen(b"", status.st_mtime_ns, status.st_ino)
        except OSError as error:
            if error.errno != errno.ESTALE or attempt == 2:
                raise
    raise AssertionError("unreachable")


def create(path: Path, text: str) -> int:
    """A new file with this text, on the disk; its descriptor stays open. Nothing is left of one that cannot be written."""
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
