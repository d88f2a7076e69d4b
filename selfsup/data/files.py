"""Images in a folder, or in a list of files."""

import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from selfsup.config import DataConfig
from selfsup.data.base import Names, Source, retried, size_of, text
from selfsup.data.decode import SUFFIXES, Pixels, read_file
from selfsup.errors import UserError
from selfsup.wording import one_line

_SUFFIXES = tuple(os.fsencode(s) for s in SUFFIXES)
_LARGEST_LABEL = 10_000_000


def is_image(name: bytes) -> bool:
    """Whether the suffix, in any case, is one of an image file; hidden files are not images."""
    return name.lower().endswith(_SUFFIXES) and not name.rpartition(b"/")[2].startswith(b".")


def labelled(paths: Iterable[bytes]) -> tuple[Names, np.ndarray | None, list[str] | None]:
    """(paths, labels int64 [N], names of classes) of relative paths: their first folders are the classes, if there are two or
    more of them and no path lies beside them; else without labels."""
    names, classes, labels = Names(), dict[bytes, int](), array("q")
    for path in paths:
        names.append(path)
        head, slash, _ = path.partition(b"/")
        labels.append(classes.setdefault(head, len(classes)) if slash else -1)
    if len(classes) < 2 or min(labels) < 0:
        return names, None, None
    return names, np.array(labels, dtype=np.int64), [text(name) for name in classes]


class FolderSource(Source):
    """All images below a folder, sorted. The first level of subfolders are the classes, if there are two or more of
    them and no image lies beside them."""

    def __init__(self, root: str, channels: int, config: DataConfig) -> None:
        super().__init__(channels, config)
        self.root = os.fsencode(root)
        self._names, self._labels, self.classes = labelled(_walk(self.root))
        if not len(self._names):
            raise UserError(
                f"data: no images in {one_line(root)}; looked in it and below for {' '.join(SUFFIXES)}, in any case"
            )

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> Pixels:
        return _read_file(self._path(i), self)

    def raw(self, i: int) -> bytes:
        return _bytes_of(self._path(i), self)

    def stored_bytes(self, i: int) -> int:
        return size_of(self._path(i))

    def _path(self, i: int) -> bytes:
        return os.path.join(self.root, self._names[i])

    def name(self, i: int) -> str:
        return text(self._path(i))

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    def fingerprint(self) -> str:
        return self._names.fingerprint


class ListSource(Source):
    """The files named in a text file: one path a line, relative to the list's folder or absolute, and optionally a tab
    or a space and a label (a number, or a name)."""

    def __init__(self, path: str, channels: int, config: DataConfig) -> None:
        super().__init__(channels, config)
        self.root = os.path.dirname(os.path.abspath(os.fsencode(path)))
        self._names = Names()
        known: dict[bytes, int] = {}
        codes = array("q")
        try:
            with open(path, "rb") as lines:
                for number, raw in enumerate(lines):
                    line = raw.removeprefix(b"\xef\xbb\xbf" if number == 0 else b"").rstrip(b"\r\n")
                    if not line.strip():
                        continue
                    name, label = self.split_line(line)
                    self._names.append(name)
                    codes.append(known.setdefault(label, len(known)) if label else -1)
        except OSError as error:
            raise UserError(f"data: the list {one_line(path)} cannot be read: {error.strerror}") from None
        if not len(self._names):
            raise UserError(
                f"data: the list {one_line(path)} names no files; write one path a line, then optionally a tab and a label"
            )
        if not any(os.path.exists(self._path(i)) for i in range(min(len(self), 100))):
            missing = one_line(text(self._path(0)))
            raise UserError(
                f"data: {one_line(path)} line 1: no file {missing}; paths are relative to the list's folder"
            )
        self._labels = self._resolve(np.array(codes, dtype=np.int64), list(known)) if known else None

    @staticmethod
    def split_line(line: bytes) -> tuple[bytes, bytes]:
        """(path, label)."""
        return _split_line(line)

    def _resolve(self, codes: np.ndarray, words: list[bytes]) -> np.ndarray:
        try:
            values = [int(word) for word in words]
        except ValueError:
            values = []
        if values and min(values) >= -1 and max(values) <= _LARGEST_LABEL:
            if max(values) < 0:
                return np.full_like(codes, -1)
            self.classes = [str(v) for v in range(max(values) + 1)]
        else:  # names, in their sorted order
            self.classes = [text(word) for word in sorted(words)]
            rank = {word: i for i, word in enumerate(sorted(words))}
            values = [rank[word] for word in words]
        return np.array([*values, -1], dtype=np.int64)[codes]

    def _path(self, i: int) -> bytes:
        return os.path.join(self.root, self._names[i])

    def __len__(self) -> int:
        return len(self._names)

    def read(self, i: int) -> Pixels:
        return _read_file(self._path(i), self)

    def raw(self, i: int) -> bytes:
        return _bytes_of(self._path(i), self)

    def stored_bytes(self, i: int) -> int:
        return size_of(self._path(i))

    def name(self, i: int) -> str:
        return text(self._path(i))

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    def fingerprint(self) -> str:
        return self._names.fingerprint


def _split_line(line: bytes) -> tuple[bytes, bytes]:
    """(path, label); a space splits only what is not itself the name of an image."""
    if b"\t" in line:
        name, _, label = line.rpartition(b"\t")
        return name.strip(), label.strip()
    name, _, label = line.strip().rpartition(b" ")
    if name and is_image(name.rstrip()) and not is_image(label):
        return name.rstrip(), label
    return line.strip(), b""


def _bytes_of(path: bytes, source: Source) -> bytes:
    return retried(lambda: read_file(path, source.channels, source.config.max_pixels))


def _read_file(path: bytes, source: Source) -> Pixels:
    return source.decoded(_bytes_of(path, source))


def _walk(root: bytes) -> Iterator[bytes]:
    """Relative paths of images below `root`: a folder's own files, then its subfolders, each sorted by bytes.

    Links to folders are followed, except back to a folder that holds them.
    """
    stack: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
    while stack:
        below, above = stack.pop()
        folder = os.path.join(root, below) if below else root
        try:
            info = os.stat(folder)
            here = (info.st_dev, info.st_ino)
            if here in above:
                continue
            files, folders = [], []
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(b".") or entry.name == b"__MACOSX":
                        continue
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif is_image(entry.name):
                        files.append(entry.name)
        except OSError as error:
            raise UserError(f"data: the folder {one_line(text(folder))} cannot be read: {error.strerror}") from None
        prefix = below + b"/" if below else b""
        yield from (prefix + name for name in sorted(files))
        stack += [(prefix + name, above | {here}) for name in sorted(folders, reverse=True)]
