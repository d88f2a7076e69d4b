"""The folder that is written: one process at a time, one recipe, and what is said when the disk does not take something."""

import contextlib
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

from selfsup import durable
from selfsup.errors import DiskError, UserError
from selfsup.guard.processes import Process
from selfsup.wording import one_line

MANIFEST, RECIPE, _LOCK = "manifest.jsonl", "recipe.yaml", ".lock"
HEAD = "# selfsup augment; data "
"""How a recipe that was written here begins."""
_PATIENCE = 20.0  # seconds for the worker processes of one that was killed, which hold its lock, to see it and end


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around operations on the disk alone. Raises DiskError naming the file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or one_line(error)
        raise DiskError(f"{path}: cannot be written: {why}; make room, then add --resume") from None


def append(file: IO[bytes], content: bytes) -> None:
    """All of it to a file without a buffer, which on a full disk takes a part."""
    view = memoryview(content)
    while len(view):
        view = view[file.write(view) :]


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make the folder, and keep others from writing there. Raises UserError if one does, or if it holds other things."""
    if out.exists() and (not out.is_dir() or (not _is_ours(out / RECIPE) and _others(out))):
        raise UserError(f"{out} is there and holds other things; choose a folder that is new or empty")
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    with contextlib.closing(os.fdopen(handle, "r+b", buffering=0)):
        _lock(handle, out)
        try:
            with writing(out / _LOCK):
                os.truncate(handle, 0)
                os.pwrite(handle, json.dumps(asdict(Process.current())).encode(), 0)
            yield
        finally:
            with contextlib.suppress(OSError):
                os.truncate(handle, 0)


def _lock(handle: int, out: Path) -> None:
    """Of the open file, which workers share: they may write until the last of them has ended."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(handle)
            if holder is None or holder.alive() is not False or time.monotonic() > until:
                who = f" (process {holder.pid} on {one_line(holder.host)})" if holder is not None else ""
                raise UserError(
                    f"{out}: another selfsup augment writes here{who}; wait for its end, or choose another folder"
                ) from None
            time.sleep(0.1)
        except OSError:
            return  # a file system without locks


def _holder(handle: int) -> Process | None:
    """Whose lock it is, by what it wrote there; None if that does not say it."""
    try:
        return Process.parse(json.loads(os.pread(handle, 1000, 0)))
    except ValueError:
        return None


def begin(out: Path, text: str, resume: bool) -> bool:
    """Write the recipe `text`; whether there was a beginning, of the same recipe and data."""
    recipe = out / RECIPE
    if recipe.is_file() and not _is_empty(out):
        if not resume:
            raise UserError(f"{out} holds an augmented data set; go on with --resume, or choose another folder")
        if (seen := recipe.read_text(encoding="utf-8", errors="replace")) != text:
            pairs = itertools.zip_longest(seen.splitlines(), text.splitlines(), fillvalue="")
            old, new = next(((a, b) for a, b in pairs if a != b), ("", ""))
            raise UserError(
                f"--resume: {recipe} was written with {one_line(old)!r}, now it is {one_line(new)!r}; use another folder"
            )
        return True
    with writing(out):
        (out / MANIFEST).unlink(missing_ok=True)
        durable.write_atomically(recipe, text)
    return False


def _is_ours(recipe: Path) -> bool:
    try:
        with open(recipe, "rb") as file:
            return file.read(len(HEAD)) == HEAD.encode()
    except OSError:
        return False


def _others(out: Path) -> bool:
    return any(path.name != _LOCK for path in out.iterdir())


def _is_empty(out: Path) -> bool:
    """Whether nothing that is a recipe's has been written yet: no image or mask, and no line of one."""
    if any(p.is_file() for kind in ("images", "masks") for p in (out / kind).rglob("*")):
        return False
    try:
        with open(out / MANIFEST, encoding="utf-8", errors="replace") as lines:
            return not any('"image"' in line for line in lines)
    except FileNotFoundError:
        return True


def first_bad(out: Path) -> str:
    """Name and reason of the first image that could not be read, by the manifest."""
    with open(out / MANIFEST, encoding="utf-8") as lines:
        record = next((r for r in map(json.loads, lines) if "bad" in r), {"source": "?", "bad": "?"})
    return f"{one_line(record['source'])}: {record['bad']}"
