"""Val images for a classifier, with labels in the numbering of the classes that it was trained on."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from selfsup.config import Config, DataConfig
from selfsup.data.sources import open_source
from selfsup.errors import UserError

from .datasets import Images, at_most, data_options
from .settings import ImageSettings
from .targets import Target


@dataclass
class LabelledImages:
    """Images with labels 0 .. classes - 1, all of them labelled."""

    images: Images
    labels: np.ndarray
    """int64 [len(images)]."""
    classes: int
    class_names: list[str] | None
    protocol: dict[str, Any] = field(default_factory=dict)


def val_of(config: Config) -> str | None:
    """The val set that a run's configuration names; the bundled images come with one."""
    found = config.eval.val or config.data.val
    return found or ("demo:val" if config.data.path in ("demo", "demo:train") else None)


def open_val(
    target: Target, settings: ImageSettings, classes: int, names: list[str] | None, channels: int
) -> LabelledImages:
    """The val images of `eval.val`, `data.val` or `data`, else of the run.

    names: of the classes of training; None: those of `eval.train`, of `data` (where it is not the val set) or of the run's
    training images tell. Raises UserError without val images, without labels, and for classes unknown to training.
    """
    run = target.config
    val = settings.eval.val or settings.data.val or (settings.data.path if settings.eval.train is None else None)
    train = settings.eval.train or (settings.data.path if val != settings.data.path else None)
    val = val or (val_of(run) if run is not None else None)
    if val is None:
        raise UserError(
            f"classify {target.name}: no val images; give eval.val=FOLDER, or data=FOLDER (all of it is classified)"
        )
    options = data_options(target, settings)
    val = "demo:train" if val == "demo" else val
    if train is not None or names is None:
        names = names_of(train, channels, options) if train else names_of_run(run, channels, options)
    source = open_source(val, channels=channels, config=options)
    labels = source.labels
    if labels is None or not (labels >= 0).any():
        raise UserError(
            f"{val}: its {len(source)} images have no labels; give class folders, or a list with a label a line"
        )
    moved = to_training_classes(labels, source.classes, names, classes, val)
    kept = np.flatnonzero(moved >= 0)
    images = Images(source, kept, val)
    images, moved = at_most(images, moved[kept], settings.max_val, settings.seed)
    found = LabelledImages(images, moved, classes, names or source.classes)
    found.protocol = {
        "val": val,
        "val_images": len(images),
        "classes": classes,
        "classes_matched": "by name" if names is not None and source.classes is not None else "by number",
        "val_classes_without_images": int(classes - len(np.unique(moved))),
        "unlabelled_left_out": {"val": int((labels < 0).sum())},
        "val_fingerprint": images.fingerprint(),
    }
    if run is not None and val in (run.data.path, run.eval.train, f"{run.data.path}:train"):
        found.protocol["note"] = "these are images that it was trained on"
    return found


def names_of(spec: str, channels: int, options: DataConfig) -> list[str] | None:
    """Class names of some images."""
    return open_source(spec, channels=channels, config=options).classes


def names_of_run(run: Config | None, channels: int, options: DataConfig) -> list[str] | None:
    """Of a run's training images; None if they are no longer there."""
    try:
        return names_of(run.data.path, channels, options) if run is not None else None
    except UserError:
        return None


def to_training_classes(
    labels: np.ndarray, names: list[str] | None, trained: list[str] | None, classes: int, spec: str
) -> np.ndarray:
    """Labels [N] (-1: none) of val images in the numbering of training: by name where both have names, else as they are."""
    if trained is not None and names is not None and names != trained:
        place = {name: i for i, name in enumerate(trained)}
        used = [names[i] for i in np.unique(labels[labels >= 0])]
        unknown = [name for name in used if name not in place]
        if unknown:
            raise UserError(
                f"{spec}: {len(unknown)} of its {len(used)} classes are unknown to training ({', '.join(unknown[:3])}"
                f"{', ...' if len(unknown) > 3 else ''}); known: {', '.join(trained[:5])}{', ...' if len(trained) > 5 else ''}"
            )
        table = np.array([place.get(name, -1) for name in names], dtype=np.int64)
        return np.where(labels >= 0, table[np.maximum(labels, 0)], -1)
    if labels.max() >= classes:
        raise UserError(
            f"{spec}: has labels up to {labels.max()}, and the classifier tells {classes} classes apart (0 to {classes - 1})"
        )
    return np.asarray(labels, dtype=np.int64)
