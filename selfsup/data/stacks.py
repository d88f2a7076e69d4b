"""Many images of one size in one .npy file, which stays on the disk: each is read when it is asked for."""

import hashlib
import os
from pathlib import Path

import numpy as np

from selfsup.config import DataConfig
from selfsup.data.base import Source, reading
from selfsup.data.decode import Pixels, from_array
from selfsup.errors import UserError
from selfsup.wording import one_line

LABELS = ".labels.npy"
"""`x.npy` and, of its classes, `x.labels.npy`."""


class StackSource(Source):
    """An array [N,H,W], [N,H,W,C] or [N,C,H,W], mapped into memory; int [N] beside it are labels, -1 where there is none.

    A stack [N,H,W] is of grey images. Objects are refused: nothing is unpickled.
    """

    def __init__(self, path: str, channels: int, config: DataConfig) -> None:
        super().__init__(channels, config)
        self.path = os.path.abspath(path)
        self._stack = self._open()
        if self._stack.ndim not in (3, 4) or 0 in self._stack.shape:
            raise UserError(
                f"data={one_line(path)}: an array of shape {list(self._stack.shape)}; a stack of images is [N,H,W], [N,H,W,C] or "
                "[N,C,H,W]; give a folder for files of one image each"
            )
        self._labels = self._beside()

    def _open(self) -> np.ndarray:
        return _loaded(self.path)

    def _beside(self) -> np.ndarray | None:
        beside = Path(self.path).with_suffix(LABELS)
        if not beside.is_file():
            return None
        labels = _loaded(str(beside))
        if labels.dtype.kind not in "iu" or labels.shape != (len(self._stack),):
            raise UserError(
                f"data: {one_line(beside)} is {labels.dtype} {list(labels.shape)}; whole numbers [{len(self._stack)}] are needed"
            )
        return np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._stack)

    def read(self, i: int) -> Pixels:
        return from_array(self.raw(i), self.channels, **reading(self.config))

    def raw(self, i: int) -> np.ndarray:
        return np.array(self._stack[i])

    def name(self, i: int) -> str:
        return f"{one_line(self.path)}[{i}]"

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    def fingerprint(self) -> str:
        what = f"{os.path.basename(self.path)}\n{self._stack.shape}\n{self._stack.dtype}"
        return hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_stack": None}  # another process maps its own

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._stack = self._open()


def _loaded(path: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"data: {one_line(path)} cannot be read as an array: {one_line(error)}") from None
