"""Images with masks: how masks are read, and that every one of them is checked before anything is trained.

Everything that goes wrong with one is a UserError that names the file: no head is trained on what was not understood.
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selfsup.data.arrays import ValueRange
from selfsup.data.decode import BadImage, decode
from selfsup.data.mask_files import IDS, read_ids
from selfsup.errors import UserError

from .progress import Progress
from .segment_layouts import Layout, Pairs
from .segment_settings import SegmentSettings

IGNORE = -1
"""What is neither trained nor counted, in every mask that this module gives out."""
REFUSED = -2
"""In a table of classes: an id that is an error."""
_ORIENTATION = 0x0112  # EXIF; 5 to 8 swap the sides


@dataclass
class Classes:
    """Class names, and the table that turns an id of a mask into a class number, IGNORE, or refused."""

    names: list[str]
    table: np.ndarray
    """int16 [65536]."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def ids(self) -> list[int]:
        """The id of each class in masks."""
        return [int(np.flatnonzero(self.table == k)[0]) for k in range(len(self.names))]

    @property
    def others_ignored(self) -> bool:
        """Whether ids that are in no class are ignored instead of refused."""
        return not (self.table == REFUSED).any()


@dataclass
class Reader:
    """How files become arrays."""

    channels: int
    max_pixels: int
    value_range: ValueRange | None
    classes: Classes

    def image(self, path: Path) -> np.ndarray:
        """uint8 [H, W, C]. Raises UserError naming the file."""
        try:
            pixels = np.asarray(decode(path, self.channels, self.max_pixels, self.value_range))
        except BadImage as error:
            raise UserError(f"data: {path}: {error}") from None
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def mask(self, path: Path) -> np.ndarray:
        """int16 [H, W]: class numbers and IGNORE. Raises UserError naming the file and the id."""
        raw = read_ids(path, self.max_pixels)
        out = self.classes.table[raw]
        if (out == REFUSED).any():
            raise UserError(_bad_id(path, raw, out, self.classes))
        return out

    def pair(self, image: Path, mask: Path) -> tuple[np.ndarray, np.ndarray]:
        """Both, of one size."""
        pixels, ids = self.image(image), self.mask(mask)
        if pixels.shape[:2] != ids.shape:
            raise UserError(_sizes(image, pixels.shape[:2], mask, ids.shape))
        return pixels, ids


def _bad_id(path: Path, raw: np.ndarray, out: np.ndarray, classes: Classes) -> str:
    wrong = np.unique(raw[out == REFUSED])
    known = np.flatnonzero(classes.table >= 0)
    shown = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
    ignored = np.flatnonzero(classes.table == IGNORE)
    also = f", {', '.join(map(str, ignored[:3]))} to be ignored" if len(ignored) else ""
    extent = (
        f"{known.min()} to {known.max()}"
        if len(known) == known.max() - known.min() + 1
        else ", ".join(map(str, known[:8]))
    )
    return (
        f"masks: {path}: id {shown} ({int((out == REFUSED).sum())} pixels) is no class; known are {extent}{also}; "
        "set classes=, ids= or ignore="
    )


def _sizes(image: Path, seen: tuple[int, ...], mask: Path, other: tuple[int, ...]) -> str:
    return f"{mask}: {other[1]}x{other[0]} pixels, but its image {image} has {seen[1]}x{seen[0]}; both need one size"


# ----------------------------------------------------------------------------------------------------------------- check


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) by the file's header, upright. Raises UserError naming the file."""
    if path.suffix.lower() == ".npy":
        shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        return (shape[1], shape[2]) if len(shape) == 3 and shape[0] < shape[2] else (shape[0], shape[1])
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"data: {path}: cannot be read: {error}") from None


def open_classes(layout: Layout, settings: SegmentSettings) -> tuple[Classes, np.ndarray, np.ndarray]:
    """(classes, pixels of each in train, in val: int64 [K]); every mask is read once, on several threads.

    Raises UserError for the first file with an id that is no class, with a size that is not its image's, or not readable.
    """
    assert layout.val is not None
    names, count = _names(layout, settings)
    ids = settings.ids if settings.ids is not None else layout.ids
    if ids is not None and count is None:
        count = len(ids)
    reduce = layout.reduce_zero_label if settings.reduce_zero_label is None else settings.reduce_zero_label
    found = [_histograms(pairs, what) for pairs, what in ((layout.train, "train"), (layout.val, "val"))]
    if count is None:
        count = _count_of(found, settings.ignore, reduce, (layout.train, layout.val))
    if ids is not None and len(ids) != count:
        raise UserError(f"ids: {len(ids)} for {count} classes; give one id a class")
    table = np.full(IDS, IGNORE if layout.others_ignored and settings.ids is None else REFUSED, np.int16)
    first = 1 if reduce else 0
    places = np.arange(first, first + count) if ids is None else np.array(ids)
    table[places] = np.arange(count)
    if reduce:
        table[0] = IGNORE
    if settings.ignore is not None:
        table[settings.ignore] = IGNORE
    classes = Classes(names or [str(i) for i in range(count)], table)
    parts = zip((layout.train, layout.val), found, ("train", "val"))
    train, val = (_pixels(pairs, rows, classes, what) for pairs, rows, what in parts)
    return classes, train, val


def check_masks(pairs: Pairs, classes: Classes) -> np.ndarray:
    """Pixels of each class, int64 [K], when the classes are known. Raises UserError as `open_classes`."""
    return _pixels(pairs, _histograms(pairs, "val"), classes, "val")


def _pixels(pairs: Pairs, rows: list[tuple[np.ndarray, np.ndarray]], classes: Classes, what: str) -> np.ndarray:
    total = np.zeros(len(classes), np.int64)
    for path, (values, pixels) in zip(pairs.masks, rows):
        numbers = classes.table[values]
        if (numbers == REFUSED).any():
            raw = read_ids(path)
            raise UserError(_bad_id(path, raw, classes.table[raw], classes))
        np.add.at(total, numbers[numbers >= 0], pixels[numbers >= 0])
    if not total.any():
        raise UserError(f"masks ({what}): every pixel has an id that is ignored; see ignore= and ids=")
    return total


def _histograms(pairs: Pairs, what: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, pixels) of each mask, its size compared with its image's."""

    def one(pair: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray]:
        image, mask = pair
        raw, size = read_ids(mask), image_size(image)
        if raw.shape != size:
            raise UserError(_sizes(image, size, mask, raw.shape))
        pixels = np.bincount(raw.reshape(-1))
        values = np.flatnonzero(pixels)
        return values, pixels[values]

    progress = Progress(len(pairs), f"{what} masks checked", enabled=len(pairs) > 2000)
    out = []
    with ThreadPoolExecutor(4) as pool:
        for row in pool.map(one, zip(pairs.images, pairs.masks)):
            out.append(row)
            progress.advance(1)
    progress.close()
    return out


def _names(layout: Layout, settings: SegmentSettings) -> tuple[list[str] | None, int | None]:
    given = settings.classes
    if given is None:
        return layout.names, layout.classes
    if isinstance(given, int):
        return (layout.names if layout.names and len(layout.names) == given else None), given
    words = [given] if isinstance(given, str) else list(given)
    if len(words) == 1:
        path = Path(words[0]).expanduser()
        try:
            words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise UserError(
                f"classes={words[0]}: {why}; give a number, names as a,b,c, or a text file with a name a line"
            ) from None
    if not words or len(set(words)) < len(words):
        raise UserError(f"classes={given}: {'no names' if not words else 'a name is given twice'}")
    return words, len(words)


def _count_of(found: Iterable[list[Any]], ignore: int | None, reduce: bool, parts: tuple[Pairs, Pairs]) -> int:
    """The largest id + 1; more than 255, or black and white alone, is asked about."""
    largest, where = -1, parts[0].masks[0]
    seen: set[int] = set()
    for rows, pairs in zip(found, parts):
        for path, (values, _) in zip(pairs.masks, rows):
            seen.update(int(v) for v in values)
            values = values[values != (-1 if ignore is None else ignore)]
            if len(values) and values.max() > largest:
                largest, where = int(values.max()), path
    if seen == {0, 255}:
        raise UserError(
            "masks: they hold 0 and 255 alone, and 255 is ignored; for black and white masks give ids=0,255 ignore=null"
        )
    if largest > 255:
        raise UserError(f"masks: {where}: id {largest}; give classes=N if there are so many, or ids=A,B,C")
    count = largest + (0 if reduce else 1)
    if count < 1:
        raise UserError("masks: no id but the ignored one; see ignore= and ids=")
    return count


def fingerprint(pairs: Pairs) -> str:
    """sha256 of the names and the bytes of every image's mask: of what is counted, wherever it lies."""
    digest = hashlib.sha256()
    for image, mask in zip(pairs.images, pairs.masks):
        digest.update(f"{image.name} {image.stat().st_size} {mask.name} ".encode())
        digest.update(hashlib.sha256(mask.read_bytes()).digest())
    return digest.hexdigest()
