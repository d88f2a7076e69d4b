"""Where the images and boxes of train and val are: as named, in a data set whose folders are known, or split.

pairs  data=IMAGES boxes=FILE|FOLDER, and data.val=IMAGES boxes.val=FILE|FOLDER for val; without them a seeded part is val
coco   data=ROOT: train2017, val2017 and annotations/instances_train2017.json, instances_val2017.json
voc    data=ROOT: JPEGImages, Annotations and ImageSets/Main/train.txt, val.txt
"""

from pathlib import Path

import numpy as np

from selfsup.errors import UserError
from selfsup.randomness import generator

from .detect_formats import Raw, read_boxes
from .detect_settings import DetectSettings

_SPLIT, _CHOICE = 0xDE7EC7, 0xC401CE
_COCO, _VOC = Path("annotations/instances_train2017.json"), Path("ImageSets/Main/train.txt")


def open_parts(settings: DetectSettings) -> tuple[Raw, Raw, dict[str, str]]:
    """(train, val, what a result says of them), at most max_train and max_val images each. Raises UserError naming the file."""
    if settings.data.path is None:
        raise UserError("eval detect: no data; give data=IMAGES boxes=FILE|FOLDER, or data=ROOT of COCO or Pascal VOC")
    root = _folder(settings.data.path, "data")
    classes = _names(settings)
    facts = {"train": settings.data.path, "val": settings.data.val or settings.data.path, "split": "as given"}
    if settings.boxes.path is None:
        train, val = _known(root, settings)
    else:
        train = read_boxes(root, Path(settings.boxes.path), classes, settings.voc_origin)
        if settings.data.val is not None and settings.boxes.val is not None:
            images = _folder(settings.data.val, "data.val")
            val = read_boxes(images, Path(settings.boxes.val), classes or train.names, settings.voc_origin)
        else:
            train, val, facts["split"] = _split(train, settings)
        facts |= {"boxes": settings.boxes.path} | ({"boxes_val": settings.boxes.val} if settings.boxes.val else {})
    if classes is not None:
        train.names = classes
    for part, most, what in ((train, settings.max_train, "train"), (val, settings.max_val, "val")):
        if not part.images:
            raise UserError(f"data: no images in {what}; {facts[what]} and its boxes name none")
        _at_most(part, most, settings.seed)
    return train, val, facts | {"format": train.format}


def _folder(path: str, key: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{key}={path}: no such folder")
    return folder


def _names(settings: DetectSettings) -> list[str] | None:
    if settings.classes is None:
        return None
    words = list(settings.classes)
    path = Path(words[0]).expanduser()
    if len(words) == 1 and (path.is_file() or path.suffix == ".txt"):
        try:
            words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"classes={path}: {getattr(error, 'strerror', None) or error}") from None
    if not words or len(set(words)) < len(words) or not all(words):
        raise UserError(
            f"classes={settings.classes}: {'a name is given twice' if all(words) and words else 'an empty name'}"
        )
    return words


def _known(root: Path, settings: DetectSettings) -> tuple[Raw, Raw]:
    if (root / _COCO).is_file():
        files = [root / str(_COCO).replace("train", part) for part in ("train", "val")]
        return tuple(  # type: ignore[return-value]
            read_boxes(root / f"{part}2017", file, None, 1) for part, file in zip(("train", "val"), files)
        )
    if (root / _VOC).is_file():
        found = []
        for part in ("train", "val"):
            listed = root / _VOC.with_name(f"{part}.txt")
            try:
                stems = set(listed.read_text().split())
            except OSError as error:
                raise UserError(f"{listed}: cannot be read: {error.strerror}") from None
            found.append(read_boxes(root / "JPEGImages", root / "Annotations", None, settings.voc_origin, stems))
            if missing := stems - {Path(row.source).stem for row in found[-1].images}:
                raise UserError(f"{listed}: names {sorted(missing)[0]}, which has no file in {root / 'Annotations'}")
        return found[0], found[1]
    raise UserError(
        f"data={root}: no boxes; give boxes=FILE|FOLDER. Known data sets are found by {_COCO} or {_VOC}; neither is there"
    )


def _split(raw: Raw, settings: DetectSettings) -> tuple[Raw, Raw, str]:
    count = len(raw.images)
    if count < 2:
        raise UserError(f"data: {count} images, which cannot be split; give data.val and boxes.val")
    order = generator(_SPLIT, settings.seed).permutation(count)
    held = min(count - 1, max(1, round(settings.val_fraction * count)))
    rows = np.sort(order[:held]), np.sort(order[held:])
    val, train = (Raw(raw.format, [raw.images[i] for i in part], raw.names) for part in rows)
    return train, val, f"seeded {len(train.images)}/{len(val.images)} images (seed {settings.seed})"


def _at_most(raw: Raw, most: int | None, seed: int) -> None:
    if most is not None and most < len(raw.images):
        rows = np.sort(generator(_CHOICE, seed).permutation(len(raw.images))[:most])
        raw.images = [raw.images[i] for i in rows]
