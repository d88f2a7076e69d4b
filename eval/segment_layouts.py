"""Pairs of images and masks in the folders that segmentation data sets come in.

pairs       data=IMAGES masks=MASKS, one mask an image (see `masks`). Val: data.val, masks.val, or a split
voc         data=ROOT: JPEGImages, SegmentationClass, ImageSets/Segmentation/train.txt and val.txt   (PASCAL VOC 2012)
ade20k      data=ROOT: images/training, annotations/training and the same in validation              (ADE20K, scene parsing)
cityscapes  data=ROOT: leftImg8bit/train/CITY/*_leftImg8bit.png, gtFine/train/CITY/*_gtFine_labelTrainIds.png or _labelIds.png
coco-stuff  data=ROOT: images/train2017 (or train2017) and stuffthingmaps/train2017 or annotations/train2017
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from selfsup.data.decode import SUFFIXES
from selfsup.data.mask_files import files, matched
from selfsup.errors import UserError
from selfsup.randomness import generator

from .segment_settings import SegmentSettings

_TAG = 0x5E65117
VOC = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip
CITYSCAPES = [
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
]  # fmt: skip
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""labelIds of the classes that are evaluated (cityscapesScripts, helpers/labels.py); the others are ignored."""


@dataclass
class Pairs:
    """Files of one part, as many masks as images."""

    images: list[Path]
    masks: list[Path]

    def __len__(self) -> int:
        return len(self.images)

    def chosen(self, index: np.ndarray) -> "Pairs":
        """Those with these numbers."""
        return Pairs([self.images[i] for i in index], [self.masks[i] for i in index])


@dataclass
class Layout:
    """What a data set's folders say."""

    name: str
    train: Pairs
    val: Pairs | None
    names: list[str] | None = None
    classes: int | None = None
    ids: tuple[int, ...] | None = None
    others_ignored: bool = False
    """Whether ids that are in no class are ignored instead of refused."""
    reduce_zero_label: bool = False
    split: str = "as given"
    facts: dict[str, str] = field(default_factory=dict)


def open_layout(settings: SegmentSettings) -> Layout:
    """The pairs of train and val. Raises UserError naming the folder, or the image without a mask."""
    found = _open(settings)
    if found.val is None:
        found = _split(found, settings)
    assert found.val is not None
    train, val = _at_most(found.train, settings.max_train, settings.seed), found.val
    return replace(found, train=train, val=_at_most(val, settings.max_val, settings.seed))


def open_val(settings: SegmentSettings) -> tuple[Pairs, dict[str, str]]:
    """(the pairs that a trained model is measured on, what a result says of them): the val part, or all where there is none."""
    found = _open(settings)
    facts = {key: value for key, value in found.facts.items() if key != "train"}
    split = "as given" if found.val is not None else f"all pairs of {settings.data.path}"
    pairs = found.val if found.val is not None else found.train
    return _at_most(pairs, settings.max_val, settings.seed), {**facts, "split": split}


def known_layout(root: Path, settings: SegmentSettings) -> str | None:
    """The name that the keys or the folders under `root` say; None for images without masks."""
    if settings.layout != "auto":
        return settings.layout
    if settings.masks.path is not None:
        return "pairs"
    marks = {
        "voc": ("SegmentationClass",),
        "cityscapes": ("leftImg8bit",),
        "ade20k": ("annotations/training",),
        "coco-stuff": ("stuffthingmaps", "annotations/train2017"),
    }
    return next((name for name, paths in marks.items() if any((root / p).is_dir() for p in paths)), None)


def _open(settings: SegmentSettings) -> Layout:
    if settings.data.path is None:
        raise UserError("eval segment: no data; give data=IMAGES masks=MASKS, or data=ROOT of a known layout")
    root = data_folder(settings.data.path, "data")
    name = known_layout(root, settings)
    if name is None:
        raise UserError(
            f"data={root}: no masks; give masks=FOLDER. Known layouts are found by SegmentationClass (voc), "
            "annotations/training (ade20k),\nleftImg8bit (cityscapes), stuffthingmaps or annotations/train2017 (coco-stuff); "
            "none of them is there"
        )
    if name != "pairs" and settings.masks.path is not None:
        raise UserError(f"masks={settings.masks.path}: the layout {name} holds its own masks; leave it out")
    found = {"pairs": _plain, "voc": _voc, "ade20k": _ade, "cityscapes": _cityscapes, "coco-stuff": _coco}[name](
        root, settings
    )
    found.facts = {"layout": name, "train": settings.data.path, "val": settings.data.val or settings.data.path}
    return found


# --------------------------------------------------------------------------------------------------------------- layouts


def _plain(root: Path, settings: SegmentSettings) -> Layout:
    if settings.masks.path is None:
        raise UserError("layout=pairs needs masks=FOLDER beside data=FOLDER")
    train = _match(root, data_folder(settings.masks.path, "masks"))
    val = None
    if settings.data.val is not None and settings.masks.val is not None:
        val = _match(data_folder(settings.data.val, "data.val"), data_folder(settings.masks.val, "masks.val"))
    return Layout("pairs", train, val)


def _voc(root: Path, settings: SegmentSettings) -> Layout:
    def part(name: str) -> Pairs:
        path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
        try:
            stems = path.read_text().split()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; layout=voc needs it") from None
        images = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
        return _existing(Pairs(images, [root / "SegmentationClass" / f"{stem}.png" for stem in stems]), path)

    return Layout("voc", part("train"), part("val"), list(VOC), len(VOC))


def _ade(root: Path, settings: SegmentSettings) -> Layout:
    def part(name: str) -> Pairs:
        return _match(data_folder(root / "images" / name, "data"), data_folder(root / "annotations" / name, "data"))

    return Layout("ade20k", part("training"), part("validation"), None, 150, reduce_zero_label=True)


def _cityscapes(root: Path, settings: SegmentSettings) -> Layout:
    kinds = set()

    def part(name: str) -> Pairs:
        folder = data_folder(root / "leftImg8bit" / name, "data")
        images = [p for p in files(folder, SUFFIXES) if p.stem.endswith("_leftImg8bit")]
        masks = []
        for image in images:
            stem = root / "gtFine" / name / image.relative_to(folder).parent / image.stem.removesuffix("_leftImg8bit")
            trains = Path(f"{stem}_gtFine_labelTrainIds.png")
            kinds.add(trains.is_file())
            masks.append(trains if trains.is_file() else Path(f"{stem}_gtFine_labelIds.png"))
        return _existing(Pairs(images, masks), folder)

    train, val = part("train"), part("val")
    if len(kinds) > 1:
        raise UserError(
            f"{root / 'gtFine'}: some images have _labelTrainIds.png and some not; make them for all or none"
        )
    ids = None if kinds == {True} else CITYSCAPES_IDS
    return Layout("cityscapes", train, val, list(CITYSCAPES), len(CITYSCAPES), ids, others_ignored=ids is not None)


def _coco(root: Path, settings: SegmentSettings) -> Layout:
    maps = root / "stuffthingmaps" if (root / "stuffthingmaps").is_dir() else root / "annotations"
    pictures = root / "images" if (root / "images").is_dir() else root
    contiguous = any((maps / "train2017").glob("*_labelTrainIds.png"))

    def part(name: str) -> Pairs:
        images = files(data_folder(pictures / name, "data"), SUFFIXES)
        end = "_labelTrainIds.png" if contiguous else ".png"
        return _existing(Pairs(images, [maps / name / f"{p.stem}{end}" for p in images]), maps / name)

    return Layout("coco-stuff", part("train2017"), part("val2017"), None, 171 if contiguous else 182)


# ----------------------------------------------------------------------------------------------------------------- files


def data_folder(path: str | Path, key: str) -> Path:
    """Raises UserError where there is none."""
    found = Path(os.path.expanduser(path))
    if not found.is_dir():
        raise UserError(f"{key}={path}: no such folder")
    return found


def _match(images: Path, masks: Path) -> Pairs:
    """Images of a folder and their masks (see `masks.matched`)."""
    found = images_of(images)
    return Pairs(found, matched([p.relative_to(images) for p in found], masks))


def images_of(folder: Path) -> list[Path]:
    """Those in a folder and below. Raises UserError for none, and for two of one name with other suffixes."""
    found = files(folder, SUFFIXES)
    if not found:
        raise UserError(f"{folder}: no images in it; looked for {' '.join(SUFFIXES)}")
    stems = set()
    for path in found:
        if (stem := path.with_suffix("")) in stems:
            raise UserError(f"{stem}: two images of this name with other suffixes; a mask belongs to one image")
        stems.add(stem)
    return found


def _existing(pairs: Pairs, where: Path) -> Pairs:
    if not len(pairs):
        raise UserError(f"{where}: names no images")
    for path in (*pairs.images, *pairs.masks):
        if not path.is_file():
            raise UserError(f"{where}: no file {path}")
    return pairs


def _split(layout: Layout, settings: SegmentSettings) -> Layout:
    count = len(layout.train)
    if count < 2:
        raise UserError(f"data={settings.data.path}: {count} image cannot be split; give data.val and masks.val")
    held = min(max(round(count * settings.val_fraction), 1), count - 1)
    order = generator(_TAG, settings.seed).permutation(count)
    val, train = np.sort(order[:held]), np.sort(order[held:])
    said = f"seeded {count - held}/{held} of {settings.data.path}, seed {settings.seed}"
    return replace(layout, train=layout.train.chosen(train), val=layout.train.chosen(val), split=said)


def _at_most(pairs: Pairs, most: int | None, seed: int) -> Pairs:
    if most is None or most >= len(pairs):
        return pairs
    return pairs.chosen(np.sort(generator(_TAG, seed, 1).permutation(len(pairs))[:most]))
