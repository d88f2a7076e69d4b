"""Keys of `selfsup eval segment`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from selfsup.config import Duration, Positive, Section, ValueRange

from .many import Many
from .short_forms import ShortForms

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Head = Literal["linear", "multilayer", "mlp", "upernet", "unetr"]
Id = Annotated[int, Field(ge=0, le=65535)]


class SegmentData(Section):
    """Where images come from: folders of images, or the root of a data set whose layout is known (see `segment_layouts`)."""

    path: str | None = None
    val: str | None = None
    value_range: ValueRange | None = None
    """To the 8 bits that segmentation works on."""
    max_pixels: Positive = 100_000_000


class MaskData(Section):
    """Where masks come from; not for the known layouts, which hold their own."""

    path: str | None = None
    val: str | None = None


class SegmentLoss(Section):
    """The sum of cross-entropy, focal and Dice losses with these weights. `loss=ce|focal|dice|ce+dice` sets them to 1 and 0."""

    name: Literal["ce", "focal", "dice", "ce+dice", "focal+dice"] | None = None
    ce: Weight = 1.0
    focal: Weight = 0.0
    dice: Weight = 0.0
    gamma: Weight = 2.0
    """Of the focal loss."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            return values
        chosen = values["name"].split("+")
        return {**{key: float(key in chosen) for key in ("ce", "focal", "dice")}, **values}

    @model_validator(mode="after")
    def _check(self) -> "SegmentLoss":
        if self.ce == self.focal == self.dice == 0:
            raise ValueError("every weight is 0; give one of loss.ce, loss.focal, loss.dice a weight")
        return self


class SegmentSettings(ShortForms):
    """`selfsup eval segment`."""

    SHORT_FORMS: ClassVar[dict[str, str]] = {"masks": "path", "loss": "name"}
    """`masks=X` is short for `masks.path=X`, `loss=dice` for `loss.name=dice`, besides the usual ones."""

    data: SegmentData = SegmentData()
    masks: MaskData = MaskData()
    layout: Literal["auto", "pairs", "voc", "ade20k", "cityscapes", "coco-stuff"] = "auto"
    classes: Annotated[tuple[str, ...], Many, Field(min_length=1)] | Positive | str | None = None
    """How many, their names ('a,b,c'), or a text file with a name a line. Default: the layout's; else the largest id + 1."""
    ids: Annotated[tuple[Id, ...], Many, Field(min_length=1)] | None = None
    """Ids in the masks, in the order of the classes, where they are not 0, 1, 2, ...: ids=0,255 for black and white masks."""
    ignore: Id | None = 255
    """This id in a mask is neither trained nor counted; null: none."""
    reduce_zero_label: bool | None = None
    """Id 0 is ignored and the others are one less. Default: only for the layout ade20k."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Without a val set: this seeded part of the images is val."""
    max_train: Positive | None = None
    max_val: Positive | None = None
    """At most so many images (a seeded choice)."""
    head: Head = "linear"
    trunk: Literal["frozen", "finetune"] = "frozen"
    width: Positive | None = None
    """Channels of the heads mlp, upernet and unetr. Default: 256 (unetr: 64)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Before the last layer. Default: 0.1 for mlp, upernet and unetr, 0 for linear and multilayer."""
    size: Positive | None = None
    """Side of the training crops, and of the test's windows. Default: the backbone's input, or the run's global crops."""
    scale: Annotated[tuple[Rate, ...], Many, Field(min_length=2, max_length=2)] = (0.5, 2.0)
    """Training: the shorter side becomes `size` times a number between these."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Training: probability of a mirror image."""
    augment: bool = True
    """False: no random scale, crop and flip, but the centre at scale 1; a frozen trunk then sees each image once."""
    steps: Positive | None = None
    epochs: Rate | None = None
    """Default: 40 epochs, but at least 300 steps."""
    batch: Annotated[int, Field(ge=2, le=10**6)] = 16
    lr: Rate | None = None
    """Default: 1e-3; 1e-4 with trunk=finetune."""
    weight_decay: Weight = 0.01
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """With trunk=finetune: the rate of each layer times this for each one above it."""
    warmup: Duration = "5%"
    clip: Rate | None = 1.0
    """Of the norm of the gradients; null: none."""
    loss: SegmentLoss = SegmentLoss()
    class_weights: Literal["none", "balanced"] | Annotated[tuple[Weight, ...], Many] = "none"
    """balanced: median frequency of the classes in the training masks over their own (Eigen & Fergus, 2015, 6.3.2)."""
    inference: Literal["slide", "whole"] = "slide"
    """Windows of `size` that overlap by a third, or the whole image at once; its shorter side is `size` in both."""
    test_scales: Annotated[tuple[Rate, ...], Many, Field(min_length=1)] = (1.0,)
    """Probabilities are averaged over these scales; [0.5, 0.75, 1, 1.25, 1.5, 1.75] is the usual set."""
    test_flip: bool = False
    """Averaged with those of the mirror image."""
    boundary: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Width of the boundary, as a part of the image's diagonal (Cheng et al., 2021)."""
    pictures: Annotated[int, Field(ge=0, le=64)] = 8
    """Rows of the sheet image | truth | prediction."""
    predictions: str | None = None
    """Folder for the predicted masks of the val images; with a trained model as TARGET, of all images, masks or not."""
    save_every: Positive | None = None
    """Steps between two saves of the training's state. Default: about a minute. A signal to stop saves as well."""
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: Annotated[int, Field(ge=0)] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "SegmentSettings":
        if (self.data.val is None) != (self.masks.val is None) and self.masks.path is not None:
            raise ValueError("data.val and masks.val go together: give both, or none for a seeded split")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: the smaller first")
        if self.ids is not None and len(set(self.ids)) < len(self.ids):
            raise ValueError(f"ids={list(self.ids)}: one is given twice")
        if self.ids is not None and self.ignore in self.ids:
            raise ValueError(f"ids={list(self.ids)} holds the id that is ignored; give ignore=null or another one")
        return self
