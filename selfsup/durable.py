"""The few operations on a disk that durable things are made of; called as `durable.NAME`, so that tests can stop between two.

Nothing here orders or decides: who writes what after what is the business of `checkpoint`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

TEMPORARY = ".tmp-"
"""Prefix of what is not finished."""


def make_folder(path: Path) -> None:
    """Make a folder that must not exist yet, in one that does."""
    path.mkdir()


def write(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file, not yet synced: (bytes, hex sha256), both of what was handed over and not of what a disk returns."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            digest.update(view)  # on large buffers this and the write let other threads run
            size += len(view)
            while len(view):
                view = view[file.write(view) :]
    return size, digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Replace `target`, in one step."""
    os.replace(source, target)


def remove(path: Path) -> None:
    """A file, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old or the new text and nothing else."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    write(temporary, [text.encode()])
    fsync(temporary)
    rename(temporary, path)
    fsync(path.parent)
