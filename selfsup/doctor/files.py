"""Files without looking at their pixels: sizes, those that are missing, and equal ones; with bounded work."""

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from selfsup.data.base import Source
from selfsup.data.decode import BadImage
from selfsup.randomness import generator

MOST_SIZES = 200_000
"""Files whose size is asked for."""

MOST_HASHED = 20_000
"""Files that are read for their hash."""

MOST_BYTES = 1 << 30
"""Of them together."""

LISTED = 10
"""Examples that are named."""

TAG = 0xD0C7
"""Of what the doctor draws."""


@dataclass
class Duplicates:
    """Files with the same content."""

    found: int = 0
    """How many could be left out."""
    looked_at: int = 0
    """Files, or decoded images, among which equal ones were looked for."""
    same_size: int = 0
    """Of those, files that share their size with another: no others can be equal."""
    hashed: int = 0
    """Of those, files that were read."""
    examples: list[tuple[str, str]] = field(default_factory=list)
    what: str = "files"
    """'files' by the hash of their bytes, or 'decoded images' where there are no files."""


@dataclass(kw_only=True)
class Files:
    """What is seen of them."""

    sizes_seen: int = 0
    """Files whose size was asked for; 0: there are no files."""
    total_bytes: float | None = None
    """Of all files, from the mean of those that were asked for."""
    missing: list[str] = field(default_factory=list)
    """Some of the files that are not there or empty."""
    missing_count: int = 0
    duplicates: Duplicates = field(default_factory=Duplicates)


class Counting:
    """Progress of a long look on stderr: one line, rewritten, on a terminal; else one every `every`, at most one a second."""

    def __init__(self, what: str, total: int, every: int) -> None:
        self.what, self.total, self.every = what, total, every
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = time.monotonic()
        self._written = False

    def at(self, done: int) -> None:
        """`done` are done."""
        now = time.monotonic()
        due = now - self._shown > 0.2 if self._terminal else done % self.every == 0 and now - self._shown > 1
        if not due or sys.stderr is None:
            return
        self._shown, self._written = now, True
        line = f"{self.what}: {done:,} of {self.total:,}"
        print(f"\r{line}" if self._terminal else line, end="" if self._terminal else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        """The next line begins anew."""
        if self._terminal and self._written:
            print(file=sys.stderr)


def compare_files(source: Source, found: Files, deadline: float) -> None:
    """Sizes first, for only files of the same size can be equal; then the hashes of those, as many as the bounds allow."""
    if source.stored_bytes(0) is None:
        return
    indices, sizes = _sizes(source, deadline)
    found.sizes_seen = len(sizes)
    found.total_bytes = float(np.maximum(sizes, 0).mean()) * len(source)
    faulty = np.flatnonzero(sizes <= 0)
    found.missing_count = len(faulty)
    found.missing = [source.name(int(indices[i])) for i in faulty[:LISTED]]
    duplicates = found.duplicates
    duplicates.looked_at = len(sizes)
    queue = _candidates(sizes)
    duplicates.same_size = len(queue)
    read, first, counting = 0, dict[bytes, int](), Counting("files hashed", min(len(queue), MOST_HASHED), 5000)
    for place in queue[:MOST_HASHED].tolist():
        if read + sizes[place] > MOST_BYTES or time.monotonic() > deadline:
            break
        read += int(sizes[place])
        duplicates.hashed += 1
        counting.at(duplicates.hashed)
        index = int(indices[place])
        try:
            digest = hashlib.blake2b(source.raw(index), digest_size=16).digest()
        except BadImage:
            continue
        note_equal(duplicates, first, digest, index, source.name)
    counting.end()


def _sizes(source: Source, deadline: float) -> tuple[np.ndarray, np.ndarray]:
    """(images, bytes of their files): of all, or of a seeded choice of MOST_SIZES; fewer if the time is over."""
    indices = choice(len(source), MOST_SIZES, 0)
    counting = Counting("file sizes", len(indices), 20_000)
    sizes = np.empty(len(indices), dtype=np.int64)
    done = 0
    for done, index in enumerate(indices.tolist(), 1):
        sizes[done - 1] = source.stored_bytes(index) or 0
        counting.at(done)
        if done % 256 == 0 and time.monotonic() > deadline:
            break
    counting.end()
    return indices[:done], sizes[:done]


def _candidates(sizes: np.ndarray) -> np.ndarray:
    """Places of files that share their size with another, groups together, in a seeded order of groups."""
    order = np.argsort(sizes, kind="stable")
    order = order[sizes[order] > 0]
    _, starts, counts = np.unique(sizes[order], return_index=True, return_counts=True)
    groups = np.flatnonzero(counts > 1)
    generator(TAG, 1).shuffle(groups)
    parts = [order[starts[g] : starts[g] + counts[g]] for g in groups]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def note_equal(
    duplicates: Duplicates, first: dict[bytes, int], digest: bytes, index: int, name: Callable[[int], str]
) -> None:
    earlier = first.setdefault(digest, index)
    if earlier != index:
        duplicates.found += 1
        if len(duplicates.examples) < LISTED:
            duplicates.examples.append((name(earlier), name(index)))


def choice(count: int, most: int, key: int) -> np.ndarray:
    """At most `most` of `count`, ascending."""
    if count <= most:
        return np.arange(count)
    return np.sort(generator(TAG, key).choice(count, most, replace=False))
