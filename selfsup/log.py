"""metrics.jsonl, progress on the terminal, TensorBoard where it is installed."""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a crash cut in half is left out."""
    lines = []
    if path.is_file():
        for raw in path.read_bytes().split(b"\n"):
            try:
                lines.append(json.loads(raw))
            except ValueError:
                break
    return lines


def _tidy(value: Any) -> Any:
    """JSON has no NaN or infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _tidy(v) for k, v in value.items()}
    return value


class MetricsLog:
    """One JSON object a step, each step once, however often the run was killed and resumed."""

    def __init__(self, path: Path, resume_step: int) -> None:
        self.path = path
        if path.exists():
            self._truncate(resume_step)
        self._file = open(path, "ab")  # noqa: SIM115 (closed by close)

    def _truncate(self, resume_step: int) -> None:
        keep = 0
        with open(self.path, "rb") as file:
            for raw in file:
                try:
                    step = json.loads(raw)["step"]
                except (ValueError, KeyError, TypeError):
                    break
                if not raw.endswith(b"\n") or step > resume_step:
                    break
                keep += len(raw)
        with open(self.path, "r+b") as file:
            file.truncate(keep)
            file.flush()
            os.fsync(file.fileno())

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append whole lines in one write."""
        text = "".join(json.dumps(_tidy(r), allow_nan=False) + "\n" for r in records)
        self._file.write(text.encode())
        self._file.flush()

    def sync(self) -> None:
        """To the disk; called before a checkpoint is committed, so that the log never lags behind it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


class TensorBoard:
    """Scalars to RUN/tensorboard if the package is installed; otherwise nothing."""

    def __init__(self, folder: Path, start_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer: Any = None
            return
        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Every number of one line of metrics.jsonl."""
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
        self.total, self.start, self.every, self.enabled = total, start, every, enabled
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
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
            self._stream.write("\r" + line.ljust(self._width) + ("\n" if last else ""))
            self._width = len(line)
        elif last or step - self._last_line >= self.every or self._last_line == self.start:
            self._stream.write(line + "\n")
            self._last_line = step
        self._stream.flush()

    def note(self, text: str) -> None:
        """A line of its own."""
        if not self.enabled:
            return
        if self._terminal and self._width:
            self._stream.write("\r" + " " * self._width + "\r")
        self._stream.write(text + "\n")
        self._stream.flush()
