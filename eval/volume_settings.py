"""Keys of `selfsup eval segment3d`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from selfsup.config import Duration, Positive, Range, Section, ValueRange

from .many import Many
from .segment_settings import Id, MaskData, Rate, Weight
from .short_forms import ShortForms


class VolumeData(Section):
    """Volumes and how their values are read (see selfsup/data/volumes.py); what is not given is the run's."""

    path: str | None = None
    val: str | None = None
    value_range: ValueRange | None = None
    percentiles: Range | None = None
    channel: Annotated[int, Field(ge=0)] | None = None
    spacing: tuple[float, float, float] | None = None
    max_pixels: Positive | None = None


class Segment3dSettings(ShortForms):
    """`selfsup eval segment3d`."""

    SHORT_FORMS: ClassVar[dict[str, str]] = {"masks": "path"}
    """`masks=X` is short for `masks.path=X`, besides the usual ones."""

    data: VolumeData = VolumeData()
    masks: MaskData = MaskData()
    classes: Annotated[tuple[str, ...], Many, Field(min_length=1)] | Positive | None = None
    """How many, or their names ('background,grey,white'). Default: the largest id in the masks + 1."""
    ignore: Id | None = 255
    """This id in a mask is neither trained nor counted; null: none."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Without a val set: this seeded part of the volumes is val."""
    trunk: Literal["frozen", "finetune"] = "frozen"
    width: Positive = 16
    """Channels of the decoder at the finest size, and so many times 2, 4, ... below (UNETR's code: 16)."""
    size: Positive | None = None
    """Height and width of the crops and of the windows of the test, in voxels. Default: what the backbone was built for."""
    depth: Positive | None = None
    """Slices of them. Default: as `size`, or what the backbone was built for."""
    foreground: Annotated[float, Field(ge=0, le=1)] = 0.5
    """This part of the crops has a voxel of a class other than 0 in its middle; the others lie anywhere."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Training: probability of a mirror image, for each axis."""
    intensity: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Training: values times a number from 1 - intensity to 1 + intensity, and shifted by up to so much of the window."""
    steps: Positive = 1000
    batch: Positive = 2
    lr: Rate | None = None
    """Default: 1e-3; 1e-4 with trunk=finetune."""
    weight_decay: Weight = 1e-5
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """With trunk=finetune: the rate of each layer times this for each one above it."""
    warmup: Duration = "5%"
    clip: Rate | None = 1.0
    """Of the norm of the gradients; null: none."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of neighbouring windows in the test, along each axis; their logits are averaged with a Gaussian weight."""
    windows: Positive = 4
    """So many at a time."""
    hausdorff: bool = False
    """Also the 95th percentile of the distance between surfaces: millimetres, or voxels where a file has no spacing."""
    pictures: Annotated[int, Field(ge=0, le=16)] = 2
    """Volumes on the sheet, each as three slices image | truth | prediction."""
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: Annotated[int, Field(ge=0)] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "Segment3dSettings":
        if (self.data.val is None) != (self.masks.val is None):
            raise ValueError("data.val and masks.val go together: give both, or none for a seeded split")
        return self
