"""The sheet of a recipe: a row for each operation that is on, with images before and after it; at last all together."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from selfsup.augment import opened
from selfsup.augment.geometry import as_array
from selfsup.augment.make import Maker
from selfsup.augment.settings import AugmentConfig
from selfsup.augment.write import Network
from selfsup.data.base import Source
from selfsup.data.decode import BadImage
from selfsup.data.sheet import write_sheet
from selfsup.data.views import COLUMN, RESAMPLE, resized_array
from selfsup.errors import UserError

_CELL, _GAP, _HEAD, _LEFT = 144, 4, 20, 110
"""Pixels; larger images are made smaller first, as views are, so that noise and blur are seen."""


def show(config: AugmentConfig, data: str, out: Path, images: int = 4) -> list[str]:
    """Write the picture to `out`; the names of its rows."""
    operations = config.operations
    if not operations:
        raise UserError("the recipe has no operation that is on; give one, as in hflip=0.5 or rotate=20")
    config, source, styles, _ = opened(config, data)
    chosen = _chosen(source, images)
    names = [*operations, *(["all"] if len(operations) > 1 else [])]
    sheet = Image.new(
        "RGB", (_LEFT + len(chosen) * (2 * _CELL + 3 * _GAP), _HEAD + len(names) * (_CELL + _GAP)), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for column in range(len(chosen)):
        left = _LEFT + column * (2 * _CELL + 3 * _GAP)
        pen.text((left, 4), "before", fill="#444444", font=font)
        pen.text((left + _CELL + _GAP, 4), "after", fill="#444444", font=font)
    for row, name in enumerate(names):
        top = _HEAD + row * (_CELL + _GAP)
        own = config if name == "all" else config.alone(name)
        maker = Maker(own.model_copy(update={"boxes": None, "masks": None}), source, "", Path(), styles)
        network = Network(own, source.channels) if own.on_device else None
        pen.text((4, top + 4), f"{name}\n{_keys(own, name)}", fill="#222222", font=font)
        for column, (number, image) in enumerate(chosen):
            left = _LEFT + column * (2 * _CELL + 3 * _GAP)
            after = made(maker, network, image, number)
            sheet.paste(_thumbnail(image), (left, top))
            sheet.paste(_thumbnail(after), (left + _CELL + _GAP, top))
    try:
        write_sheet(out, sheet)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; name another file with --picture") from None
    return names


def made(maker: Maker, network: Network | None, image: np.ndarray, number: int) -> np.ndarray:
    """Copy 1 of image `number`, uint8 [H,W,C], as it would be written."""
    _, pixels, placement = maker.copy(image, number, 1)
    done = network([pixels[0]], [pixels[-1]])[0] if network is not None and _goes(maker.config, pixels) else pixels[0]
    return maker.finish(done, placement.row, 1)


def _goes(config: AugmentConfig, pixels: list[np.ndarray]) -> bool:
    """Whether the draws say that it goes through the network."""
    return len(pixels) == 3 if config.transfer is not None else bool(pixels[1][COLUMN["module"]])


def _chosen(source: Source, images: int) -> list[tuple[int, np.ndarray]]:
    """Of the first images of different labels, or spread over all."""
    labels = source.labels
    numbers = np.linspace(0, len(source) - 1, min(4 * images, len(source))).astype(int).tolist()
    if labels is not None:
        numbers = np.unique(labels, return_index=True)[1].tolist() + numbers
    out: dict[int, np.ndarray] = {}
    for number in numbers:
        try:
            out.setdefault(number, _smaller(as_array(source.read(number))))
        except BadImage:
            continue
        if len(out) == images:
            break
    if not out:
        raise UserError("none of the images that were looked at can be read")
    return list(out.items())


def _smaller(image: np.ndarray) -> np.ndarray:
    """uint8 [H,W,C] of at most _CELL pixels a side."""
    height, width = image.shape[:2]
    scale = min(1.0, _CELL / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return resized_array(image, (0, 0, width, height), size, RESAMPLE["bicubic"]) if scale < 1 else image


def _keys(config: AugmentConfig, name: str) -> str:
    if name == "all":
        return ""
    value = getattr(config, "scale" if name == "crop" else name)
    if isinstance(value, tuple):
        value = f"{value[0]:g} to {value[1]:g}"
    return str(value)[:22] if value not in (1.0,) else ""


def _thumbnail(image: np.ndarray) -> Image.Image:
    """uint8 [H,W,C] in a cell; of more than three channels the first three."""
    shown = image[:, :, :3] if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    picture = Image.fromarray(np.ascontiguousarray(shown))
    scale = _CELL / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    cell = Image.new("RGB", (_CELL, _CELL), "white")
    smooth = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    cell.paste(picture.resize(size, smooth), ((_CELL - size[0]) // 2, (_CELL - size[1]) // 2))
    return cell
