"""A trained segmentation model as a folder, and how it is used again.

    from selfsup.eval import segment_model

    model = segment_model.load("RUN/eval/segment")    # eval mode
    model(images)                   # normalised [B, C, H, W] -> logits [B, K, H, W]
    model.predict(pixels)           # uint8 [H, W, C], any size -> class numbers int64 [H, W]
    model.classes, model.ids, model.colours, model.mean, model.std, model.size

The folder holds everything that a prediction needs:

    head.json                 kind of head, layers, classes with their ids and colours, normalisation, digests, the training
    head.safetensors          the head's weights
    backbone/                 the trunk, fine-tuned or not, as every exported backbone: `selfsup.load_backbone`, bare timm
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from selfsup import checkpoint, durable, tensorfile
from selfsup.backbones import Backbone, export_timm, load_backbone
from selfsup.config import Positive, Section, ValueRange, validate
from selfsup.errors import UserError
from selfsup.wording import one_line

from .dense import palette
from .segment_data import IGNORE, REFUSED, Classes
from .segment_heads import Trunk, create_head
from .segment_settings import Head, Id
from .segment_state import write
from .segment_test import Predictor
from .segment_train import Segmenter
from .targets import pick_device, weights_hash

FORMAT = 1
_DESCRIPTION, _HEAD = "head.json", "head.safetensors"


class ClassFile(Section):
    """One class."""

    name: str
    id: Id
    """In masks."""
    colour: tuple[int, int, int]


class SegmentFile(Section):
    """head.json."""

    format: Literal[1] = 1
    key: str
    """Digest of what the training is a function of."""
    head: Head
    trunk: Literal["frozen", "finetune"]
    width: Positive | None
    dropout: float | None
    layers: tuple[int, ...]
    """Of the backbone, whose maps the head reads."""
    classes: Annotated[tuple[ClassFile, ...], Field(min_length=1)]
    ignored: tuple[Id, ...]
    others_ignored: bool
    """Whether ids that are in no class are ignored instead of refused."""
    size: Positive
    """Side of the training crops, and of the windows of a prediction."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone: str
    """sha256 of the trunk's weights, as in result files."""
    head_sha256: str
    value_range: ValueRange | None = None
    """Of the images it was trained on."""
    training: dict[str, Any]
    """What a result says of it."""


class SegmentModel(nn.Module):
    """A trunk, a head and what the classes are."""

    def __init__(self, segmenter: Segmenter, classes: Classes, size: int, value_range: Any = None) -> None:
        super().__init__()
        backbone = segmenter.trunk.backbone
        self.segmenter, self.table, self.size = segmenter, classes, size
        self.mean, self.std = tuple(backbone.mean), tuple(backbone.std)
        self.value_range = value_range

    @property
    def classes(self) -> list[str]:
        """Their names, by number."""
        return self.table.names

    @property
    def ids(self) -> list[int]:
        """Of each class in masks."""
        return self.table.ids

    @property
    def colours(self) -> np.ndarray:
        """uint8 [K, 3]: PASCAL VOC's for the ids."""
        return palette(max(self.ids) + 1)[self.ids]

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], normalised -> logits [B, K, H, W], float32. H and W must suit the backbone."""
        logits = self.segmenter(images)
        return F.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=False)

    def predictor(
        self, inference: str = "slide", scales: tuple[float, ...] = (1.0,), flip: bool = False, precision: str = "fp32",
        size: int | None = None,
    ) -> Predictor:  # fmt: skip
        """uint8 [H, W, C] -> class numbers int64 [H, W], with the keys of `selfsup eval segment` of these names."""
        backbone = self.segmenter.trunk.backbone
        device = next(self.parameters()).device
        size = size or self.size
        backbone.check_size(size)
        if inference == "whole" and backbone.fixed_size:
            raise UserError(
                f"inference=whole: {backbone.name} takes {backbone.input_size} pixels alone; use inference=slide"
            )

        def forward(images: Tensor) -> Tensor:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                return self(images)

        return Predictor(
            forward, mean=self.mean, std=self.std, size=size, multiple=max(32, backbone.stride), inference=inference,
            scales=scales, flip=flip, device=device,
        )  # fmt: skip

    def predict(self, pixels: np.ndarray) -> Tensor:
        """uint8 [H, W, C] of any size -> class numbers int64 [H, W], by overlapping windows as in training's evaluation."""
        return self.eval().predictor()(pixels)


def build(
    backbone: Backbone, head: str, classes: int, *, width: int | None, dropout: float | None, frozen: bool
) -> Segmenter:
    """With a fresh head, drawn from torch's generator."""
    trunk = Trunk(backbone, head)
    made = create_head(
        head, trunk.channels, classes, stride=backbone.stride, in_chans=backbone.in_chans, width=width, dropout=dropout
    )
    return Segmenter(trunk, made, frozen=frozen)


def is_model(folder: str | Path) -> bool:
    """Whether a folder holds a trained segmentation model."""
    return (Path(folder) / _DESCRIPTION).is_file()


def save(model: SegmentModel, folder: Path, *, key: str, settings: Any, training: dict[str, Any]) -> Path:
    """Write the folder; head.json last, so that a folder that has one is whole. Raises UserError if it cannot."""
    segmenter, table = model.segmenter, model.table
    try:
        durable.remove(folder / _DESCRIPTION)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}; name a file with --out") from None
    export_timm(segmenter.trunk.backbone, folder / "backbone")
    digest = write(folder / _HEAD, segmenter.head.state_dict())
    colours = model.colours.tolist()
    described = SegmentFile(
        key=key, head=settings.head, trunk=settings.trunk, width=settings.width, dropout=settings.dropout,
        layers=tuple(segmenter.trunk.layers),
        classes=tuple(
            ClassFile(name=n, id=i, colour=tuple(c)) for n, i, c in zip(table.names, table.ids, colours, strict=True)
        ),
        ignored=() if table.others_ignored else tuple(np.flatnonzero(table.table == IGNORE).tolist()),
        others_ignored=table.others_ignored, size=model.size, mean=model.mean, std=model.std,
        backbone=weights_hash(segmenter.trunk.backbone.model), head_sha256=digest, training=training,
        value_range=model.value_range,
    )  # fmt: skip
    text = json.dumps(described.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    durable.write_atomically(folder / _DESCRIPTION, text)
    return folder


def describe(folder: str | Path) -> SegmentFile:
    """head.json. Raises UserError if there is none, or none that this version reads."""
    path = Path(folder) / _DESCRIPTION
    try:
        recorded = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: not a trained segmentation model: {one_line(error, 120)}; `selfsup eval segment` writes one"
        ) from None
    if isinstance(recorded, dict) and recorded.get("format") != FORMAT:
        raise UserError(f"{path}: format {recorded.get('format')}; this version reads {FORMAT}")
    return validate(SegmentFile, recorded, where=str(path))


def load(folder: str | Path, device: str = "auto") -> SegmentModel:
    """What `save` wrote, in eval mode. Raises UserError naming the file that is missing, damaged or of another model."""
    folder, place = Path(folder), pick_device(device)
    file = describe(folder)
    backbone = load_backbone(folder / "backbone")
    if weights_hash(backbone.model) != file.backbone:
        raise UserError(
            f"{folder / 'backbone'}: not the weights that {_DESCRIPTION} names; train again, or restore them"
        )
    try:
        if checkpoint.sha256(folder / _HEAD) != file.head_sha256:
            raise UserError(f"{folder / _HEAD}: content differs from the sha256 in {_DESCRIPTION}")
        state = tensorfile.read(folder / _HEAD)
    except OSError as error:
        raise UserError(f"{folder / _HEAD}: cannot be read: {error.strerror or error}") from None
    with torch.random.fork_rng(devices=[]):
        segmenter = build(
            backbone,
            file.head,
            len(file.classes),
            width=file.width,
            dropout=file.dropout,
            frozen=file.trunk == "frozen",
        )
    if tuple(segmenter.trunk.layers) != file.layers:
        raise UserError(f"{folder}: trained on layers {list(file.layers)}, here {segmenter.trunk.layers}")
    segmenter.head.load_state_dict(state)
    ids = [one.id for one in file.classes]
    table = np.full(65536, IGNORE if file.others_ignored else REFUSED, np.int16)
    table[ids] = np.arange(len(ids))
    table[list(file.ignored)] = IGNORE
    classes = Classes([one.name for one in file.classes], table)
    return SegmentModel(segmenter, classes, file.size, file.value_range).eval().to(place)
