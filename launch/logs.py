"""What a submitted run prints: `selfsup logs RUN [--follow] [--rank N]`."""

import codecs
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from selfsup.errors import UserError

from . import figures, status, submission
from .submission import Submission

_BLOCK = 1 << 16
_POLL_S = 0.5
_ASK_S = 5.0
"""Between two looks at the run's state, which may be questions to Slurm."""
_SCRIPT_LINES = 40
"""Of the batch script's own log, where a run failed."""


def show(run: Path, *, rank: int | None, follow: bool) -> None:
    """Print the log of a rank (None: 0) of the newest job, over all its starts; of a failed run also what its script said.

    follow: go on until the run has ended. Raises UserError for a run that was never submitted, and a rank it does not have.
    """
    submitted = _submitted(run)
    rank = rank or 0
    if rank >= submitted.cluster.world_size:
        raise UserError(f"--rank {rank}: {run} has {submitted.cluster.world_size} rank(s), counted from 0")
    log = _file(run, submitted, rank)
    out = _Output()
    with contextlib.suppress(BrokenPipeError):  # as `| head` does: enough was read
        if follow:
            _follow(run, rank, out)
        else:
            for block in _read(log, 0):
                out.write(block)
            out.end()
        if log is None or not log.exists():
            print(_nothing(run, log), file=sys.stderr)
        if (found := status.describe([run])) and found[0].state == "failed":
            _show_script(run, submitted, out)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's end complains


def _submitted(run: Path) -> Submission:
    found = submission.read(run)
    if found is None:
        if not run.is_dir():
            raise UserError(f"{run}: no such folder; name a run folder")
        raise UserError(
            f"{run} was not submitted: a run prints to the terminal it was started in; its figures are in "
            f"{run / 'metrics.jsonl'}"
        )
    if found.runs != (".",):
        raise UserError(f"{run} is a sweep of {len(found.runs)} runs; name one of them, as in {run / found.runs[0]}")
    return found


def _file(run: Path, submitted: Submission, rank: int | None) -> Path | None:
    """Where a rank's log is, or will be; None: that of the script itself. None as long as the job has no number."""
    return submission.log(run, submitted, submitted.job, rank) if submitted.job is not None else None


def _nothing(run: Path, log: Path | None) -> str:
    found = status.describe([run])[0]
    why = f" ({'; '.join(found.remarks)})" if found.remarks else ""
    return f"{run}: {found.state}{why}; there is no log yet" + (f" in {log}" if log is not None else "")


def _follow(run: Path, rank: int, out: "_Output") -> None:
    """Print what is there and what comes, until the run has ended and all is printed."""
    log: Path | None = None
    at, over, told, ask = 0, False, False, time.monotonic()
    while True:
        for block in _read(log, at):
            out.write(block)
            at += len(block)
        if over:
            break
        out.flush()
        if log is not None and _size(log) < at:
            at = 0  # made anew
        if time.monotonic() >= ask:
            if log is None:  # sbatch may have answered meanwhile
                log = _file(run, _submitted(run), rank)
            over = status.describe([run])[0].over  # what was written before it was is printed in the next round
            ask = time.monotonic() + _ASK_S
            if not over and not told and not _size(log):
                print(f"{_nothing(run, log)}; waiting (Ctrl-C ends it)", file=sys.stderr, flush=True)
            told = True
            continue
        time.sleep(_POLL_S)
    out.end()


def _read(path: Path | None, at: int) -> Iterator[bytes]:
    """From this byte to the end there is now, in blocks; nothing for a file that is not there."""
    if path is None:
        return
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(at)
        while block := file.read(_BLOCK):
            yield block


def _size(path: Path | None) -> int:
    try:
        return path.stat().st_size if path is not None else 0
    except OSError:
        return 0


def _show_script(run: Path, submitted: Submission, out: "_Output") -> None:
    """The last lines of what the script and srun said, where Slurm tells why a job ended."""
    log = _file(run, submitted, None)
    lines = figures.tail(log, _BLOCK).splitlines(keepends=True)[-_SCRIPT_LINES:] if log is not None else []
    if log is not None and lines:
        out.write(f"--- the job's script, {log}:\n".encode())
        out.write(b"".join(lines))
        out.end()


class _Output:
    """Bytes on standard output, as the text they are; what is none is escaped."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._last = "\n"

    def write(self, raw: bytes, final: bool = False) -> None:
        text = self._decoder.decode(raw, final)
        if text:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._last = text[-1]

    def flush(self) -> None:
        sys.stdout.flush()

    def end(self) -> None:
        """A line that is not finished is."""
        self.write(b"", final=True)
        if self._last != "\n":
            sys.stdout.write("\n")
            self._last = "\n"
        self._decoder.reset()
        self.flush()
