"""metrics.jsonl, progress on the terminal, TensorBoard where it is installed."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from selfsup.errors import DiskError


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut in half is left out."""
    lines = []
    if path.is_file():
        for raw in path.read_bytes().split(b"\n"):
            try:
                lines.append(json.loads(raw))
            except (ValueError, RecursionError):
                break
    return lines


def last_step(path: Path) -> int:
    """The step of the last whole line; 0 for a log that is empty or missing."""
    if not path.is_file():
        return 0
    return next((step for _, step in _backwards(path) if step is not None), 0)


def _step_of(raw: bytes) -> int | None:
    """The step of a line; None for one that is cut short or is no such line."""
    try:
        return int(json.loads(raw)["step"]) if raw.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _backwards(path: Path, block: int = 1 << 16) -> Iterator[tuple[int, int | None]]:
    """(offset of its end, step) of each line, last to first, reading no more than is asked for."""
    with open(path, "rb") as file:
        start = file.seek(0, os.SEEK_END)
        held = b""  # [start, start + len(held)) of the file, lines not yet given out
        while start or held:
            cut = held.rfind(b"\n", 0, len(held) - 1) + 1  # where its last line begins
            if cut == 0 and start:
                size = min(
                    max(block, len(held)), start
                )  # twice as much each time: a crash may leave megabytes of zeros
                start = file.seek(start - size)
                held = file.read(size) + held
                continue
            yield start + len(held), _step_of(held[cut:])
            held = held[:cut]


def _tidy(value: Any) -> Any:
    """JSON has no NaN or infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _tidy(v) for k, v in value.items()}
    return value


class MetricsLog:
    """One JSON object a step, each step once, however often the run was killed and resumed; never half a line."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Keeps the lines up to `resume_step`. Raises UserError if the file cannot be written."""
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._end = self._kept(resume_step)
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)
        except OSError as error:
            raise self._unwritable(error) from None

    def _kept(self, resume_step: int) -> int:
        """Bytes of whole lines of steps up to `resume_step`: found from the end, where it is near.

        A log without that very step (another disk's, a damaged one) is read from the start, up to the first fault.
        """
        if resume_step == 0:
            return 0
        for end, step in _backwards(self.path):
            if step == resume_step:
                return end
            if step is not None and step < resume_step:
                break
        keep = 0
        with open(self.path, "rb") as file:
            for raw in file:
                step = _step_of(raw)
                if step is None or step > resume_step:
                    break
                keep += len(raw)
        return keep

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append whole lines: all of them, or UserError and none."""
        text = "".join(json.dumps(_tidy(r), allow_nan=False) + "\n" for r in records).encode()
        try:
            written = 0
            while written < len(text):
                written += os.pwrite(self._file, text[written:], self._end + written)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise self._unwritable(error) from None
        self._end += len(text)

    def _unwritable(self, error: OSError) -> DiskError:
        return DiskError(
            f"{self.path}: cannot be written: {error.strerror}; checkpoints are untouched: make room or make it writable, "
            "then go on with --resume"
        )

    def sync(self) -> None:
        """To the disk; called before a checkpoint is committed, so that the log never lags behind it."""
        os.fsync(self._file)

    def close(self) -> None:
        """Sync, if the disk lets us, and close."""
        with contextlib.suppress(OSError):
            self.sync()
        os.close(self._file)


class TensorBoard:
    """Scalars to RUN/tensorboard if the package is installed; otherwise nothing."""

    def __init__(self, folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer: Any = None
            return
        try:
            self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)
        except (OSError, ValueError) as error:  # not writable; a path that is not UTF-8, which tensorboard refuses
            self._give_up(error)

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of one line of metrics.jsonl."""
        try:
            self._add(record)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """They are a picture of the run, not the run."""
        print(f"no TensorBoard files from here on: {error}", file=sys.stderr)
        self._writer = None

    def _add(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        for key, value in record.items():
            nested = value if isinstance(value, Mapping) else {"": value}
            for inner, number in nested.items():
                if isinstance(number, (int, float)) and key != "step":
                    self._writer.add_scalar(f"{key}/{inner}" if inner else key, number, record["step"])

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()


def duration(seconds: float) -> str:
    """'1:02:03', '2:03' or '3s'."""
    if not math.isfinite(seconds):
        return "?"
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600}:{s % 3600 // 60:02d}:{s % 60:02d}"
    return f"{s // 60}:{s % 60:02d}" if s >= 60 else f"{s}s"


class Progress:
    """One line that is rewritten on a terminal; otherwise a line every `every` steps. Written to stderr."""

    def __init__(
        self, total: int, start: int, every: int = 50, stream: TextIO | None = None, enabled: bool = True
    ) -> None:
        self._stream = stream or sys.stderr
        self.total, self.start, self.every = total, start, every
        self.enabled = enabled and self._stream is not None  # a daemon may have none
        self._terminal = self.enabled and self._stream.isatty()
        self._began = time.monotonic()
        self._last_line = start
        self._width = 0

    def show(self, step: int, text: str, last: bool = False) -> None:
        """Progress after `step` steps; `text` holds the figures."""
        if not self.enabled:
            return
        done = step - self.start
        eta = (time.monotonic() - self._began) / done * (self.total - step) if done else math.inf
        line = f"step {step}/{self.total}  {text}  eta {duration(eta)}"
        if self._terminal:
            self._write("\r" + line.ljust(self._width) + ("\n" if last else ""))
            self._width = len(line)
        elif last or step - self._last_line >= self.every or self._last_line == self.start:
            self._write(line + "\n")
            self._last_line = step

    def note(self, text: str) -> None:
        """A line of its own."""
        if not self.enabled:
            return
        blank = "\r" + " " * self._width + "\r" if self._terminal and self._width else ""
        self._write(blank + text + "\n")

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed or a full disk: no reason to end a run
            self._stream.write(text)
            self._stream.flush()
