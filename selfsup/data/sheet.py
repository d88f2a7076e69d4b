"""A sheet of augmented views: what a step sees of its first images. Pillow alone, so that a trainer can afford it."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from selfsup.data import photometric
from selfsup.data.batch import Batch
from selfsup.data.modules import modules_of
from selfsup.data.views import View

_SIDE = 112
"""Pixels of the largest view on the sheet, about."""

_GAP, _HEAD = 4, 16

_FRAMES = 4
"""Of a clip, on the sheet."""


def write_sheet(path: Path, drawn: Image.Image) -> Path:
    """As a PNG file, whole or not at all; equal sheets are equal files."""
    made = io.BytesIO()
    drawn.save(made, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(made.getvalue())
    temporary.replace(path)
    return path


def sheet(
    batch: Batch,
    groups: Sequence[Sequence[View]],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    most: int = 8,
    originals: Sequence[Image.Image] = (),
    part: str = "frame",
) -> Image.Image:
    """A row for each of the first images of a batch, a column for each view, after every operation of the augmentation.

    groups: the views, one list for each tensor of the batch (`views.resolutions`). Views keep their sizes to one another.
    originals: in a first column. What mixes images, and masks of tokens, come later and are not shown.
    part: what a clip or a volume is made of (`BatchMaker.part`).
    """
    count = min(most, len(batch.ids))
    largest = max(view.size for group in groups for view in group)
    scale = max(1, round(_SIDE / largest)) if largest <= _SIDE else _SIDE / largest
    cell = round(largest * scale)
    shown: list[tuple[str, Tensor]] = []
    modules = modules_of(groups, len(mean), "cpu")
    for group, crops, params, module in zip(groups, batch.crops, batch.params, modules):
        shown += _columns(group, crops[:, :count], params[:, :count], mean, std, module, part)
    columns = len(shown) + bool(originals)
    out = Image.new("RGB", (columns * (cell + _GAP) + _GAP, count * (cell + _GAP) + _GAP + _HEAD), "white")
    pen, font = ImageDraw.Draw(out), ImageFont.load_default()
    column = 0
    if originals:
        _write(pen, font, column, cell, "image")
        for row, image in enumerate(originals[:count]):
            _paste(out, image.convert("RGB"), row, column, cell, min(cell / image.width, cell / image.height))
        column += 1
    for title, rows in shown:
        _write(pen, font, column, cell, title)
        for row, pixels in enumerate(_levels(rows, mean, std)):
            _paste(out, Image.fromarray(pixels), row, column, cell, scale)
        column += 1
    return out


def _columns(
    group: Sequence[View],
    crops: Tensor,
    params: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    module: nn.Module | None,
    part: str,
) -> list[tuple[str, Tensor]]:
    """A title and images [n, C, S, S] for each view of a resolution; of clips for some of their frames, in order."""
    frames = crops.shape[2] // len(mean)
    views = photometric.apply(crops, params, mean, std, "cpu", module=module, frames=frames)  # [V, n, T*C, S, S]
    if frames == 1:
        return [(f"{view.name}, {view.size} px", rows) for view, rows in zip(group, views)]
    few = np.unique(np.linspace(0, frames - 1, min(frames, _FRAMES)).round().astype(int)).tolist()
    channels = len(mean)
    return [
        (f"{view.name}, {part} {f}", rows[:, f * channels : (f + 1) * channels])
        for view, rows in zip(group, views)
        for f in few
    ]


def _levels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """[n, C, S, S], normalised -> uint8 [n, S, S, 3]: fewer than three channels as grey, of more the first three."""
    m, s = (np.asarray(v, np.float32)[:, None, None] for v in (mean, std))
    x = images.numpy() * s + m
    x = x[:, :3] if x.shape[1] >= 3 else np.repeat(x[:, :1], 3, axis=1)
    return np.ascontiguousarray((x.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


def _paste(out: Image.Image, image: Image.Image, row: int, column: int, cell: int, scale: float) -> None:
    """In the middle of its cell; enlarged in whole pixels, made smaller smoothly."""
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image = image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
    left, top = column * (cell + _GAP) + _GAP, row * (cell + _GAP) + _GAP + _HEAD
    out.paste(image, (left + (cell - size[0]) // 2, top + (cell - size[1]) // 2))


def _write(
    pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, column: int, cell: int, text: str
) -> None:
    """Above a column, as much as fits."""
    while text and pen.textlength(text, font) > cell:
        text = text[:-1]
    pen.text((column * (cell + _GAP) + _GAP, 3), text, fill="#444444", font=font)
