"""What `selfsup eval segment` measures: a head trained on a backbone, or a model that was trained before."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsup.errors import UserError

from . import results, segment_model
from .datasets import read_as
from .segment_crops import Crops
from .segment_data import Classes, Reader, check_masks, fingerprint, open_classes
from .segment_layouts import Pairs, data_folder, known_layout, open_layout, open_val
from .segment_model import SegmentModel
from .segment_settings import SegmentSettings
from .segment_state import TrainingState
from .segment_train import Normalise, class_weights, train_head
from .targets import Target, open_target

_OF_A_MODEL = {"data", "masks", "layout", "max_val", "size", "inference", "test_scales", "test_flip", "boundary"}
_OF_A_MODEL |= {"pictures", "predictions", "precision", "workers", "device", "seed"}
"""Keys that count where TARGET is a trained model."""
_NOT_TRAINING = _OF_A_MODEL - {"data", "size", "precision", "device", "seed"}
_NOT_TRAINING |= {"save_every", "val_fraction", "max_train"}
"""Keys that the trained weights are no function of, but for the images, whose fingerprint is taken."""


@dataclass
class Subject:
    """What is measured."""

    model: SegmentModel
    target: Target
    val: Pairs
    protocol: dict[str, Any]


def trained(target: str, settings: SegmentSettings, out: Path | None) -> Subject:
    """The head is trained, or taken from the folder in which the same training was done."""
    layout = open_layout(settings)
    opened = open_target(target, device=settings.device)
    if opened.backbone is None:
        raise UserError("eval segment: pixels have no maps of features; give a run or a backbone")
    classes, train_pixels, _ = open_classes(layout, settings)
    weights = class_weights(settings, train_pixels)
    assert layout.val is not None
    backbone, device = opened.backbone, opened.device
    size = settings.size or (opened.config.views.global_.size if opened.config is not None else backbone.input_size)
    backbone.check_size(size)
    train_fingerprint = fingerprint(layout.train)
    written = [image.stat().st_mtime_ns for image in layout.train.images]  # an image that was replaced has its old name
    folder, key = _folder(opened, out), _key(opened, settings, classes, size, f"{train_fingerprint} {written}")
    if (done := _finished(folder, key, settings.device)) is not None:
        model, training = done
    else:
        model = _fresh(opened, settings, classes, size)
        model.predictor(settings.inference, size=size)  # what it cannot do is said before it is trained
        reader = Reader(backbone.in_chans, settings.data.max_pixels, model.value_range, classes)
        fill = np.clip(np.rint(255 * np.array(backbone.mean)), 0, 255).astype(np.uint8)
        crops = Crops(layout.train, reader, settings, size, fill)
        state = TrainingState(folder, key, settings.save_every)
        normalise = Normalise(backbone.mean, backbone.std, device)
        training = train_head(model.segmenter, crops, settings, weights, normalise, state)
        training["trained_on"] = f"{len(layout.train):,} images, {training['steps']} steps of {settings.batch}"
        if folder is not None:
            segment_model.save(model, folder, key=key, settings=settings, training=training)
        state.remove()
    protocol = _protocol(model, settings.head, settings.trunk == "frozen", training)
    protocol |= {**layout.facts, "split": layout.split, "train_images": len(layout.train)}
    protocol |= {"train_fingerprint": train_fingerprint}
    if weights is not None:
        protocol["class_weights"] = [round(float(w), 5) for w in weights]
    if folder is not None:
        protocol["model"] = str(folder)
    return Subject(model, opened, layout.val, protocol)


def _finished(folder: Path | None, key: str, device: str) -> tuple[SegmentModel, dict[str, Any]] | None:
    """The model of the same training and what is said of it, if it was done before; what is damaged is trained anew."""
    if folder is None or not segment_model.is_model(folder):
        return None
    try:
        file = segment_model.describe(folder)
        if file.key != key:
            return None
        model = segment_model.load(folder, device)
    except UserError as error:
        print(f"{error}; it is trained anew", file=sys.stderr)
        return None
    print(f"{folder}: trained with these keys on these images; not trained again", file=sys.stderr)
    return model, file.training


def loaded(folder: str, settings: SegmentSettings) -> Subject:
    """A trained model, and the pairs it is measured on."""
    check_keys(folder, settings)
    val, facts = open_val(settings)
    file, model = segment_model.describe(folder), segment_model.load(folder, settings.device)
    check_masks(val, model.table)
    place = next(model.parameters()).device
    opened = Target(folder, "backbone", model.segmenter.trunk.backbone, file.backbone, place)
    protocol = _protocol(model, file.head, file.trunk == "frozen", file.training)
    return Subject(model, opened, val, {**protocol, **facts, "model": folder})


def _protocol(model: SegmentModel, head: str, frozen: bool, training: dict[str, Any]) -> dict[str, Any]:
    moved = model.segmenter.head if frozen else model.segmenter
    return {
        "head": head,
        "trunk": "frozen" if frozen else "finetune",
        "trained_on": training["trained_on"],
        "selected": "nothing: the weights of the last step, with the keys given",
        "training": {key: value for key, value in training.items() if key != "trained_on"},
        "parameters": sum(p.numel() for p in moved.parameters()),
    }


def check_keys(folder: str, settings: SegmentSettings) -> None:
    """Raise UserError for a key of training."""
    others = sorted(settings.model_fields_set - _OF_A_MODEL)
    if others:
        raise UserError(
            f"{others[0]}: {folder} is a trained model, and nothing is trained; keys that count here: "
            + ", ".join(sorted(_OF_A_MODEL))
        )


def has_masks(settings: SegmentSettings) -> bool:
    """Whether the keys name masks, or a layout that holds its own."""
    if settings.data.path is None:
        return True  # what is missing is said by the layout
    return known_layout(data_folder(settings.data.path, "data"), settings) is not None


def _folder(target: Target, out: Path | None) -> Path | None:
    """Where the model goes: beside the result, under its name without the suffix. None where no result is written."""
    path = out or results.path_in_run("segment", target)
    if path is None:
        return None
    return path.with_suffix("") if path.suffix else path.with_name(f"{path.name}_model")


def _key(target: Target, settings: SegmentSettings, classes: Classes, size: int, train_fingerprint: str) -> str:
    """Digest of all that the trained weights are a function of."""
    kept = settings.model_dump(mode="json", exclude=_NOT_TRAINING | {"data", "classes", "ids", "ignore"})
    kept |= {"size": size, "device": target.device.type, "value_range": read_as(target, settings.data).value_range}
    kept |= {"names": classes.names, "table": hashlib.sha256(classes.table.tobytes()).hexdigest()}
    text = json.dumps([kept, target.checkpoint_hash, train_fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _fresh(target: Target, settings: SegmentSettings, classes: Classes, size: int) -> SegmentModel:
    assert target.backbone is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        segmenter = segment_model.build(
            target.backbone, settings.head, len(classes), width=settings.width, dropout=settings.dropout,
            frozen=settings.trunk == "frozen",
        )  # fmt: skip
    return SegmentModel(segmenter, classes, size, read_as(target, settings.data).value_range).to(target.device)
