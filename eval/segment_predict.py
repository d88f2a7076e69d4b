"""Masks that a trained segmentation model predicts, as palette PNG images whose values are the ids of the training masks."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from selfsup import durable
from selfsup.data.decode import BadImage, decode
from selfsup.errors import UserError

from .dense import palette
from .progress import Progress
from .segment_data import Classes
from .segment_layouts import data_folder, images_of
from .segment_model import SegmentModel, describe
from .segment_settings import SegmentSettings

_LIST = "predictions.json"


class Writer:
    """Writes OUT/NAME.png for images of a folder, in the same subfolders; of ids above 255 as 16-bit grey, without a palette."""

    def __init__(self, out: str, classes: Classes, top: str) -> None:
        """top: the folder that names are relative to."""
        self.out, self.top = Path(out).expanduser(), Path(top).expanduser()
        self.ids = np.array(classes.ids, np.uint16)
        self.colours = palette(256).tobytes()
        if self.out.resolve().is_relative_to(self.top.resolve()):
            raise UserError(
                f"predictions={out}: in the folder of the images; masks would be taken for some; name another"
            )
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"predictions={out}: {error.strerror or error}; name a folder of yours") from None

    def path(self, image: Path) -> Path:
        """Of an image's mask."""
        return (self.out / image.relative_to(self.top)).with_suffix(".png")

    def write(self, image: Path, predicted: Tensor) -> Path:
        """predicted: class numbers [H, W]. Replaces the file in one step."""
        ids, path = self.ids[predicted.numpy()], self.path(image)
        picture = Image.fromarray(ids if self.ids.max() > 255 else ids.astype(np.uint8))
        if self.ids.max() <= 255:
            picture.putpalette(self.colours)
        temporary = path.with_name(f"{durable.TEMPORARY}{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(temporary, format="PNG")
            durable.rename(temporary, path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
        return path


def predict(model: SegmentModel, folder: Path, settings: SegmentSettings) -> dict[str, Any]:
    """Masks of all images in `data`, which need none of their own; and OUT/predictions.json: by what, how many, which failed.

    The same command again, interrupted or not, predicts those that are missing.
    """
    assert settings.data.path is not None and settings.predictions is not None
    top = data_folder(settings.data.path, "data")
    images = images_of(top)[: settings.max_val]
    writer = Writer(settings.predictions, model.table, settings.data.path)
    predictor = model.predictor(
        settings.inference, settings.test_scales, settings.test_flip, settings.precision, settings.size
    )
    values = settings.data.value_range or model.value_range
    how: dict[str, Any] = settings.model_dump(
        mode="json", include={"inference", "test_scales", "test_flip", "precision", "size"}
    )
    how["value_range"] = values
    made = json.dumps([describe(folder).model_dump(mode="json"), how], sort_keys=True)
    key = hashlib.sha256(made.encode()).hexdigest()
    if _key_of(writer.out / _LIST) != key:
        for image in images:  # by another model; they would be taken for this one's after an interruption
            writer.path(image).unlink(missing_ok=True)
    record: dict[str, Any] = {"key": key, "model": str(folder), "images": len(images), **how, "unreadable": {}}
    _note(writer.out, record)
    progress = Progress(len(images), "images")
    channels = model.segmenter.trunk.backbone.in_chans
    for image in images:
        if not (writer.path(image).is_file() and _newer(writer.path(image), image)):
            try:
                pixels = np.asarray(decode(image, channels, settings.data.max_pixels, values))
            except (BadImage, OSError) as error:
                record["unreadable"][str(image)] = str(error)
                print(f"{image}: left out: {error}", file=sys.stderr)
            else:
                writer.write(image, model_ids(predictor, pixels))
        progress.advance(1)
    progress.close()
    _note(writer.out, record)
    if len(record["unreadable"]) == len(images):
        raise UserError(f"data={settings.data.path}: none of {len(images)} images can be read")
    print(f"{len(images) - len(record['unreadable'])} masks in {writer.out}, ids as in training; see {_LIST}")
    return record


def model_ids(predictor: Any, pixels: np.ndarray) -> Tensor:
    """Class numbers [H, W] of pixels [H, W] or [H, W, C]."""
    predicted: Tensor = predictor(pixels[:, :, None] if pixels.ndim == 2 else pixels)
    return predicted


def _newer(mask: Path, image: Path) -> bool:
    return mask.stat().st_mtime >= image.stat().st_mtime


def _note(out: Path, record: dict[str, Any]) -> None:
    try:
        durable.write_atomically(out / _LIST, json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{out / _LIST}: cannot be written: {error.strerror or error}") from None


def _key_of(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text())["key"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
