"""Images for evaluation: the shorter side to a size, the centre, normalised; in order, nothing random."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from selfsup.data.arrays import top
from selfsup.data.base import Source
from selfsup.data.batch import pixel_size
from selfsup.data.decode import BadImage, Pixels
from selfsup.data.views import RESAMPLE, resized_array
from selfsup.data.workers import items
from selfsup.errors import UserError
from selfsup.wording import one_line


def eval_crop(
    image: Pixels, size: int, resize: int | None, interpolation: str = "bicubic", crop: bool = True
) -> np.ndarray:
    """One image as uint8 [size,size,C], or uint16 where the image is.

    crop: the shorter side to `resize`, then the central square, as torchvision's Resize and CenterCrop of PIL images,
    bit for bit (DINO: 256 bicubic, then 224). resize=None: the shorter side to `size`, so that an image that has the
    size already stays as it is. crop=False: the whole image squeezed to the square.
    """
    height, width = pixel_size(image)
    resample = RESAMPLE[interpolation]
    if not crop:
        return resized(image, (size, size), resample)
    short = resize if resize is not None else size
    if short < size:
        raise UserError(f"resize={short} is smaller than size={size}; the shorter side must hold the central square")
    if width <= height:
        new_width, new_height = short, int(short * height / width)
    else:
        new_width, new_height = int(short * width / height), short
    pixels = resized(image, (new_width, new_height), resample)
    above, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return pixels[above : above + size, left : left + size]


def resized(image: Pixels, size: tuple[int, int], resample: Image.Resampling) -> np.ndarray:
    """[height,width,C] of an image squeezed to size (width, height)."""
    height, width = pixel_size(image)
    if isinstance(image, np.ndarray):
        return resized_array(image, (0, 0, width, height), size, resample)
    pixels = np.asarray(image.resize(size, resample))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def eval_batches(
    source: Source,
    *,
    size: int,
    resize: int | None = None,
    interpolation: str = "bicubic",
    mean: Sequence[float],
    std: Sequence[float],
    batch_size: int,
    workers: int = 0,
    indices: Sequence[int] | np.ndarray | None = None,
    crop: bool = True,
    on_bad: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Images float32 [B,C,size,size], labels int64 [B] (-1: none) and indices int64 [B], in the order of `indices`.

    The last batch may be smaller. An image that cannot be read is passed to `on_bad` as (name, reason) and left out;
    without `on_bad` it raises UserError. Transform: see `eval_crop`.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    chunks = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    images = _Chunks(source, chunks, size, resize, interpolation, crop)
    if len(mean) == source.frame_channels:  # of a clip: for each of its frames
        frames = source.channels // source.frame_channels
        mean, std = tuple(mean) * frames, tuple(std) * frames
    scale = torch.tensor([1 / (top(source.config.depth) * s) for s in std]).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)
    if len(scale) != source.channels:
        raise UserError(f"data.mean and data.std need {source.channels} values; seen {len(scale)}")
    with closing(items(images, 0, len(images), workers=workers)) as made:
        for pixels, labels, ids, bad in made:
            for name, reason in bad:
                if on_bad is None:
                    raise UserError(f"data: {one_line(name)} cannot be read: {reason}")
                on_bad(name, reason)
            if len(ids):
                yield (
                    torch.addcmul(shift, pixels.permute(0, 3, 1, 2).to(torch.float32), scale).contiguous(),
                    labels,
                    ids,
                )


class _Chunks(Dataset[Any]):
    """Item k is chunk k: uint8 or uint16 [B,S,S,C], labels [B], indices [B], bad."""

    def __init__(
        self, source: Source, chunks: list[np.ndarray], size: int, resize: int | None, interpolation: str, crop: bool
    ) -> None:
        self.source, self.chunks = source, chunks
        self.transform = (size, resize, interpolation, crop)

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[str, str]]]:
        size = self.transform[0]
        pixels = np.empty((len(self.chunks[k]), size, size, self.source.channels), self.source.dtype)
        good: list[int] = []
        bad: list[tuple[str, str]] = []
        for i in self.chunks[k].tolist():
            try:
                pixels[len(good)] = eval_crop(self.source.read(i), *self.transform)
                good.append(i)
            except BadImage as error:
                bad.append((self.source.name(i), str(error)))
        ids = np.array(good, dtype=np.int64)
        known = self.source.labels
        labels = np.full(len(ids), -1, np.int64) if known is None else known[ids]
        return torch.from_numpy(pixels[: len(ids)]), torch.from_numpy(labels), torch.from_numpy(ids), bad
