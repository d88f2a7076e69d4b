"""Statistics of each channel of a set of images, in one pass over their values as they are stored.

Mean and standard deviation are exact: moments of each image in float64, merged (Chan, Golub and LeVeque, 1983, "Algorithms for
Computing the Sample Variance"). Integers of up to 16 bits are counted one by one, which makes percentiles exact; all others
in cells of float32's own spacing, 2^-9 wide in relative terms, so that a percentile is within 0.1 % of a value that is there.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from selfsup.data.arrays import BadImage, oriented, with_channels
from selfsup.data.base import Source
from selfsup.data.decode import read_file, stored
from selfsup.data.wide_files import nodata_of

_CELLS = 1 << 18
_SHIFT = 32 - 18


@dataclass
class Channel:
    """Of the values of one channel: finite ones, and not those that stand for nothing."""

    count: int = 0
    mean: float = 0.0
    moment: float = 0.0
    """Sum of squared differences to the mean."""
    low: float = np.inf
    high: float = -np.inf
    left_out: int = 0
    """NaN, infinite, or the value for nothing."""
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Which cells of the histogram hold something, ascending."""
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def std(self) -> float:
        """Over all values, as numpy's."""
        return float(np.sqrt(self.moment / self.count)) if self.count else 0.0

    def add(self, other: "Channel") -> None:
        """Take in the values of another."""
        self.left_out += other.left_out
        if not other.count:
            return
        both, apart = self.count + other.count, other.mean - self.mean
        self.moment += other.moment + apart**2 * self.count * other.count / both
        self.mean += apart * other.count / both
        self.count, self.low, self.high = both, min(self.low, other.low), max(self.high, other.high)
        keys, place = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        self.counts = np.bincount(place, np.concatenate([self.counts, other.counts]), len(keys)).astype(np.int64)
        self.keys = keys


def channel_of(values: np.ndarray, nodata: float | None) -> Channel:
    """Of the values of one image's channel, of any shape."""
    flat = values.reshape(-1)
    good = np.isfinite(flat) if flat.dtype.kind == "f" else np.ones(len(flat), bool)
    if nodata is not None:
        good &= flat != nodata
    kept = flat if good.all() else flat[good]
    found = Channel(left_out=len(flat) - len(kept))
    if not len(kept):
        return found
    wide = kept.astype(np.float64)
    found.count, found.mean = len(kept), float(wide.mean())
    found.moment = float(np.square(wide - found.mean).sum())
    found.low, found.high = float(kept.min()), float(kept.max())
    cells = np.bincount(cells_of(kept))
    found.keys = np.flatnonzero(cells)
    found.counts = cells[found.keys]
    return found


def is_counted(dtype: np.dtype) -> bool:
    """Whether each value has a cell of its own."""
    return dtype.kind in "ui" and dtype.itemsize <= 2


def cells_of(values: np.ndarray) -> np.ndarray:
    """int64: the cell of each value; in the order of the values."""
    if is_counted(values.dtype):
        return values.astype(np.int64) - np.iinfo(values.dtype).min
    bits = values.astype(np.float32).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # ascending with the number
    return (ordered >> _SHIFT).astype(np.int64)


def values_of(keys: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64: what a cell stands for: its value, or the middle of its range."""
    if is_counted(dtype):
        return keys + float(np.iinfo(dtype).min)
    ordered = ((keys.astype(np.uint64) << _SHIFT) + (1 << _SHIFT - 1)).astype(np.uint32)
    bits = np.where(ordered >> 31, ordered & np.uint32((1 << 31) - 1), ~ordered)
    out = bits.view(np.float32).astype(np.float64)
    return np.where(np.abs(out) < 1e-37, 0.0, out)


@dataclass
class Table:
    """Of all images of one type."""

    dtype: np.dtype
    channels: list[Channel]
    images: int = 0

    def percentile(self, channel: int, q: float) -> float:
        """The least value that at least q per cent are not above; exact or within 0.1 %: see the module."""
        one = self.channels[channel]
        if not one.count:
            return float("nan")
        place = int(np.searchsorted(np.cumsum(one.counts), q / 100 * one.count * (1 - 1e-12)))
        value = float(values_of(one.keys[min(place, len(one.keys) - 1)][None], self.dtype)[0])
        return min(max(value, one.low), one.high)

    def mapped(self, channel: int, low: float, high: float) -> tuple[float, float]:
        """(mean, std) of the values where low is 0 and high is 1, and what lies outside is cut: what a network sees."""
        one = self.channels[channel]
        if not one.count:
            return 0.5, 1.0
        x = np.clip((values_of(one.keys, self.dtype) - low) / (high - low), 0, 1)
        mean = float((x * one.counts).sum() / one.count)
        return mean, float(np.sqrt((np.square(x - mean) * one.counts).sum() / one.count))


@dataclass
class Statistics:
    """Of a set of images."""

    tables: dict[str, Table] = field(default_factory=dict)
    """By type."""
    modes: Counter[str] = field(default_factory=Counter)
    """Type and number of channels as they are stored, by how often."""
    height: list[int] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    nodata: Counter[float] = field(default_factory=Counter)
    """Values for nothing that files name."""
    bad: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: "Statistics") -> None:
        """Take in those of other images."""
        for name, table in other.tables.items():
            mine = self.tables.setdefault(name, Table(table.dtype, [Channel() for _ in table.channels]))
            mine.images += table.images
            for one, more in zip(mine.channels, table.channels, strict=True):
                one.add(more)
        self.modes.update(other.modes)
        self.nodata.update(other.nodata)
        self.height += other.height
        self.width += other.width
        self.bad += other.bad

    @property
    def main(self) -> Table:
        """That of most images."""
        return max(self.tables.values(), key=lambda table: table.images)


class Pieces(Dataset[Statistics]):
    """Item k is the statistics of the k-th so many of the chosen images."""

    def __init__(
        self, source: Source, chosen: np.ndarray, channels: int, nodata: float | None, at_once: int = 16
    ) -> None:
        self.source, self.channels, self.nodata = source, channels, nodata
        self.pieces = [chosen[i : i + at_once] for i in range(0, len(chosen), at_once)]

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, k: int) -> Statistics:
        found = Statistics()
        for i in self.pieces[k].tolist():
            try:
                found.add(self._one(i))
            except BadImage as error:
                found.bad.append((self.source.name(i), str(error)))
        return found

    def _one(self, i: int) -> Statistics:
        raw = self.source.raw(i)
        nodata = self.nodata
        noted = nodata_of(raw) if isinstance(raw, bytes) else None
        array, held = values(raw, self.channels, self.source)
        found = Statistics(height=[array.shape[0]], width=[array.shape[1]])
        if noted is not None:
            found.nodata[noted] += 1
            nodata = noted if nodata is None else nodata
        found.modes[f"{array.dtype}, {held} channels"] += 1
        channels = [channel_of(array[:, :, c], nodata) for c in range(array.shape[2])]
        found.tables[str(array.dtype)] = Table(array.dtype, channels, images=1)
        return found


def values(raw: Any, channels: int, source: Source) -> tuple[np.ndarray, int]:
    """[H,W,channels] of what `Source.raw` gives, in its own unit, as training would read it but for the value range; and how
    many channels are stored."""
    config = source.config
    array = _array(raw, None, source)
    found = count_of(array.shape)
    if found != channels:  # of a file, grey and colour as they are converted for training
        array = _array(raw, channels, source)
    array = oriented(array, channels, config.max_pixels)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype.kind not in "uif":
        raise BadImage(f"array of type {array.dtype}; an image is uint8, uint16 or float")
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    return with_channels(native, channels, config.background), found


def stored_channels(raw: Any, source: Source) -> int:
    """How many channels there are in what `Source.raw` gives; alpha is one of them."""
    return count_of(_array(raw, None, source).shape)


def stored_array(raw: Any, source: Source) -> np.ndarray:
    """What `Source.raw` gives, of its own type: [H,W], [H,W,C] or [C,H,W]."""
    return _array(raw, None, source)


def count_of(shape: tuple[int, ...]) -> int:
    """Of an array [H,W], [H,W,C] or [C,H,W]."""
    return 1 if len(shape) == 2 else min(shape[0], shape[2]) if len(shape) == 3 else 0


def _array(raw: Any, channels: int | None, source: Source) -> np.ndarray:
    config = source.config
    if (not isinstance(raw, bytes) and hasattr(raw, "__fspath__")) or isinstance(raw, str):
        raw = read_file(raw, channels or 4, config.max_pixels)
    if isinstance(raw, bytes):
        return stored(raw, channels, config.max_pixels, config.background)
    if hasattr(raw, "detach"):  # a tensor [C,H,W] or [H,W]
        array = raw.detach().cpu().numpy()
        return array.transpose(1, 2, 0) if array.ndim == 3 else array
    return np.asarray(raw)
