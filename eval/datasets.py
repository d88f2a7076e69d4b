"""The labelled images of an evaluation: which are train, which are val, and that both mean the same by a class."""

import hashlib
import os
import stat
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from selfsup.config import DataConfig, Section
from selfsup.data.sources import BadImage, Source, Subset, open_source
from selfsup.data.split import split
from selfsup.errors import UserError
from selfsup.randomness import generator

from .settings import FeatureSettings, ImageSettings
from .targets import Target

_CHOICE = 0xC401CE  # keeps these draws apart from other uses of the same seed


@dataclass
class Images:
    """Some images of a source: `indices` [N] into it."""

    source: Source
    indices: np.ndarray
    spec: str

    def __len__(self) -> int:
        return len(self.indices)

    def fingerprint(self) -> str:
        """Of the names, the choice, and the pixels of a few images: the same wherever these images lie."""
        digest = hashlib.sha256(self.source.fingerprint().encode())
        digest.update(self.indices.astype("<i8").tobytes())
        for i in self.indices[np.unique(np.linspace(0, len(self.indices) - 1, 8).astype(int))]:
            digest.update(_content(self.source, int(i)))
        return digest.hexdigest()

    def cache_key(self) -> str:
        """The fingerprint, how files are decoded, and where they have files of their own their sizes and times.

        So features are not reused when a file was replaced under its old name. One stat call an image.
        """
        digest = hashlib.sha256(self.fingerprint().encode())
        config = self.source.config
        how = "" if config.depth == 8 and min(config.background) == 255 else f" {config.depth} {config.background}"
        digest.update(f"{self.source.channels} {config.value_range} {config.max_pixels}{how}\n".encode())
        if config.frames is not None:
            digest.update(f"{config.frames} {config.stride} {config.clips}\n".encode())
        whole = _stat(os.path.expanduser(self.spec))
        digest.update(str(whole).encode())
        if len(self) and _stat(self.source.name(int(self.indices[0]))) is not None:
            for i in self.indices:
                digest.update(str(_stat(self.source.name(int(i)))).encode())
        return digest.hexdigest()


def _stat(path: str) -> tuple[int, int] | None:
    """(bytes, time of the last change) of a file; None for what is no file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _content(source: Source, index: int) -> bytes:
    try:
        return np.asarray(source.read(index)).tobytes()
    except BadImage as error:
        return str(error).encode()


@dataclass
class LabelledPair:
    """Training and val images with labels in one numbering of classes."""

    train: Images
    val: Images
    train_labels: np.ndarray
    """int64 [len(train)], -1 where there is none."""
    val_labels: np.ndarray
    class_names: list[str] | None
    classes: int
    protocol: dict[str, Any] = field(default_factory=dict)


class Labelled(Subset):
    """Some images of a source with the labels of an evaluation, whose numbering may not be the source's."""

    def __init__(self, images: Images, rows: np.ndarray, labels: np.ndarray) -> None:
        super().__init__(images.source, images.indices[rows])
        self._labels = labels[rows]

    @property
    def labels(self) -> np.ndarray:
        """int64 [len(rows)]."""
        return self._labels


def labelled_only(pair: LabelledPair) -> tuple[LabelledPair, dict[str, int]]:
    """Without the images that have no label; and how many those were."""
    train, val = pair.train_labels >= 0, pair.val_labels >= 0
    left_out = {"train": int((~train).sum()), "val": int((~val).sum())}
    return replace(
        pair,
        train=replace(pair.train, indices=pair.train.indices[train]), train_labels=pair.train_labels[train],
        val=replace(pair.val, indices=pair.val.indices[val]), val_labels=pair.val_labels[val],
    ), left_out  # fmt: skip


def open_pair(target: Target, settings: FeatureSettings, channels: int | None = None) -> LabelledPair:
    """The data of an evaluation, as DESIGN.md says: `data`, `eval.train`, `eval.val`, `data.val`, the run's own; else a split.

    channels: default: what the target takes. Raises UserError if there is no data, or none of it is labelled.
    """
    if target.backbone is not None and target.backbone.sees == "volumes":
        raise UserError(f"{target.name} sees volumes, and this is of images; there is selfsup eval segment3d")
    train_spec, val_spec = specs(target, settings)
    channels, options = channels or channels_of(target, settings, train_spec), data_options(target, settings)
    train_source = _open(train_spec, channels, options)
    names = train_source.classes
    labels = _labels(train_source, train_spec, settings)
    protocol: dict[str, Any] = {"train": train_spec}
    if val_spec is None:
        if len(labels) < 2:
            raise UserError(f"{train_spec}: {len(labels)} image cannot be split; give data.val=PATH")
        train_index, val_index = split(labels, fraction=settings.val_fraction, seed=settings.seed)
        train, val = Images(train_source, train_index, train_spec), Images(train_source, val_index, train_spec)
        train_labels, val_labels = labels[train_index], labels[val_index]
        share = round(100 * settings.val_fraction)
        protocol |= {
            "val": train_spec,
            "split": f"seeded stratified {100 - share}/{share} of {train_spec}, seed {settings.seed}",
        }
        protocol["split_hash"] = hashlib.sha256(np.sort(val_index).astype("<i8").tobytes()).hexdigest()
    else:
        val_source = _open(val_spec, channels, options)
        train = Images(train_source, np.arange(len(train_source)), train_spec)
        val = Images(val_source, np.arange(len(val_source)), val_spec)
        train_labels, val_labels = labels, _labels(val_source, val_spec, settings)
        names, train_labels, val_labels = align(names, train_labels, val_source.classes, val_labels)
        protocol |= {"val": val_spec, "split": "as given"}
    train, train_labels = at_most(train, train_labels, settings.max_train, settings.seed)
    val, val_labels = at_most(val, val_labels, settings.max_val, settings.seed)
    for what, some, spec in (("train", train_labels, train_spec), ("val", val_labels, val_spec or train_spec)):
        if not (some >= 0).any():
            raise UserError(f"{spec} ({what}): no labelled image is left; give class folders, or more images a class")
    classes = max(int(max(train_labels.max(), val_labels.max())) + 1, len(names or []))
    protocol |= {"train_images": len(train), "val_images": len(val), "classes": classes}
    protocol |= {"train_fingerprint": train.fingerprint(), "val_fingerprint": val.fingerprint()}
    return LabelledPair(train, val, train_labels, val_labels, names, classes, protocol)


def align(
    train_names: list[str] | None, train_labels: np.ndarray, val_names: list[str] | None, val_labels: np.ndarray
) -> tuple[list[str] | None, np.ndarray, np.ndarray]:
    """One numbering for both: by class name where both sides have names (a val folder may lack a class), else as given."""
    if train_names is None or val_names is None or train_names == val_names:
        return train_names or val_names, train_labels, val_labels
    names = [*train_names, *(n for n in val_names if n not in set(train_names))]
    place = {name: i for i, name in enumerate(names)}
    table = np.array([place[n] for n in val_names], dtype=np.int64)
    moved = np.where(val_labels >= 0, table[np.maximum(val_labels, 0)], -1)
    if not set(train_names) & set(val_names):
        raise UserError(
            f"eval.val: its classes ({', '.join(val_names[:3])}, ...) and those of train ({', '.join(train_names[:3])}, ...) "
            "have no name in common; both sides need the same class folders"
        )
    return names, train_labels, moved


def specs(target: Target, settings: FeatureSettings) -> tuple[str, str | None]:
    """(train, val or None to split), from the settings first, then from the run."""
    train = settings.eval.train or settings.data.path
    val = settings.eval.val or settings.data.val
    run = target.config
    if train is None:
        if run is None:
            raise UserError(f"eval of {target.name}: no data; give data=FOLDER, or eval.train=FOLDER eval.val=FOLDER2")
        train = run.eval.train or run.data.path
        val = val or run.eval.val or run.data.val
    if val is None and train in ("demo", "demo:train"):
        val = "demo:val"  # the bundled images come with a val part
    return ("demo:train" if train == "demo" else train), val


def read_as(target: Target, given: Section) -> DataConfig:
    """How images, clips or volumes are read: as the keys of a verb's `data` say, else as the target's run read them."""
    base = target.config.data if target.config is not None else DataConfig()
    keys = (type(given).model_fields.keys() & DataConfig.model_fields.keys()) - {"path", "val"}
    return base.model_copy(update={k: v for k in keys if (v := getattr(given, k)) is not None})


def data_options(target: Target, settings: ImageSettings) -> DataConfig:
    found = read_as(target, settings.data)
    if found.frames is None and target.backbone is not None and target.backbone.sees == "clips":
        found = found.model_copy(update={"frames": target.backbone.model.frames})
    if found.frames is not None and found.depth != 8:
        raise UserError(f"data.depth={found.depth}: clips (data.frames) have 8 bits; leave it out")
    return found


def _open(spec: str, channels: int, options: DataConfig) -> Source:
    return open_source(spec, channels=channels, config=options)


def channels_of(target: Target, settings: FeatureSettings, spec: str) -> int:
    if target.backbone is not None:
        if settings.channels not in (None, target.backbone.in_chans):
            raise UserError(
                f"channels={settings.channels}: {target.name} takes {target.backbone.in_chans}; leave it out"
            )
        return target.backbone.in_chans
    if settings.channels is not None:
        return settings.channels
    return 1 if _grey(_open(spec, 3, data_options(target, settings))) else 3


def _grey(source: Source, look_at: int = 16) -> bool:
    """Whether the first readable images have three equal channels."""
    for i in range(min(look_at, len(source))):
        try:
            image = np.asarray(source.read(i))
        except BadImage:
            continue
        if image.ndim == 3 and not (image == image[..., :1]).all():
            return False
    return True


def _labels(source: Source, spec: str, settings: FeatureSettings) -> np.ndarray:
    labels = source.labels
    if labels is None or not (np.asarray(labels) >= 0).any():
        raise UserError(
            f"{spec}: its {len(source)} images have no labels; k-NN and linear probes need class folders, "
            "or a file list with labels (eval.train=..., eval.val=...)"
        )
    return np.asarray(labels, dtype=np.int64)


def at_most(images: Images, labels: np.ndarray, most: int | None, seed: int) -> tuple[Images, np.ndarray]:
    """A seeded, stratified choice of so many; all if `most` is None or more than there are."""
    if most is None or most >= len(images):
        return images, labels
    chosen = stratified_choice(labels, most, seed)
    return Images(images.source, images.indices[chosen], images.spec), labels[chosen]


def stratified_choice(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` ascending indices, seeded, every class (and the unlabelled) in proportion as far as whole numbers go."""
    rng = generator(_CHOICE, seed)
    order = rng.permutation(len(labels))
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]  # in random order
        key[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.sort(order[np.argsort(key[order], kind="stable")][:count])
