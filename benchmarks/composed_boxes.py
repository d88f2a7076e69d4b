"""A small real detection set: several garments cut out of the bundled images, composed on scikit-image's photographs.

    python -m benchmarks.composed_boxes OUT [--train 400] [--val 100] [--size 96] [--seed 0]

writes, for train and val, OUT/PART/images (PNG) and the same boxes three times: OUT/PART/boxes.json (COCO), OUT/PART/voc (.xml,
Pascal VOC) and OUT/PART/yolo (.txt and classes.txt). Garments, photographs and parts are those of `composed.py`, and what it says
of colours and outlines holds. One to three objects a picture, which may overlap: one that would hide more than half of another
is not placed; and a piece of another photograph that is no object. Pictures are wider or higher than `size` by up to a half.
Category ids have gaps, as COCO's have.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from benchmarks.composed import CLASSES, _distractor, _object, _piece, garments, photographs
from selfsup.randomness import generator

IDS = (3, 7, 8, 21)
"""Category ids in boxes.json."""
Scene = tuple[np.ndarray, np.ndarray, np.ndarray]
"""uint8 [H, W, 3]; int64 [N, 4] whole pixels, x1, y1, x2, y2; int64 [N] classes from 0."""


def scenes(part: str, count: int, size: int = 96, seed: int = 0, most: int = 3) -> Iterator[Scene]:
    """`count` pictures whose shorter side is `size`. The boxes are those of what is seen."""
    photos, cut = photographs(part), garments(part)
    for i in range(count):
        rng = generator(seed, 0xB0C5, part == "val", i)
        longer = int(rng.integers(size, round(1.5 * size) + 1))
        height, width = (size, longer) if rng.random() < 0.5 else (longer, size)
        image = _piece(photos, longer, rng)[:height, :width].astype(float)
        odd = _distractor(longer, rng)[:height, :width]
        image[odd] = _piece(photos, longer, rng)[:height, :width][odd]
        owner = np.full((height, width), -1)
        kinds: list[int] = []
        for _ in range(int(rng.integers(1, most + 1))):
            kind = int(rng.integers(len(CLASSES)))
            side = int(rng.integers(round(0.35 * size), round(0.75 * size)))
            colours, inside = _object(cut[kind + 1][rng.integers(len(cut[kind + 1]))], photos, side, rng)
            top, left = int(rng.integers(0, height - side + 1)), int(rng.integers(0, width - side + 1))
            place = np.s_[top : top + side, left : left + side]
            after = owner.copy()
            after[place][inside] = len(kinds)
            if any((after == n).sum() < 0.5 * (owner == n).sum() for n in range(len(kinds))):
                continue
            owner, kinds = after, [*kinds, kind]
            image[place][inside] = colours[inside]
        image += rng.normal(0, 3, image.shape)
        boxes = []
        for n in range(len(kinds)):
            y, x = np.nonzero(owner == n)
            boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1))
        yield np.clip(np.rint(image), 0, 255).astype(np.uint8), np.array(boxes), np.array(kinds)


def write_coco(path: Path, names: Sequence[str], rows: Sequence[Scene]) -> None:
    """boxes.json: the file of `instances`."""
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for i, (name, (pixels, boxes, kinds)) in enumerate(zip(names, rows)):
        images.append({"id": 100 + i, "file_name": name, "height": pixels.shape[0], "width": pixels.shape[1]})
        for (x1, y1, x2, y2), kind in zip(boxes.tolist(), kinds.tolist()):
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"id": len(annotations) + 1, "image_id": 100 + i, "category_id": IDS[kind], "bbox": box}
            annotations.append(row | {"area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": k, "name": name} for k, name in zip(IDS, CLASSES)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_voc(folder: Path, names: Sequence[str], rows: Sequence[Scene]) -> None:
    """One .xml file an image; corners count from 1, and both are inside."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (pixels, boxes, kinds) in zip(names, rows):
        root = ElementTree.Element("annotation")
        ElementTree.SubElement(root, "filename").text = name
        size = ElementTree.SubElement(root, "size")
        for key, value in zip(("height", "width", "depth"), pixels.shape):
            ElementTree.SubElement(size, key).text = str(value)
        for (x1, y1, x2, y2), kind in zip(boxes.tolist(), kinds.tolist()):
            item = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(item, "name").text = CLASSES[kind]
            ElementTree.SubElement(item, "difficult").text = "0"
            corners = ElementTree.SubElement(item, "bndbox")
            for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (x1 + 1, y1 + 1, x2, y2)):
                ElementTree.SubElement(corners, key).text = str(value)
        ElementTree.ElementTree(root).write(folder / f"{Path(name).stem}.xml")


def write_yolo(folder: Path, names: Sequence[str], rows: Sequence[Scene]) -> None:
    """One .txt file an image, and classes.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    for name, (pixels, boxes, kinds) in zip(names, rows):
        h, w = pixels.shape[:2]
        lines = [
            f"{kind} {(x1 + x2) / 2 / w:.8f} {(y1 + y2) / 2 / h:.8f} {(x2 - x1) / w:.8f} {(y2 - y1) / h:.8f}\n"
            for (x1, y1, x2, y2), kind in zip(boxes.tolist(), kinds.tolist())
        ]
        (folder / f"{Path(name).stem}.txt").write_text("".join(lines))


def build(out: Path, train: int = 400, val: int = 100, size: int = 96, seed: int = 0) -> Path:
    """Write the set below `out` and return `out`."""
    for part, count in (("train", train), ("val", val)):
        (out / part / "images").mkdir(parents=True, exist_ok=True)
        rows = list(scenes(part, count, size, seed))
        names = [f"{i:05d}.png" for i in range(count)]
        for name, (pixels, _, _) in zip(names, rows):
            Image.fromarray(pixels).save(out / part / "images" / name)
        write_coco(out / part / "boxes.json", names, rows)
        write_voc(out / part / "voc", names, rows)
        write_yolo(out / part / "yolo", names, rows)
    return out


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in (("train", 400), ("val", 100), ("size", 96), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    build(options.out, options.train, options.val, options.size, options.seed)
    print(f"{options.out}: {options.train} training and {options.val} val images of {options.size} pixels and more")


if __name__ == "__main__":
    main()
