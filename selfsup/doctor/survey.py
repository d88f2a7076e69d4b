"""A look at a source of images, with bounded work: all names, the sizes of many files, and the pixels of a sample."""

import hashlib
import io
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from selfsup.config import DataConfig
from selfsup.data.base import Source
from selfsup.data.decode import BadImage, Pixels, decode, read_file
from selfsup.data.sources import open_source
from selfsup.errors import UserError
from selfsup.randomness import generator

MOST_SIZES = 200_000
"""Files whose size is asked for."""

MOST_HASHED = 20_000
"""Files that are read for their hash."""

MOST_BYTES = 1 << 30
"""Of them together."""

LISTED = 10
"""Examples that are named."""

_TAG = 0xD0C7
_FIRST_LOOK = 16
_SIDE = 128  # pixels along each side that statistics are taken of
_BLANK = 2.0  # levels: standard deviation below which a picture shows nothing
_GREY_MODES = ("1", "L", "LA", "La", "I", "F")


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


@dataclass
class Classes:
    """Balance of labels."""

    count: int
    """That have images."""
    labelled: int
    unlabelled: int
    smallest: tuple[str, int]
    median: float
    largest: tuple[str, int]
    looked_at: int
    """Images whose label was asked for: all, but where that means to read them."""


@dataclass
class Survey:
    """What was seen."""

    spec: str
    count: int
    listed_s: float
    """Seconds that the names took."""
    sizes_seen: int = 0
    """Files whose size was asked for; 0: there are no files."""
    total_bytes: float | None = None
    """Of all files, from the mean of those that were asked for."""
    missing: list[str] = field(default_factory=list)
    """Some of the files that are not there or empty."""
    missing_count: int = 0
    decoded: int = 0
    """Images of the sample, readable or not."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Some of those that cannot be read, with the reason."""
    bad_count: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    width: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """Of the sample's readable images, upright."""
    height: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    channels: int = 3
    """That a network for them should take."""
    grey: int = 0
    """Of the sample: all channels are equal."""
    blank: int = 0
    """Of the sample: hardly anything but one colour."""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    decode_ms: float = 0.0
    """Mean of reading and decoding one on one core."""
    duplicates: Duplicates = field(default_factory=Duplicates)
    classes: Classes | None = None

    @property
    def readable(self) -> int:
        return len(self.width)

    @property
    def short_side(self) -> np.ndarray:
        return np.minimum(self.width, self.height)

    @property
    def elongation(self) -> np.ndarray:
        """Long side over short side."""
        return np.maximum(self.width, self.height) / np.maximum(self.short_side, 1)


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


def survey(spec: str, *, sample: int = 500, seconds: float = 30.0, config: DataConfig | None = None) -> Survey:
    """Look at what `data=SPEC` means.

    sample: at most so many images are decoded, a seeded choice. seconds: looking for duplicates ends after so many, and so
    does decoding. Raises UserError if there are no images.
    """
    began = time.monotonic()
    source = open_source(spec, channels=3, config=config)
    found = Survey(spec, len(source), time.monotonic() - began)
    if found.listed_s > 2:
        print(f"{found.count:,} images listed in {found.listed_s:.1f} s", file=sys.stderr, flush=True)
    _compare_files(source, found, time.monotonic() + seconds)
    _decode_some(source, found, sample, time.monotonic() + seconds)
    found.classes = _balance(source, sample)
    return found


# ----------------------------------------------------------------------------------------------------------------- files


def _compare_files(source: Source, found: Survey, deadline: float) -> None:
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
        _note_equal(duplicates, first, digest, index, source.name)
    counting.end()


def _sizes(source: Source, deadline: float) -> tuple[np.ndarray, np.ndarray]:
    """(images, bytes of their files): of all, or of a seeded choice of MOST_SIZES; fewer if the time is over."""
    indices = _choice(len(source), MOST_SIZES, 0)
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
    generator(_TAG, 1).shuffle(groups)
    parts = [order[starts[g] : starts[g] + counts[g]] for g in groups]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _note_equal(
    duplicates: Duplicates, first: dict[bytes, int], digest: bytes, index: int, name: Callable[[int], str]
) -> None:
    earlier = first.setdefault(digest, index)
    if earlier != index:
        duplicates.found += 1
        if len(duplicates.examples) < LISTED:
            duplicates.examples.append((name(earlier), name(index)))


def _choice(count: int, most: int, key: int) -> np.ndarray:
    """At most `most` of `count`, ascending."""
    if count <= most:
        return np.arange(count)
    return np.sort(generator(_TAG, key).choice(count, most, replace=False))


# ---------------------------------------------------------------------------------------------------------------- pixels


def _decode_some(source: Source, found: Survey, sample: int, deadline: float) -> None:
    indices = generator(_TAG, 2).permutation(_choice(len(source), sample, 3))  # so that a part of it is a sample too
    source.channels = _channels_to_ask_for(source, indices[:_FIRST_LOOK].tolist())
    sides: list[tuple[int, int]] = []
    sums: list[np.ndarray] = []
    first: dict[bytes, int] = {}
    spent, counting = 0.0, Counting("images decoded", len(indices), 100)
    for index in indices.tolist():
        began = time.monotonic()
        if began > deadline and found.decoded:
            break
        found.decoded += 1
        counting.at(found.decoded)
        try:
            raw = source.raw(index)
            pixels = _pixels(source, index, raw)
        except BadImage as error:
            found.bad_count += 1
            if len(found.bad) < LISTED:
                found.bad.append((source.name(index), str(error)))
            continue
        except UserError as error:  # of a data set whose items are none
            raise UserError(f"{source.name(index)}: {error}") from None
        spent += time.monotonic() - began
        form, mode, _ = describe(raw)
        found.formats[form] += 1
        found.modes[mode] += 1
        array = np.asarray(pixels)
        array = array[:, :, None] if array.ndim == 2 else array  # [H,W,C]
        sides.append((array.shape[1], array.shape[0]))
        if not found.sizes_seen:
            found.duplicates.looked_at += 1
            digest = hashlib.blake2b(f"{array.shape}".encode() + array.tobytes(), digest_size=16).digest()
            _note_equal(found.duplicates, first, digest, index, source.name)
        small = array[:: max(1, array.shape[0] // _SIDE), :: max(1, array.shape[1] // _SIDE)].astype(np.float64)
        found.grey += bool((small == small[:, :, :1]).all())
        found.blank += bool(small.std(axis=(0, 1)).max() < _BLANK)
        sums.append(np.stack([small.mean(axis=(0, 1)), (small**2).mean(axis=(0, 1))]))  # [2,C]
    counting.end()
    if not found.sizes_seen:
        found.duplicates.what = "decoded images"
    if not sides:
        return
    found.width, found.height = np.array(sides, dtype=np.int64).T
    found.decode_ms = 1000 * spent / len(sides)
    mean, square = np.stack(sums).mean(axis=0) / [[255], [255**2]]  # [C] each
    std = np.sqrt(np.maximum(square - mean**2, 1e-6))
    found.channels = source.channels
    if source.channels == 3 and found.grey >= 0.99 * len(sides):
        found.channels, mean, std = 1, mean[:1], std[:1]
    found.mean, found.std = tuple(np.round(mean, 3).tolist()), tuple(np.round(std, 3).tolist())


def _pixels(source: Source, index: int, raw: Any) -> Pixels:
    if not isinstance(raw, bytes):
        return source.read(index)
    return decode(raw, source.channels, source.config.max_pixels, source.config.value_range)


def _channels_to_ask_for(source: Source, indices: Iterable[int]) -> int:
    """3, which every grey, colour or transparent image can be read as, unless most have another number of channels."""
    counts: Counter[int] = Counter()
    for index in indices:
        try:
            counts[describe(source.raw(index))[2]] += 1
        except (BadImage, UserError):
            continue
    usual = counts.most_common(1)[0][0] if counts else 3
    return 3 if usual in (0, 1, 3, 4) else usual


def describe(raw: Any) -> tuple[str, str, int]:
    """(format, mode, channels as they are stored) of what `Source.raw` gives; channels 0 if that is not known."""
    if isinstance(raw, (str, os.PathLike)):
        try:
            raw = read_file(raw, 4, 100_000_000)
        except (OSError, BadImage):
            return "file", "?", 0
    if isinstance(raw, bytes):
        if raw.startswith(b"\x93NUMPY"):
            return "NPY", *_of_array(*_npy_header(raw))
        try:
            with warnings.catch_warnings(), Image.open(io.BytesIO(raw)) as image:
                warnings.simplefilter("ignore")
                pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
                mode, bands = image.mode, _bands(image.mode, len(image.getbands()))
                if pages > 1 and bands == 1:
                    return "TIFF", f"{mode} x {pages} pages", pages
                return image.format or "?", mode, bands
        except Exception:  # decoding it tells why
            return "?", "?", 0
    if isinstance(raw, Image.Image):
        return "PIL image", raw.mode, _bands(raw.mode, len(raw.getbands()))
    if isinstance(raw, (np.ndarray, torch.Tensor)):
        return type(raw).__name__, *_of_array(tuple(raw.shape), str(raw.dtype))
    return type(raw).__name__, "?", 0


def _bands(mode: str, bands: int) -> int:
    return 1 if mode in _GREY_MODES or mode.startswith("I;16") else (3 if mode == "P" else bands)


def _npy_header(raw: bytes) -> tuple[tuple[int, ...], str]:
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except (ValueError, OSError):
        return (), "?"
    return shape, str(dtype)


def _of_array(shape: tuple[int, ...], dtype: str) -> tuple[str, int]:
    channels = 1 if len(shape) == 2 else (min(shape[0], shape[2]) if len(shape) == 3 else 0)
    return f"{dtype}, {channels} channels", channels


# ---------------------------------------------------------------------------------------------------------------- labels


def _balance(source: Source, sample: int) -> Classes | None:
    if source.labels_at_hand:
        labels = source.labels
    else:  # each costs the reading of an image
        try:
            labels = np.array([source.label(int(i)) for i in _choice(len(source), sample, 3)], dtype=np.int64)
        except (OSError, SyntaxError, EOFError):
            return None
    if labels is None or not (labels >= 0).any():
        return None
    values, counts = np.unique(labels[labels >= 0], return_counts=True)

    def named(place: int) -> tuple[str, int]:
        value = int(values[place])
        return (source.classes[value] if source.classes and value < len(source.classes) else str(value)), int(
            counts[place]
        )

    return Classes(
        count=len(values),
        labelled=int(counts.sum()),
        unlabelled=int((labels < 0).sum()),
        smallest=named(int(counts.argmin())),
        median=float(np.median(counts)),
        largest=named(int(counts.argmax())),
        looked_at=len(labels),
    )
