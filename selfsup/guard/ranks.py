"""RUN/ranks: one small file a rank, overwritten in place, from which the others see how it is."""

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from selfsup.errors import RankLost, UserError
from selfsup.guard.processes import Process

SIZE = 4096
"""Bytes of a rank's file: one page, one write."""


def file_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.json"


def stack_of(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.stack.txt"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    rank: int
    process: Process
    step: int = 0
    phase: str = "start"
    beat: int = 0
    """Counts up while its thread runs."""
    stuck_s: float = 0.0
    """Seconds since its main thread came to another phase."""
    state: str = "running"
    """'running', 'done' or 'failed'."""
    message: str = ""
    error: str = ""
    """Why it failed: the exception's type; 'unexplained' for a collective that failed for no reason known to it."""
    user_error: bool = False

    def encode(self) -> bytes:
        """JSON padded to `SIZE`; a long message is cut."""
        values: dict[str, Any] = {**asdict(self), **asdict(self.process), "stuck_s": round(self.stuck_s, 1)}
        del values["process"]
        while len(text := json.dumps(values)) >= SIZE:
            values["message"] = values["message"][: len(values["message"]) * 3 // 4]
        return text.encode().ljust(SIZE - 1) + b"\n"

    @classmethod
    def decode(cls, raw: bytes) -> "Beat | None":
        """None for what no rank wrote, or only half of it."""
        try:
            values = json.loads(raw)
            process = Process.parse(values)
            if process is None:
                return None
            rank, step, beat = (int(values[key]) for key in ("rank", "step", "beat"))
            phase, state, message, error = (str(values[key]) for key in ("phase", "state", "message", "error"))
            stuck_s, user_error = float(values["stuck_s"]), bool(values["user_error"])
            return cls(rank, process, step, phase, beat, stuck_s, state, message, error, user_error)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def write(self, folder: Path, first: bool = False) -> int | None:
        """Over what this process wrote before (`first`: over anything); the file's modification time in ns.

        None if a later start has the file by now. Opened and closed each time: a network disk sends it on only then.
        """
        fd = os.open(file_of(folder, self.rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if first:
                os.ftruncate(fd, SIZE)
            else:
                there = Beat.decode(os.pread(fd, SIZE, 0))
                if there is not None and there.process != self.process:
                    return None
            os.pwrite(fd, self.encode(), 0)
            return os.fstat(fd).st_mtime_ns
        finally:
            os.close(fd)

    def name(self) -> str:
        return f"rank {self.rank} (host {self.process.host}, pid {self.process.pid})"


@dataclass
class Peer:
    """What this process knows of another rank; `beat` is None until it is heard of in this start."""

    rank: int
    beat: Beat | None = None
    heard: float = 0.0
    """When it was last seen to beat, by this process's monotonic clock."""
    alive: bool | None = None
    _first: bytes | None = field(default=None, repr=False)
    _last: bytes = field(default=b"", repr=False)

    def look(self, folder: Path, since_ns: int, now_ns: float) -> None:
        """Read its file; `since_ns`, `now_ns`: this start's begin, and now, as the disk's clock tells them."""
        raw, mtime_ns = _read(file_of(folder, self.rank))
        beat = Beat.decode(raw)
        if beat is None or beat.rank != self.rank:
            return
        alive = beat.process.alive()
        if alive is False and beat.state == "running":  # it may have said why, between the two looks
            raw, mtime_ns = _read(file_of(folder, self.rank))
            beat = Beat.decode(raw) or beat
        if self._first is None:
            self._first = raw
            self.heard = time.monotonic() - max(0.0, (now_ns - mtime_ns) / 1e9)
        elif raw != self._last:
            self.heard = time.monotonic()
        self._last = raw
        if alive or mtime_ns >= since_ns or raw != self._first:  # else it was left by an earlier start
            self.beat, self.alive = beat, alive

    def silent_s(self) -> float:
        return time.monotonic() - self.heard

    def gone(self) -> bool:
        return self.beat is not None and self.alive is False and self.beat.state == "running"

    def where(self) -> str:
        assert self.beat is not None
        return f"in phase {self.beat.phase!r} of step {self.beat.step}, {self.silent_s():.0f} s ago"


@dataclass
class Peers:
    """The other ranks that this one looks at."""

    folder: Path
    since_ns: int
    peers: list[Peer]
    own_written: tuple[int, float] = (0, 0.0)
    """Modification time of this rank's own file, and when that was by the monotonic clock."""

    @classmethod
    def of(cls, folder: Path, ranks: Iterable[int], own: int, since_ns: int) -> "Peers":
        return cls(folder, since_ns, [Peer(rank) for rank in ranks if rank != own])

    def all_local(self) -> bool:
        """Whether all were heard of, on this host, where /proc tells at once who is gone."""
        return all(peer.beat is not None and peer.alive is not None for peer in self.peers)

    def look(self, own_written: tuple[int, float]) -> None:
        """Read all their files."""
        now_ns = own_written[0] + (time.monotonic() - own_written[1]) * 1e9
        for peer in self.peers:
            peer.look(self.folder, self.since_ns, now_ns)

    def ended(self, silent_s: float | None = None) -> tuple[Beat, Exception] | None:
        """The rank on whose account this run cannot go on, and the error that says so; None if all seems well.

        By what explains most: an error of the user's, a rank that is gone without a word, another error, and last, if
        `silent_s` is given a rank on another host that has been silent for so long, else a collective's failure.
        """
        heard = [peer for peer in self.peers if peer.beat is not None]
        all_failed = [p.beat for p in heard if p.beat and p.beat.state == "failed"]
        failed = [beat for beat in all_failed if beat.error != "unexplained"]
        for beat in failed:
            if beat.user_error:
                return beat, UserError(_ended(beat))
        for peer in heard:
            if peer.gone() and peer.beat:
                return peer.beat, RankLost(f"{peer.beat.name()} is gone: last seen {peer.where()}; go on with --resume")
        for beat in failed if silent_s is not None else [*failed, *all_failed]:
            return beat, RankLost(_ended(beat))
        for peer in heard:
            late = silent_s is not None and peer.alive is None and peer.silent_s() > silent_s
            if late and peer.beat and peer.beat.state == "running":
                return peer.beat, RankLost(
                    f"{peer.beat.name()} is silent: last heard of {peer.where()}; go on with --resume"
                )
        return None


def _ended(beat: Beat) -> str:
    return beat.message if beat.error == "RankLost" else f"{beat.name()} ended: {beat.message}"


def _read(path: Path) -> tuple[bytes, int]:
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(fd, SIZE), os.fstat(fd).st_mtime_ns
        finally:
            os.close(fd)
    return b"", 0


def failure(beat: Beat, error: BaseException, explained: bool = True) -> Beat:
    """`beat` of a rank that this exception ended."""
    text = str(error) if isinstance(error, UserError | RankLost) else f"{type(error).__name__}: {error}".rstrip(": ")
    kind = type(error).__name__ if explained else "unexplained"
    return replace(beat, state="failed", message=text, error=kind, user_error=isinstance(error, UserError))
