"""The copies of one image: read, moved, recoloured, written. A function of (recipe, image number) alone, in any process."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from selfsup import durable
from selfsup.augment.colours import coloured
from selfsup.augment.folder import writing
from selfsup.augment.geometry import Placement, as_array, place, still
from selfsup.augment.labels import Boxes, Mask, find_masks, moved_boxes, moved_mask, read_mask
from selfsup.augment.settings import AugmentConfig
from selfsup.data import style
from selfsup.data.base import Source
from selfsup.data.decode import BadImage
from selfsup.data.views import RESAMPLE, STYLE, ViewParams, resized_array, uniforms
from selfsup.errors import UserError
from selfsup.wording import one_line

_NETWORK = 1  # number of the view whose draws say what goes through a network
_PROBES = 100
_FIRST = 20
_IDLE = ViewParams(0, 0, 0, 0, 0, 0, -1, 1, 1, 1, 0, 0, 0, -1)

Made = tuple[list[dict[str, Any]], list[list[Tensor]]]
"""Records of an image's copies; and where a network comes first, for each the pixels, its row and perhaps the style image."""


class Maker(Dataset[Any]):
    """Item i is all copies of image i, written already unless they go through a network (`AugmentConfig.on_device`)."""

    def __init__(
        self, config: AugmentConfig, source: Source, root: str, out: Path, styles: Source | None = None
    ) -> None:
        self.config, self.source, self.root, self.out, self.styles = config, source, root, out, styles
        self.boxes = Boxes(config.boxes) if config.boxes is not None else None
        classes, labels = source.classes or [], source.labels
        images = [self.relative(i) for i in range(len(source))] if config.masks is not None else []
        self.masks = find_masks(config.masks, images) if config.masks is not None else None
        self.folders = [_safe(name) for name in classes] if labels is not None else []

    def __getitem__(self, i: int) -> Made:
        try:
            image = as_array(self.source.read(i))
        except BadImage as error:
            return [{"index": i, "source": self.source.name(i), "bad": one_line(error)}], []
        relative = self.relative(i)
        mask = None if self.masks is None else read_mask(self.masks[i], relative, *image.shape[:2])
        records: list[dict[str, Any]] = []
        waiting: list[list[Tensor]] = []
        for copy in range(0 if self.config.originals else 1, self.config.copies + 1):
            record, pixels, placement = self.copy(image, i, copy)
            if self.boxes is not None:
                record["boxes"] = moved_boxes(self.boxes.of(relative), placement, self.config)
            if mask is not None:
                record["mask"] = self._write_mask(moved_mask(mask, placement, self.config.ignore), record["image"])
            if self.config.on_device:
                waiting.append([torch.from_numpy(p) for p in pixels])
            else:
                record["bytes"] = self.write(record["image"], self.finish(pixels[0], placement.row, copy))
            records.append(record)
        return records, waiting

    def try_first(self, network: Callable[[list[np.ndarray], list[np.ndarray]], object] | None) -> None:
        """Of the first image that can be read: its mask and the network with its size. Raises UserError; writes nothing."""
        why, tried = "", min(len(self.source), _FIRST)
        for i in range(tried):
            try:
                image = as_array(self.source.read(i))
            except BadImage as error:
                why = why or f"{one_line(self.source.name(i))}: {one_line(error)}"
                continue
            if self.masks is not None:
                mask = read_mask(self.masks[i], self.relative(i), *image.shape[:2])
                moved_mask(mask, still(*image.shape[:2]), self.config.ignore)
            if network is not None:
                network([image], [image])
            return
        if tried == len(self.source) or self.config.max_bad_fraction < 1:
            raise UserError(f"none of the first {tried} images can be read with channels={self.source.channels}; {why}")

    def copy(self, image: np.ndarray, i: int, copy: int) -> tuple[dict[str, Any], list[np.ndarray], Placement]:
        """Copy 0, 1, ... of image i: its record; pixels so far, its row, the other image if there is transfer; its placement."""
        height, width = image.shape[:2]
        placement = place(self.config, i, copy, height, width) if copy else still(height, width)
        record = self._record(i, copy, height, width)
        pixels, extra = image, []
        if copy:
            pixels = placement.pixels(image, self.config.interpolation)
            kind, pick, beta = placement.row[STYLE].tolist()
            if kind:
                other, record["style_of"] = self._other(pick, i, height, width)
                pixels = style.styled(pixels, other, int(kind), beta)
            pixels = placement.warped(pixels)
            whether, pick = uniforms(self.config.seed, np.array([copy]), np.array([i]), _NETWORK, 2)[0].tolist()
            if self.config.transfer and whether < self.config.transfer_probability:
                other, record["transfer_of"] = self._other(pick, i, height, width)
                extra = [other]
        record["drawn"] = drawn(placement.params)
        return record, [pixels, placement.row, *extra], placement

    def finish(self, pixels: np.ndarray, row: np.ndarray, copy: int) -> np.ndarray:
        """What comes after the networks."""
        return coloured(pixels, row) if copy else pixels

    def relative(self, i: int) -> str:
        """Path of image i below the data set's folder, or its name."""
        name = self.source.name(i)
        return os.path.relpath(name, self.root) if self.root else name.rpartition(":")[2]

    def _record(self, i: int, copy: int, height: int, width: int) -> dict[str, Any]:
        stem = _safe(os.path.splitext(os.path.basename(self.relative(i)))[0])
        label = self.source.label(i)
        below = f"{self.folders[label]}/" if 0 <= label < len(self.folders) else ""
        suffix = "npy" if self.source.channels not in (1, 3, 4) else {"png": "png", "jpeg": "jpg"}[self.config.format]
        name = f"images/{below}{stem}-{i:07d}_{copy}.{suffix}"
        shape = {"width": width, "height": height}
        return {"index": i, "copy": copy, "source": self.source.name(i), "image": name, "label": label, **shape}

    def _other(self, pick: float, i: int, height: int, width: int) -> tuple[np.ndarray, str]:
        """The image whose style is taken, in this size, and its name."""
        source = self.styles or self.source
        first = style.partner(pick, len(source), None if self.styles else i)
        for k in range(min(len(source), _PROBES)):
            number = (first + k) % len(source)
            try:
                image = as_array(source.read(number))
            except BadImage:
                continue
            whole = (0, 0, image.shape[1], image.shape[0])
            return resized_array(image, whole, (width, height), RESAMPLE["bilinear"]), source.name(number)
        raise UserError(f"styles: {_PROBES} images in a row cannot be read, from {one_line(source.name(first))} on")

    def write(self, name: str, pixels: np.ndarray) -> int:
        """The file, whole or not at all; its bytes."""
        made = io.BytesIO()
        if name.endswith(".npy"):
            np.save(made, pixels, allow_pickle=False)
        else:
            image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
            if name.endswith(".jpg"):
                image.save(made, "JPEG", quality=self.config.quality)
            else:
                image.save(made, "PNG", compress_level=3)
        self._put(name, made.getvalue())
        return made.tell()

    def _write_mask(self, mask: Mask, image: str) -> str:
        name = "masks/" + os.path.splitext(image.removeprefix("images/"))[0] + ".png"
        made = io.BytesIO()
        mask.write(made)
        self._put(name, made.getvalue())
        return name

    def _put(self, name: str, content: bytes) -> None:
        path = self.out / name
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f"{durable.TEMPORARY}{path.name}")
            durable.write(temporary, [content])
            durable.rename(temporary, path)


def drawn(params: ViewParams) -> dict[str, float]:
    """What differs from leaving an image alone, by name (`ViewParams`); always the crop."""
    out = {k: v for k, v in params._asdict().items() if v != getattr(_IDLE, k)}
    for key in ("x", "y", "w", "h"):
        out[key] = getattr(params, key)
    return out


def _safe(name: str) -> str:
    """A name for a file or a folder: no separators, not hidden."""
    return name.replace("/", "_").replace("\\", "_").replace("\0", "_").lstrip(".") or "_"
