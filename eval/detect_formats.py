"""The files that boxes come in, read as they are; `detect_data` checks what they say.

coco   one .json file of instances: images, annotations, categories, whose ids may have gaps; boxes x, y, width, height in pixels.
       A crowd (iscrowd) is no object to train on, its place being background there, and is not counted, as in COCO's own figures;
       `area` says which objects are small
voc    a folder of .xml files: Pascal VOC's annotations. Boxes are whole pixels, both corners inside, the first pixel being 1 (see
       `voc_origin`). A difficult object is treated as a crowd
yolo   a folder of .txt files, one an image: class number, centre x, centre y, width, height a line, in parts of the image. Names
       of the classes from classes= or classes.txt beside them; a missing or empty file is an image without objects
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from selfsup.data.decode import SUFFIXES
from selfsup.errors import UserError
from selfsup.wording import one_line


@dataclass
class RawBox:
    """A box as its file says."""

    corners: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels, or in parts of the image where `relative`."""
    kind: str
    """Name of the class."""
    ignored: bool = False
    area: float | None = None
    relative: bool = False


@dataclass
class RawImage:
    """An image, and what a file says of it."""

    path: Path
    source: str
    """The file, and where in it: what an error names."""
    boxes: list[RawBox] = field(default_factory=list)
    size: tuple[int, int] | None = None
    """(height, width), if the file says it."""


@dataclass
class Raw:
    """A part of a data set."""

    format: str
    images: list[RawImage]
    names: list[str] | None
    """Of the classes, if the format lists them."""


def read_boxes(images: Path, boxes: Path, classes: list[str] | None, origin: int, only: set[str] | None = None) -> Raw:
    """By what `boxes` is. only: stems of images, for lists of parts. Raises UserError naming the file."""
    if boxes.is_file():
        return _coco(images, boxes)
    if not boxes.is_dir():
        raise UserError(
            f"boxes={boxes}: no such file or folder; give a COCO .json file, or a folder of .xml or .txt files"
        )
    files = sorted(p for p in boxes.iterdir() if p.suffix.lower() in (".xml", ".txt") and p.name != "classes.txt")
    if not files:
        raise UserError(f"boxes={boxes}: holds no .xml (Pascal VOC) and no .txt file (YOLO)")
    kinds = {p.suffix.lower() for p in files}
    if len(kinds) > 1:
        raise UserError(f"boxes={boxes}: holds .xml and .txt files; keep one kind in it")
    if kinds == {".txt"}:
        return _yolo(images, boxes, files, classes)
    found = [p for p in files if only is None or p.stem in only]
    return Raw("voc", [_voc(images, p, origin) for p in found], None)


# ------------------------------------------------------------------------------------------------------------------ coco


def _coco(images: Path, path: Path) -> Raw:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"boxes={path}: not a COCO .json file: {one_line(error)}") from None
    parts = ("images", "annotations", "categories")
    if not isinstance(found, dict) or not all(isinstance(found.get(part), list) for part in parts):
        raise UserError(f"boxes={path}: not a COCO .json file of instances: it has no lists {', '.join(parts)}")
    names: dict[Any, str] = {}
    for row in found["categories"]:
        number, name = (_take(row, key, (int, str), path, "categories") for key in ("id", "name"))
        if number in names or str(name) in names.values():
            raise UserError(f"boxes={path}: categories: {number} ({name}) is there twice")
        names[number] = str(name)
    rows: dict[Any, RawImage] = {}
    for row in found["images"]:
        number, name = (_take(row, key, (int, str), path, "images") for key in ("id", "file_name"))
        if number in rows:
            raise UserError(f"boxes={path}: images: the id {number} is there twice")
        sides = row.get("height"), row.get("width")
        size = sides if all(isinstance(side, int) for side in sides) else None
        rows[number] = RawImage(images / str(name), f"{path}: image {number}", size=size)
    for row in found["annotations"]:
        where = f"annotations (id {row.get('id') if isinstance(row, dict) else None})"
        image, number = (_take(row, key, (int, str), path, where) for key in ("image_id", "category_id"))
        if image not in rows:
            raise UserError(f"boxes={path}: {where}: image_id {image} is none of the images")
        if number not in names:
            known = ", ".join(f"{k} ({v})" for k, v in list(names.items())[:8])
            raise UserError(f"boxes={path}: {where}: unknown category_id {number}; known: {known}")
        box = _take(row, "bbox", (list,), path, where)
        if len(box) != 4 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box):
            raise UserError(
                f"boxes={path}: {where}: bbox {one_line(box, 60)}; four numbers x, y, width, height are needed"
            )
        x, y, w, h = map(float, box)
        area = row.get("area")
        area = float(area) if isinstance(area, (int, float)) and math.isfinite(area) and area > 0 else None
        rows[image].boxes.append(RawBox((x, y, x + w, y + h), names[number], bool(row.get("iscrowd", 0)), area))
    order = sorted(names, key=lambda number: (isinstance(number, str), number))
    return Raw("coco", list(rows.values()), [names[number] for number in order])


def _take(row: Any, key: str, kinds: tuple[type, ...], path: Path, where: str) -> Any:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"boxes={path}: {where}: {key} is {one_line(value, 60)} in {one_line(row, 80)}")
    return value


# ------------------------------------------------------------------------------------------------------------------- voc


def _voc(images: Path, path: Path, origin: int) -> RawImage:
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"boxes: {path}: not an .xml file: {one_line(error)}") from None
    named = (root.findtext("filename") or "").strip()
    image = images / named
    if not named or not image.is_file():
        image = _image_of(images, path.stem, image if named else None)
    out = RawImage(image, str(path))
    sides = [_number(root, f"size/{side}", path, needed=False) for side in ("height", "width")]
    if all(side is not None and side > 0 for side in sides):
        out.size = (int(sides[0] or 0), int(sides[1] or 0))
    for item in root.iter("object"):
        x1, y1, x2, y2 = (_number(item, f"bndbox/{corner}", path) or 0.0 for corner in ("xmin", "ymin", "xmax", "ymax"))
        kind = (item.findtext("name") or "").strip()
        if not kind:
            raise UserError(f"boxes: {path}: an object without a name")
        difficult = (item.findtext("difficult") or "0").strip() == "1"
        # the last pixel is inside: its far edge is one more
        out.boxes.append(RawBox((x1 - origin, y1 - origin, x2 - origin + 1, y2 - origin + 1), kind, difficult))
    return out


def _number(item: ElementTree.Element, name: str, path: Path, needed: bool = True) -> float | None:
    text = item.findtext(name)
    try:
        return float(text or "")
    except ValueError:
        if not needed:
            return None
        raise UserError(f"boxes: {path}: {name} is {text!r}; a number is needed") from None


# ------------------------------------------------------------------------------------------------------------------ yolo


def _yolo(images: Path, boxes: Path, files: list[Path], classes: list[str] | None) -> Raw:
    listed = boxes / "classes.txt"
    names = classes
    if names is None and listed.is_file():
        names = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not names:
        raise UserError(
            f"boxes={boxes}: YOLO files name no classes; give classes=a,b,c, or a file {listed} with a name a line"
        )
    known = {p.stem: p for p in files}
    pictures = sorted(p for p in images.iterdir() if p.suffix.lower() in SUFFIXES) if images.is_dir() else []
    stems = {p.stem for p in pictures}
    for stem, path in known.items():
        if stem not in stems:
            raise UserError(f"boxes: {path}: no image {images / stem}.* for it")
    return Raw("yolo", [_yolo_image(p, known.get(p.stem), names) for p in pictures], names)


def _yolo_image(image: Path, path: Path | None, names: list[str]) -> RawImage:
    out = RawImage(image, str(path or image))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path is not None else []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        try:
            kind, (x, y, w, h) = int(words[0]), map(float, words[1:])
        except ValueError:
            raise UserError(
                f"boxes: {path}: line {number}: {one_line(line, 60)!r}; needed: class, centre x, centre y, width, height"
            ) from None
        if not 0 <= kind < len(names):
            raise UserError(
                f"boxes: {path}: line {number}: unknown class {kind}; there are {len(names)}: {', '.join(names[:8])}"
            )
        out.boxes.append(RawBox((x - w / 2, y - h / 2, x + w / 2, y + h / 2), names[kind], relative=True))
    return out


def _image_of(images: Path, stem: str, named: Path | None) -> Path:
    """The image with this stem; else the path that would be right, which `detect_data` finds missing."""
    for suffix in (*SUFFIXES, *(s.upper() for s in SUFFIXES)):
        path = images / f"{stem}{suffix}"
        if path.is_file():
            return path
    return named or images / f"{stem}.jpg"
