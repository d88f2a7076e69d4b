"""The record of images that could not be read, and when there are too many of them."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from selfsup.errors import UserError

_AT_LEAST = 10


class BadFileLog:
    """RUN/bad_files.jsonl: one {"file", "reason"} a line, each file once, over restarts too.

    `max_fraction`: when more than this part of the images this process has seen, and at least 10, could not be read,
    `add` raises UserError.
    """

    def __init__(self, path: str | Path, max_fraction: float) -> None:
        self.path, self.max_fraction = Path(path), max_fraction
        self.seen = self.count = 0
        self._logged: set[str] = set()
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    self._logged.add(json.loads(line)["file"])
                except (ValueError, KeyError, TypeError):
                    continue  # a line cut short by a crash: its file will be written again

    def add(self, bad: Iterable[tuple[str, str]], seen: int) -> None:
        """Record the bad images of a batch. bad: (name, reason) pairs. seen: how many samples that batch holds."""
        bad = list(bad)
        self.seen += seen
        self.count += min(len(bad), seen)
        fresh = {name: reason for name, reason in bad if name not in self._logged}
        if fresh:
            lines = [
                json.dumps({"file": name, "reason": reason}, ensure_ascii=False) + "\n"
                for name, reason in fresh.items()
            ]
            try:
                handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                try:
                    os.write(
                        handle, "".join(lines).encode("utf-8", "backslashreplace")
                    )  # one write: ranks share the file
                finally:
                    os.close(handle)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror or error}") from None
            self._logged.update(fresh)
        if bad and self.count >= _AT_LEAST and self.count > self.max_fraction * self.seen:
            name, reason = bad[-1]
            raise UserError(
                f"data: {self.count} of {self.seen} images could not be read, "
                f"more than data.max_bad_fraction={self.max_fraction}; see {self.path}\nthe last: {name}: {reason}"
            )
