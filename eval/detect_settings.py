"""Keys of `selfsup eval detect`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from selfsup.config import Duration, Positive, Section

from .many import Many
from .segment_settings import MaskData, Rate, SegmentData, Weight
from .short_forms import ShortForms

Part = Annotated[float, Field(ge=0, le=1)]
Stride = Annotated[int, Field(ge=4, le=32)]


_STRIDES = {(4, 8, 16, 32)[a:b] for a in range(4) for b in range(a + 1, 5)}


class DetectData(SegmentData):
    """Where images come from: a folder of images, or the root of a data set whose layout is known (see `detect_layouts`)."""


class BoxData(MaskData):
    """Where boxes come from: a COCO .json file, or a folder of Pascal VOC .xml or YOLO .txt files; see `detect_formats`."""


class DetectLoss(Section):
    """`loss=giou` is short for `loss.box=giou`."""

    box: Literal["smooth_l1", "iou", "giou", "diou", "ciou"] | None = None
    """Default: giou for fcos, smooth_l1 for the others. Of fasterrcnn it is the second stage's; proposals have smooth_l1."""
    weight: Weight = 1.0
    """Of the box loss beside the others."""
    beta: Weight = 1 / 9
    """Where smooth_l1 turns from a square to a line."""
    gamma: Weight | None = None
    """Of the focal loss. Default: 2; for fasterrcnn 0, which is cross-entropy."""
    alpha: Part | None = 0.25
    """Of the focal loss: the weight of positives; null: none. Not for fasterrcnn, whose classes exclude each other."""


class DetectSettings(ShortForms):
    """`selfsup eval detect`."""

    SHORT_FORMS: ClassVar[dict[str, str]] = {"boxes": "path", "loss": "box"}
    """`boxes=X` is short for `boxes.path=X`, `loss=giou` for `loss.box=giou`, besides the usual ones."""

    data: DetectData = DetectData()
    boxes: BoxData = BoxData()
    classes: Annotated[tuple[str, ...], Many, Field(min_length=1)] | None = None
    """Names ('a,b,c'), or a text file with a name a line. Default: COCO's categories; all names in .xml files; classes.txt."""
    bad_boxes: Literal["stop", "skip"] = "stop"
    """A box without an area or outside its image is named and nothing is done, or it is left out and counted."""
    voc_origin: Literal[0, 1] = 1
    """The first pixel's number in .xml files: 1 in Pascal VOC, 0 by many tools."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Without a val set: this seeded part of the images is val."""
    max_train: Positive | None = None
    max_val: Positive | None = None
    """At most so many images (a seeded choice)."""
    detector: Literal["fcos", "retinanet", "fasterrcnn"] = "fcos"
    trunk: Literal["frozen", "finetune"] = "frozen"
    strides: Annotated[tuple[Stride, ...], Many, Field(min_length=1)] | None = None
    """Of the maps that the feature pyramid joins. Default: 8, 16, 32 (and from them 64, 128); fasterrcnn 4 to 32 (64)."""
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 256
    """Channels of the feature pyramid and of the heads."""
    anchor: Rate | None = None
    """Side of the smallest anchor over the stride. Default: 4; fasterrcnn 8. fcos has none."""
    confidence: Literal["score", "centerness", "iou", "varifocal"] | None = None
    """What ranks the boxes, see `detect_heads`. Default: centerness for fcos, score for the others."""
    confidence_power: Part = 0.5
    """Of confidence=iou and centerness: score^a * quality^(1 - a)."""
    size: Positive | None = None
    """The shorter side of images. Default: the backbone's input, or the run's global crops."""
    max_size: Positive | None = None
    """The longer side is at most this, and images are filled up to squares of it. Default: size * 5 / 3."""
    scale: Annotated[tuple[Rate, ...], Many, Field(min_length=2, max_length=2)] = (0.8, 1.25)
    """Training: `size` and `max_size` times a number between these."""
    flip: Part = 0.5
    """Training: probability of a mirror image."""
    augment: bool = True
    """False: no random scale and flip."""
    steps: Positive | None = None
    epochs: Rate | None = None
    """Default: 24 epochs, but at least 300 steps."""
    batch: Annotated[int, Field(ge=1, le=10**6)] = 8
    lr: Rate | None = None
    """Default: 1e-3; 1e-4 with trunk=finetune."""
    weight_decay: Weight = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """With trunk=finetune: the rate of each layer times this for each one above it."""
    warmup: Duration = "5%"
    clip: Rate | None = 1.0
    """Of the norm of the gradients; null: none."""
    loss: DetectLoss = DetectLoss()
    threshold: Part = 0.05
    """Boxes of a lower score are not given out."""
    nms: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Of two boxes of one class with this IoU or more the one with the lower score is left out."""
    detections: Positive = 100
    """At most so many boxes an image; COCO's figures look at 100."""
    pictures: Annotated[int, Field(ge=0, le=64)] = 8
    """Rows of the sheet image | truth | prediction."""
    shown: Part = 0.3
    """Boxes of at least this score are drawn there."""
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: Annotated[int, Field(ge=0)] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "DetectSettings":
        if (self.data.val is None) != (self.boxes.val is None) and self.boxes.path is not None:
            raise ValueError("data.val and boxes.val go together: give both, or none for a seeded split")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: the smaller first")
        if self.size is not None and self.max_size is not None and self.max_size < self.size:
            raise ValueError(f"max_size={self.max_size} is smaller than size={self.size}")
        if self.strides is not None and tuple(self.strides) not in _STRIDES:
            raise ValueError(f"strides={list(self.strides)}: a part of 4,8,16,32 without gaps is needed")
        if self.detector == "fasterrcnn" and self.confidence not in (None, "score"):
            raise ValueError(
                f"confidence={self.confidence}: detector=fasterrcnn has score alone; use fcos or retinanet"
            )
        if self.detector == "retinanet" and self.confidence == "centerness":
            raise ValueError("confidence=centerness belongs to detector=fcos; retinanet has score, iou and varifocal")
        return self

    def complete(self) -> "DetectSettings":
        """What was left to the detector, filled in."""
        fcos, faster = self.detector == "fcos", self.detector == "fasterrcnn"
        loss = self.loss.model_copy(
            update={
                "box": self.loss.box or ("giou" if fcos else "smooth_l1"),
                "gamma": self.loss.gamma if self.loss.gamma is not None else 0.0 if faster else 2.0,
            }
        )
        filled = {
            "loss": loss,
            "strides": self.strides or ((4, 8, 16, 32) if faster else (8, 16, 32)),
            "anchor": self.anchor or (8.0 if faster else 1.0 if fcos else 4.0),
            "confidence": self.confidence or ("centerness" if fcos else "score"),
        }
        return self.model_copy(update=filled)
