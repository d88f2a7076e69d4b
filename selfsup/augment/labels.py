"""Masks of ids and boxes in COCO's format, found for each image of a data set and written for its copies."""

import json
import os
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from selfsup.augment.geometry import Placement
from selfsup.augment.settings import AugmentConfig
from selfsup.data.mask_files import matched, read_ids
from selfsup.errors import UserError
from selfsup.wording import one_line


class Mask(NamedTuple):
    """Ids [H,W] as they are stored, and the palette, if there is one."""

    ids: np.ndarray
    palette: list[int] | None

    def write(self, file: IO[bytes]) -> None:
        """As a PNG."""
        image = Image.fromarray(self.ids)
        if self.palette is None:
            image.save(file, "PNG")
        else:
            image.putpalette((self.palette + [0] * 768)[:768])
            image.save(file, "PNG", bits=8)  # of few colours PIL would keep as few bits, and `ignore` not


def find_masks(folder: str, images: list[str]) -> list[Path]:
    """The mask of each image, whose names are relative to the folder of images. Raises UserError naming one without."""
    try:
        return matched([Path(image) for image in images], Path(folder))
    except UserError as error:
        raise UserError(f"masks={folder}: {error}") from None


def read_mask(path: Path, relative: str, height: int, width: int) -> Mask:
    """The mask of an image of this size. Raises UserError if it does not fit."""
    ids, palette = read_ids(path), None
    if path.suffix.lower() != ".npy":
        with Image.open(path) as image:
            palette = image.getpalette() if image.mode == "P" else None
    if ids.shape != (height, width):
        seen = f"{ids.shape[1]}x{ids.shape[0]}"
        raise UserError(f"masks: {path} has {seen} pixels, its image {one_line(relative)} {width}x{height}")
    return Mask(ids, palette)


def moved_mask(mask: Mask, placement: Placement, ignore: int) -> Mask:
    """Raises UserError if the mask's type does not hold `ignore`."""
    if ignore > np.iinfo(mask.ids.dtype).max:
        raise UserError(f"ignore={ignore}: masks of 8 bit hold ids up to 255")
    return Mask(placement.mask(mask.ids, ignore), mask.palette)


class Boxes:
    """The boxes of a COCO file, by the name of their image."""

    def __init__(self, path: str) -> None:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            self.categories: list[Any] = content["categories"]
            names = {image["id"]: str(image["file_name"]) for image in content["images"]}
            self._by_name: dict[str, list[dict[str, Any]]] = {name: [] for name in names.values()}
            for entry in content["annotations"]:
                box = [float(v) for v in entry["bbox"]]
                if len(box) != 4 or not np.isfinite(box).all():
                    raise ValueError(f"bbox {box} of annotation {entry.get('id')}; four numbers are needed")
                found = {"bbox": box, "category_id": entry["category_id"], "iscrowd": entry.get("iscrowd", 0)}
                if entry["image_id"] not in names:
                    raise ValueError(
                        f"annotation {entry.get('id')} is of image_id={entry['image_id']}, which images has not"
                    )
                self._by_name[names[entry["image_id"]]].append(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"no {one_line(error)}" if isinstance(error, KeyError) else one_line(error)
            raise UserError(f"boxes={path}: not in COCO's format (images, annotations, categories): {why}") from None

    def of(self, relative: str) -> list[dict[str, Any]]:
        """Of an image by its path in the data set, or by its name alone; none if the file does not know it."""
        found = self._by_name.get(relative)
        return found if found is not None else self._by_name.get(os.path.basename(relative), [])

    def knows(self, relative: str) -> bool:
        """Whether the file has the image, with or without boxes."""
        return relative in self._by_name or os.path.basename(relative) in self._by_name


def moved_boxes(entries: list[dict[str, Any]], placement: Placement, config: AugmentConfig) -> list[dict[str, Any]]:
    """Those that are still to be seen, to hundredths of a pixel; outlines (`segmentation`) are left out."""
    if not entries:
        return []
    seen = placement.boxes(np.array([entry["bbox"] for entry in entries]))
    out = []
    for entry, (box, visible) in zip(entries, seen, strict=True):
        if visible >= config.visibility and min(box[2:]) > 0:
            kept = [round(v, 2) for v in box]
            out.append({**entry, "bbox": kept, "area": round(kept[2] * kept[3], 2)})
    return out


def coco(records: list[dict[str, Any]], categories: list[Any]) -> dict[str, Any]:
    """The manifest's records as one COCO file; numbers begin at 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, record in enumerate((r for r in records if "image" in r), 1):
        name = record["image"].removeprefix("images/")
        images.append({"id": number, "file_name": name, "width": record["width"], "height": record["height"]})
        for box in record.get("boxes", []):
            annotations.append({"id": len(annotations) + 1, "image_id": number, **box})
    return {"images": images, "annotations": annotations, "categories": categories}
