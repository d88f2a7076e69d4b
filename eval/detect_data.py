"""Images with boxes: every one is checked before anything is trained, and what goes wrong names its file."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from selfsup.data.sampler import Order
from selfsup.errors import UserError
from selfsup.randomness import generator

from .detect_formats import Raw, RawBox, RawImage
from .detect_settings import DetectSettings
from .progress import Progress
from .segment_crops import resized
from .segment_data import Reader, image_size

_AUGMENT = 0xB0C5E5
_SLACK = 1.0
"""Pixels that a box may stand out of its image: files hold rounded numbers. It is cut at the edge."""
_LEAST = 0.01
"""Pixels: a box with a shorter side has no area."""


@dataclass
class Picture:
    """An image and its boxes."""

    path: Path
    size: tuple[int, int]
    """(height, width)."""
    boxes: np.ndarray
    """float32 [N, 4]: x1, y1, x2, y2 in pixels, inside the image."""
    labels: np.ndarray
    """int64 [N]: class numbers from 0."""
    ignored: np.ndarray
    """bool [N]: crowds and difficult objects: background in training, and not counted."""
    areas: np.ndarray
    """float32 [N]: of the objects, as the file says, else of the boxes."""


def check(raw: Raw, names: Sequence[str], settings: DetectSettings, what: str) -> tuple[list[Picture], int]:
    """(pictures, how many boxes were left out). Headers of the images are read on several threads; no pixel is.

    Raises UserError for the first image that is not there or has another size than its file says, the first unknown class and,
    unless bad_boxes=skip, the first box that has no area or is not inside its image.
    """
    numbers = {name: i for i, name in enumerate(names)}
    progress = Progress(len(raw.images), f"{what} images and boxes checked", enabled=len(raw.images) > 2000)
    out, skipped = [], 0
    with ThreadPoolExecutor(4) as pool:
        for row, size in zip(raw.images, pool.map(_size, raw.images)):
            kept: list[RawBox] = []
            for box in row.boxes:
                if box.kind not in numbers:
                    known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                    raise UserError(f"boxes: {row.source}: unknown class {box.kind!r}; known: {known}")
                box = _in_pixels(box, size)
                fault = _fault(box, size)
                if fault is None:
                    kept.append(box)
                elif settings.bad_boxes == "stop":
                    raise UserError(
                        f"boxes: {row.source}: box {_shown(box.corners)} of {row.path.name} {fault}; "
                        "mend the file, or leave such boxes out with bad_boxes=skip"
                    )
                else:
                    skipped += 1
            out.append(_picture(row, size, kept, numbers))
            progress.advance(1)
    progress.close()
    return out, skipped


def class_names(train: Raw, val: Raw) -> list[str]:
    """As the format lists them, else every name of train and val, in order of the alphabet."""
    names = train.names or sorted({box.kind for raw in (train, val) for row in raw.images for box in row.boxes})
    if not names:
        raise UserError("boxes: there is none in any file; a detector needs some")
    return list(names)


def _size(row: RawImage) -> tuple[int, int]:
    if not row.path.is_file():
        raise UserError(f"boxes: {row.source}: its image {row.path} is not there")
    size = image_size(row.path)
    if row.size is not None and row.size != size:
        (h, w), (high, wide) = row.size, size
        raise UserError(f"boxes: {row.source} is for an image of {w}x{h} pixels, but {row.path} has {wide}x{high}")
    return size


def _in_pixels(box: RawBox, size: tuple[int, int]) -> RawBox:
    if not box.relative:
        return box
    x1, y1, x2, y2 = box.corners
    return RawBox((x1 * size[1], y1 * size[0], x2 * size[1], y2 * size[0]), box.kind, box.ignored, box.area)


def _fault(box: RawBox, size: tuple[int, int]) -> str | None:
    x1, y1, x2, y2 = box.corners
    if not np.isfinite(box.corners).all():
        return "is not finite"
    if min(x2 - x1, y2 - y1) < _LEAST:
        return f"has no area ({x2 - x1:g} x {y2 - y1:g})"
    if min(x1, y1) < -_SLACK or x2 > size[1] + _SLACK or y2 > size[0] + _SLACK:
        return f"is not inside its {size[1]}x{size[0]} pixels"
    if min(min(x2, size[1]) - max(x1, 0), min(y2, size[0]) - max(y1, 0)) < _LEAST:
        return "has no area inside the image"
    return None


def _shown(corners: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in corners) + ")"


def _picture(row: RawImage, size: tuple[int, int], kept: list[RawBox], numbers: dict[str, int]) -> Picture:
    boxes = np.array([box.corners for box in kept], np.float32).reshape(-1, 4)
    boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))
    own = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    areas = np.array([np.nan if box.area is None else box.area for box in kept], np.float32)
    labels = np.array([numbers[box.kind] for box in kept], np.int64)
    return Picture(
        row.path, size, boxes, labels, np.array([b.ignored for b in kept], bool), np.where(np.isnan(areas), own, areas)
    )


def fingerprint(pictures: Sequence[Picture]) -> str:
    """sha256 of the names and sizes of the images, and of their boxes."""
    digest = hashlib.sha256()
    for p in pictures:
        digest.update(f"{p.path.name} {p.size} ".encode())
        for array in (p.boxes, p.labels, p.ignored):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- batches


def fit(size: tuple[int, int], short: float, long: float) -> tuple[int, int]:
    """The size (height, width) at which the shorter side is `short` and the longer at most `long`."""
    factor = min(short / min(size), long / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


class Batches(Dataset[list[tuple[Tensor, Tensor, Tensor]]]):
    """Item k is the batch of step k, a list of (uint8 [h, w, C], float32 boxes [N, 4], int64 labels [N]).

    Sizes differ: every image keeps its shape. Scale and flip are drawn from (seed, step, sample). Ignored boxes are left out.
    limit: no side is larger, whatever the scale.
    """

    def __init__(
        self,
        pictures: list[Picture],
        reader: Reader,
        settings: DetectSettings,
        short: int,
        long: int,
        limit: int,
    ) -> None:
        self.pictures, self.reader, self.settings = pictures, reader, settings
        self.short, self.long, self.limit = short, long, limit
        self.order = Order(len(pictures), settings.seed)

    def __getitem__(self, step: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        batch = self.settings.batch
        numbers = self.order.at(step * batch + np.arange(batch))[1]
        return [self.one(step, int(i), position) for position, i in enumerate(numbers)]

    def one(self, step: int, index: int, position: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Image `index` as step `step` sees it; position: tells the same image apart, twice in a step of a tiny set."""
        picture, ratio, flip = self.pictures[index], 1.0, False
        if self.settings.augment:
            u = generator(_AUGMENT, self.settings.seed, step, index, position).random(2)
            low, high = np.log(self.settings.scale)
            ratio, flip = float(np.exp(low + (high - low) * u[0])), bool(u[1] < self.settings.flip)
        pixels = self.reader.image(picture.path)
        long = min(ratio * self.long, self.limit)
        image, boxes = transformed(
            pixels, picture.boxes[~picture.ignored], fit(pixels.shape[:2], ratio * self.short, long), flip
        )
        return torch.from_numpy(image), torch.from_numpy(boxes), torch.from_numpy(picture.labels[~picture.ignored])


def transformed(
    pixels: np.ndarray, boxes: np.ndarray, size: tuple[int, int], flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H, W, C] and float32 [N, 4] -> the same at `size`, and mirrored if `flip`."""
    (h, w), (high, wide) = pixels.shape[:2], size
    image = resized(pixels, size)
    moved = boxes * np.array([wide / w, high / h] * 2, np.float32)
    if flip:
        image, moved = image[:, ::-1], moved[:, [2, 1, 0, 3]]
        moved = moved * np.array([-1, 1, -1, 1], np.float32) + np.array([wide, 0, wide, 0], np.float32)
    return image.copy(), moved
