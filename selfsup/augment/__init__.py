"""`selfsup augment`: writes an enlarged data set, or draws what its operations do."""

import io
import os
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from selfsup.augment.settings import AugmentConfig, recipe_texts, resolve
from selfsup.augment.write import write
from selfsup.config import DataConfig
from selfsup.data.base import Source
from selfsup.data.decode import BadImage
from selfsup.data.sources import open_source
from selfsup.data.statistics import stored_array
from selfsup.data.wide_files import is_dicom, read_dicom
from selfsup.errors import UserError
from selfsup.wording import one_line

__all__ = ["AugmentConfig", "opened", "recipe_texts", "resolve", "run"]


def run(data: str, out: Path, words: list[str], resume: bool = False) -> dict[str, int]:
    """Write the images of `data` and their copies into `out`. Raises UserError before anything is written, where it can."""
    from selfsup.augment.make import Maker

    config = resolve(words)
    config, source, styles, root = opened(config, data)
    inside = Path(os.path.expanduser(data)).resolve()
    if inside.is_dir() and inside in (out.resolve(), *out.resolve().parents):
        raise UserError(f"{out} lies in {data}, whose images it would become; choose a folder beside it")
    maker = Maker(config, source, root, out, styles)
    if maker.boxes is not None and not any(maker.boxes.knows(maker.relative(i)) for i in range(min(len(source), 1000))):
        raise UserError(
            f"boxes={config.boxes}: it has none of the first images of {data}, such as {maker.relative(0)}; file_name is "
            "a path below the folder, or a name"
        )
    if maker.boxes is not None and config.fill not in ("constant", "edge") and _moves(config):
        print(f"fill={config.fill} shows parts of objects again beyond the border, without boxes", file=sys.stderr)
    return write(maker, resume)


def opened(config: AugmentConfig, data: str) -> tuple[AugmentConfig, Source, Source | None, str]:
    """The configuration with its channels, the images, those of styles, and the folder that names are relative to ('': none)."""
    reading = DataConfig(value_range=config.value_range)
    look = open_source(data, channels=config.channels or 3, config=reading)
    channels = config.channels or _channels(look)
    if channels != 3 and config.lighting:
        raise UserError(f"lighting={config.lighting:g} is for images of 3 channels; these have {channels}")
    if config.value_range is None:
        _refuse_deep(look, data)
    config = config.model_copy(update={"channels": channels})
    look.channels = channels
    if config.styles is not None and config.style == "none" and config.transfer is None:
        raise UserError(f"styles={config.styles}: give style=fourier, style=statistics or transfer=BACKBONE as well")
    styles = _styles(config.styles, channels, reading) if config.styles is not None else None
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        return config, look, styles, path
    return config, look, styles, os.path.dirname(os.path.abspath(path)) if path.lower().endswith(".txt") else ""


def _styles(spec: str, channels: int, reading: DataConfig) -> Source:
    """The images of `styles`; what is wrong with them names that key."""
    try:
        return open_source(spec, channels=channels, config=reading)
    except UserError as error:
        raise UserError(re.sub(r"^data\b", "styles", str(error))) from None


def _refuse_deep(source: Source, data: str) -> None:
    """Of the first image that can be read: more than 8 bit have no usual range, and most would be black."""
    for i in range(min(len(source), 20)):
        try:
            raw = source.raw(i)
            if isinstance(raw, bytes) and is_dicom(raw) and read_dicom(raw, source.config.max_pixels)[1] is not None:
                return  # it names its own window
            dtype = stored_array(raw, source).dtype
        except (BadImage, OSError, ValueError, SyntaxError):
            continue
        if dtype.kind in "iuf" and dtype != np.uint8:
            raise UserError(
                f"data={one_line(data)}: {one_line(source.name(i))} holds {dtype}, and 8 bit are written; "
                f"give value_range=[low,high] of its values: selfsup stats {one_line(data)} shows them"
            )
        return


def _moves(config: AugmentConfig) -> bool:
    return bool({"rotate", "translate", "zoom", "shear"} & set(config.operations))


def _channels(source: Source) -> int:
    """Of the first image that can be read: 1 of grey ones, 4 with transparency, otherwise 3; of arrays as they are."""
    for i in range(min(len(source), 20)):
        try:
            stored = source.raw(i)
            if isinstance(stored, bytes) and stored.startswith(b"\x93NUMPY"):
                shape = np.load(io.BytesIO(stored), allow_pickle=False).shape
                return 1 if len(shape) == 2 else int(min(shape[0], shape[2]))
            image = Image.open(io.BytesIO(stored)) if isinstance(stored, bytes) else stored
            mode = image.mode if isinstance(image, Image.Image) else "RGB"
            return 1 if mode in ("1", "L", "I", "F") or mode.startswith("I;16") else 4 if mode == "RGBA" else 3
        except (BadImage, OSError, ValueError, SyntaxError):
            continue
    return 3
