"""A side of a comparison: a worker process (`worker.py`) and the pipe to it."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import protocol


class SideError(RuntimeError):
    """A side could not do what it was asked for."""


class Side:
    """A worker process and the pipe to it."""

    def __init__(self, threads: int, log: Path) -> None:
        self.log = log
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "benchmarks.worker"],
                cwd=protocol.ROOT,
                env=protocol.thread_environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command, one answer; raises SideError with what the worker said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are in the log
        line = self.process.stdout.readline()
        if not line:
            raise SideError(f"{do}: the process ended ({self.process.wait()}): {self.log.read_text()[-1500:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(f"{do}: {answer['error']}\n{answer['traceback']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Machine:
    """What all rows share: peers, threads, pairs, a scratch folder, one for pictures, and the GEMM peaks seen so far."""

    def __init__(
        self, peers: dict[str, str], threads: int, pairs: int, folder: Path, pictures: Path | None = None
    ) -> None:
        self.peers, self.threads, self.pairs, self.folder, self.pictures = peers, threads, pairs, folder, pictures
        self.peaks: dict[str, float] = {}

    def peak(self, dtype: str) -> float:
        """GEMM peak of this machine in this run, in a process of its own; the best seen."""
        side = Side(self.threads, self.folder / "gemm.log")
        try:
            seen = side.ask("gemm", dtype=dtype)["flops_per_second"]
        finally:
            side.close()
        self.peaks[dtype] = max(self.peaks.get(dtype, 0.0), seen)
        return self.peaks[dtype]


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
