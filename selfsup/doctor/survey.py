"""A look at a source of images, with bounded work: all names, the sizes of many files, and the pixels of a sample."""

import hashlib
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfsup.config import DataConfig
from selfsup.data.base import Source
from selfsup.data.decode import BadImage, Pixels
from selfsup.data.sources import open_source
from selfsup.doctor.files import LISTED, TAG, Counting, Files, choice, compare_files, note_equal
from selfsup.doctor.formats import describe
from selfsup.errors import UserError
from selfsup.randomness import generator

_FIRST_LOOK = 16
_SIDE = 128  # pixels along each side that statistics are taken of
_BLANK = 2.0  # levels: standard deviation below which a picture shows nothing


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
class Survey(Files):
    """What was seen."""

    spec: str
    count: int
    listed_s: float
    """Seconds that the names took."""
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
    compare_files(source, found, time.monotonic() + seconds)
    _decode_some(source, found, sample, time.monotonic() + seconds)
    found.classes = _balance(source, sample)
    return found


# ---------------------------------------------------------------------------------------------------------------- pixels


def _decode_some(source: Source, found: Survey, sample: int, deadline: float) -> None:
    indices = generator(TAG, 2).permutation(choice(len(source), sample, 3))  # so that a part of it is a sample too
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
            note_equal(found.duplicates, first, digest, index, source.name)
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
    return source.decoded(raw)


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


# ---------------------------------------------------------------------------------------------------------------- labels


def _balance(source: Source, sample: int) -> Classes | None:
    if source.labels_at_hand:
        labels = source.labels
    else:  # each costs the reading of an image
        try:
            labels = np.array([source.label(int(i)) for i in choice(len(source), sample, 3)], dtype=np.int64)
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
