"""What every source of images offers, and a table of names that holds no Python object per image."""

import errno
import hashlib
import os
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from selfsup.config import DataConfig
from selfsup.data.decode import BadImage, Pixels
from selfsup.wording import printable

T = TypeVar("T")

_TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO, errno.ECONNRESET)
SYSTEM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Of an exhausted system, which says nothing about a file."""
_PAUSES = (0.2, 1.0, 3.0)


class Source(ABC):
    """Images by number, their names and labels."""

    channels: int
    classes: list[str] | None
    """Names by label; None when unlabelled, or when the labels have no names."""

    def __init__(self, channels: int, config: DataConfig) -> None:
        self.channels, self.config = channels, config
        self.classes = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int) -> Pixels:
        """Image i, decoded; raises BadImage(reason)."""

    def raw(self, i: int) -> Any:
        """What is stored for image i, before it is decoded: a file's bytes, or what a data set gives; raises BadImage."""
        return self.read(i)

    def stored_bytes(self, i: int) -> int | None:
        """Size of image i's file, without reading it; -1 if it is not there, None where there are no files."""
        return None

    @property
    def frame_channels(self) -> int:
        """Values a pixel of an image; sources of clips give several frames as one image of more channels."""
        return self.channels

    @property
    def labels_at_hand(self) -> bool:
        """Whether `labels` is known without reading the images."""
        return True

    @abstractmethod
    def name(self, i: int) -> str:
        """What image i is called in messages."""

    @property
    @abstractmethod
    def labels(self) -> np.ndarray | None:
        """int64 [N], -1 where unlabelled; None when nothing is labelled."""

    def label(self, i: int) -> int:
        """The label of image i, or -1."""
        return -1 if self.labels is None else int(self.labels[i])

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) over the count and the names in order: the same as long as image numbers mean the same files."""


class Names:
    """Many byte strings in one blob with offsets: about their own length in memory."""

    def __init__(self) -> None:
        self._blob = bytearray()
        self._ends = array("q", [0])

    def append(self, name: bytes) -> None:
        """Add one at the end."""
        self._blob += name
        self._ends.append(len(self._blob))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        return bytes(self._blob[self._ends[i] : self._ends[i + 1]])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over count, lengths and names."""
        digest = hashlib.sha256(b"%d\n" % len(self))
        digest.update(np.diff(np.frombuffer(self._ends, dtype=np.int64)).astype("<i8").tobytes())
        digest.update(self._blob)
        return digest.hexdigest()


def text(name: bytes) -> str:
    """A file name for people: what cannot be printed is escaped."""
    return printable(os.fsdecode(name))


def size_of(path: str | bytes) -> int:
    """Bytes of a file, by its name alone; -1 if it is none."""
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return -1


def retried(function: Callable[[], T]) -> T:
    """`function()`, again after a pause when a network filesystem stumbles (EIO, ESTALE, ...).

    Raises BadImage when the file cannot be read; an exhausted system (no file handles, no memory) stays an OSError.
    """
    for pause in (*_PAUSES, None):
        try:
            return function()
        except OSError as error:
            if error.errno in SYSTEM:
                raise
            if error.errno not in _TRANSIENT or pause is None:
                raise BadImage(f"cannot be read: {error.strerror or error}") from None
            time.sleep(pause)
    raise AssertionError("unreachable")
