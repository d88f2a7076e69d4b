"""A small file system of its own, for tests of what happens when it is full."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def as_root(*command: str) -> None:
    """mount and umount: as root, or through sudo where that asks for nothing."""
    if os.geteuid():
        command = ("sudo", "-n", *command)
    subprocess.run(command, check=True, capture_output=True, timeout=20)


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of this size ('8m') at `folder`, which is made; skips the test where mounting is not permitted."""
    folder.mkdir()
    try:
        as_root("mount", "-t", "tmpfs", "-o", f"size={size},uid={os.geteuid()}", "tmpfs", str(folder))
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"no permission to mount a tmpfs: {getattr(error, 'stderr', error)!r}")
    try:
        yield folder
    finally:
        as_root("umount", "-l", str(folder))
