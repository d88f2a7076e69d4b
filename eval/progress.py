"""Progress of an evaluation on stderr: one rewritten line on a terminal, otherwise a line every few seconds."""

import contextlib
import sys
import time
from typing import TextIO

from selfsup.guard import watchdog
from selfsup.log import duration


class Progress:
    """Counts to `total`; the last line is always written. Not enabled: silent (ranks other than 0)."""

    def __init__(
        self, total: int, what: str, *, enabled: bool = True, stream: TextIO | None = None, every_s: float = 10.0
    ) -> None:
        self.total, self.what = total, what
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._enabled = enabled
        self._interval = 0.2 if self._terminal else every_s
        self._began = self._shown = time.monotonic()
        self._done = 0
        self._width = 0

    def advance(self, count: int, text: str = "") -> None:
        """`count` more are done; `text` holds further figures."""
        self._done += count
        watchdog.alive()  # of the training run that waits for this evaluation, if there is one
        now = time.monotonic()
        if self._enabled and now - self._shown >= self._interval:
            self._shown = now
            self._write(now, text, last=False)

    def close(self, text: str = "") -> None:
        """Write the final line."""
        if self._enabled:
            self._write(time.monotonic(), text, last=True)

    def _write(self, now: float, text: str, last: bool) -> None:
        seconds = max(now - self._began, 1e-9)
        rate = self._done / seconds
        left = (
            f"in {duration(seconds)}"
            if last
            else f"eta {duration((self.total - self._done) / rate if rate else float('inf'))}"
        )
        line = f"{self.what} {self._done}/{self.total}  {rate:.0f}/s  {text + '  ' if text else ''}{left}"
        with contextlib.suppress(OSError):  # a terminal that was closed: no reason to end what is measured, or a run
            if self._terminal:
                self._stream.write("\r" + line.ljust(self._width) + ("\n" if last else ""))
                self._width = len(line)
            else:
                self._stream.write(line + "\n")
            self._stream.flush()
