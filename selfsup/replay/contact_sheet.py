"""A picture of a batch: every crop as it was trained on, one column an image, one row a view."""

import os
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

THUMB = 112
"""Pixels of the largest crops in the picture, if they are larger in the batch."""

MOST = 64
"""Images drawn of a micro-batch."""

_SMALL = 64  # crops are enlarged by whole factors up to here
_COLUMNS = 12
_GAP, _MARGIN, _LINE = 4, 16, 16
_PAPER, _INK, _FAINT, _MARK = (255, 255, 255), (25, 25, 25), (120, 120, 120), (205, 40, 40)


def displayed(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalised [..., C, S, S] -> uint8 [..., 3, S, S]; one channel as grey, of others the first three (or one).

    What is not finite becomes black.
    """
    shape = (-1, 1, 1)
    x = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    x = x[..., :3, :, :] if x.shape[-3] >= 3 else x[..., :1, :, :].expand(*x.shape[:-3], 3, *x.shape[-2:])
    return (x.nan_to_num(0, 0, 0).clamp(0, 1) * 255).round().to(torch.uint8)


def draw(
    micro: Sequence[Sequence[Tensor]],
    columns: Sequence[Sequence[str]],
    rows: Sequence[Sequence[str]],
    title: str,
    marked: Collection[tuple[int, int]] = (),
) -> Image.Image:
    """The contact sheet of the micro-batches of one step.

    micro: for each micro-batch its kinds of views, uint8 [V, B, 3, S, S], which may stop after MOST images; columns: a
    short text over each image; rows: for each kind its views' names; marked: (micro-batch, image) that get a frame.
    """
    font = ImageFont.load_default()
    largest = max(kind.shape[-1] for kinds in micro for kind in kinds)
    scale = max(1, _SMALL // largest) if largest <= THUMB else THUMB / largest
    cell = max(_LINE + _GAP, round(largest * scale))
    bands = [
        (m, range(start, min(start + _COLUMNS, len(columns[m]), MOST)))
        for m in range(len(micro))
        for start in range(0, min(len(columns[m]), MOST), _COLUMNS)
    ]
    widest = max(len(images) for _, images in bands)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    label = int(max(measure(name, font) for names in rows for name in names)) + 2 * _GAP
    heights = [
        2 * _LINE + sum(len(kind) * (round(kind.shape[-1] * scale) + _GAP) for kind in micro[m]) + _GAP
        for m, _ in bands
    ]
    width = max(label + widest * (cell + _GAP), int(measure(title, font))) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, _MARGIN + 2 * _LINE + sum(heights) + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN), title, _INK, font)
    top = _MARGIN + 2 * _LINE
    for (m, images), height in zip(bands, heights):
        hidden = len(columns[m]) - MOST
        rest = f", {hidden} more not drawn" if hidden > 0 and images.stop == MOST else ""
        pen.text((_MARGIN, top), f"micro-batch {m}, images {images.start} to {images.stop - 1}{rest}", _FAINT, font)
        y = top + _LINE
        for column, b in enumerate(images):
            x = _MARGIN + label + column * (cell + _GAP)
            pen.text((x, y), columns[m][b], _MARK if (m, b) in marked else _INK, font)
        y += _LINE
        for k, kind in enumerate(micro[m]):
            size = max(1, round(kind.shape[-1] * scale))
            for v in range(len(kind)):
                pen.text((_MARGIN, y + size / 2 - 6), rows[k][v], _INK, font)
                for column, b in enumerate(images):
                    at = (_MARGIN + label + column * (cell + _GAP), y)
                    sheet.paste(_thumb(kind[v, b], size), at)
                    if (m, b) in marked:
                        pen.rectangle((at[0] - 2, y - 2, at[0] + size + 1, y + size + 1), outline=_MARK, width=2)
                y += size + _GAP
        top += height
    return sheet


def _thumb(crop: Tensor, size: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(crop.permute(1, 2, 0).numpy()))
    shrinks = size < picture.width
    return picture.resize((size, size), Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST)


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, whole or not at all; what stands at `path`, a link too, is replaced and not followed. Raises OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=".png")
    try:
        with os.fdopen(handle, "wb") as file:
            picture.save(file, format="PNG")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
