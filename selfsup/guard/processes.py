"""Which process a line in a shared file means, and whether it still lives: pids are reused, and mean nothing elsewhere."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "disk sleep",
    "T": "stopped",
    "t": "stopped by a debugger",
    "I": "idle",
}
_PROC = Path("/proc")
_imported = time.monotonic()


@dataclass(frozen=True)
class Process:
    """One process for all time: pid and start on one boot of one host, in one pid namespace.

    `boot`, `pid_namespace` and `started` (clock ticks since boot) are "", "" and None where there is no /proc.
    """

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: int | None

    @classmethod
    def current(cls) -> "Process":
        """This process."""
        own = _stat("self")
        return cls(socket.gethostname(), _boot(), _pid_namespace(), os.getpid(), own[1] if own else None)

    @classmethod
    def parse(cls, values: Any) -> "Process | None":
        """From a mapping that anybody may have written; None unless every field is of its type."""
        if not isinstance(values, dict):
            return None
        host, boot, namespace = (values.get(key) for key in ("host", "boot", "pid_namespace"))
        pid, started = values.get("pid"), values.get("started")
        if not (isinstance(host, str) and isinstance(boot, str) and isinstance(namespace, str)):
            return None
        if not host.isprintable() or len(host) > 255:
            return None
        if type(pid) is not int or not 0 < pid < 2**31 or not (started is None or type(started) is int):
            return None
        return cls(host, boot, namespace, pid, started)

    def is_local(self) -> bool:
        """Whether its pid means the same here: containers and cloned machines share host names, and pids start at 1."""
        return (self.host, self.boot, self.pid_namespace) == (socket.gethostname(), _boot(), _pid_namespace())

    def alive(self) -> bool | None:
        """None if it cannot be told: on another host, or where /proc does not say when a process started.

        A zombie has ended, unless one of its threads is still inside a system call (it may yet write).
        """
        return self._look()[0]

    def state(self) -> str:
        """In words: 'running', 'sleeping', 'disk sleep', 'stopped', ..., 'gone', or 'unknown'."""
        return self._look()[1]

    def _look(self) -> tuple[bool | None, str]:
        if not self.is_local():
            return None, "unknown"
        for _ in range(2):  # it may end between the two questions
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False, "gone"
            except PermissionError:
                pass  # another user's; /proc may be mounted so that it does not show these
            seen = _stat(str(self.pid)) if _proc_has_our_pids() else None
            if seen is None:
                continue
            letter, started = seen
            if self.started is not None and started != self.started:
                return False, "gone"  # the pid went to another process
            if letter in "XxZ":
                threads = _threads(self.pid)
                return (True, "ending") if threads > 1 else (False, "gone")
            return (None if self.started is None else True), _STATES.get(letter, "unknown")
        return None, "unknown"


def age() -> float:
    """Seconds since this process started (since this module was imported, where there is no /proc)."""
    own = _stat("self")
    if own is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return time.monotonic() - _imported
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - own[1] / os.sysconf("SC_CLK_TCK"))


def parse_stat(line: bytes) -> tuple[str, int]:
    """(state letter, start in ticks) of a line of /proc/PID/stat, whose second field may hold spaces and parentheses."""
    rest = line[line.rindex(b")") + 1 :].split()
    return rest[0].decode(), int(rest[19])


def _stat(pid: str) -> tuple[str, int] | None:
    try:
        return parse_stat((_PROC / pid / "stat").read_bytes())
    except (OSError, ValueError, IndexError):
        return None


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(_PROC / str(pid) / "task"))
    except OSError:
        return 0


def _proc_has_our_pids() -> bool:
    """False if /proc was mounted for another pid namespace than this process's."""
    try:
        return os.readlink(_PROC / "self") == str(os.getpid())
    except OSError:
        return False


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return ""
