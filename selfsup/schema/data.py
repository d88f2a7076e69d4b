"""Keys of the images: `data`, `mix`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from selfsup.schema.kinds import Duration, Level, Positive, Probability, Range, Section, ValueRange


class DataConfig(Section):
    """Where images come from and how their values are read."""

    path: str = "demo"
    """Folder, file list (.txt), stack (.npy), `torchvision:NAME:ROOT`, `timm:NAME:ROOT`, or `demo` (bundled Fashion-MNIST)."""
    val: str | None = None
    classes: Positive | None = None
    """Of the labels 0, 1, 2, ...; default: as many as the data has, where the method learns from labels."""
    mean: tuple[float, ...] | None = None
    """Per channel, of values in [0, 1]. Default: ImageNet's for 3 channels, else 0.5."""
    std: tuple[float, ...] | None = None
    value_range: ValueRange | None = None
    """(low, high) of images that are not 8 bit, or one pair a channel; default by type: uint16 0..65535, float 0..1. What lies
    outside is cut; `selfsup stats DATA` proposes one."""
    depth: Literal[8, 16] = 8
    """Bits that the value range is divided into: crops move as so many."""
    background: tuple[Level, Level, Level] = (255, 255, 255)
    """Red, green and blue under transparent pixels, unless alpha is a channel (backbone.in_chans=4)."""
    copies: Positive = 1
    """Repeated augmentation (Hoffer et al., 2020): so many copies of an image follow one another in the batches, each augmented
    in its own way. An epoch stays as long, and sees so many times fewer images; the next ones see those that are left."""
    frames: Positive | None = None
    """Of a clip: `path` then names videos, which are folders of frames or video files, and backbones are those of clips
    (timesformer); null: images."""
    stride: Positive = 1
    """From one frame of a clip to the next; a video that is too short lowers it."""
    clips: Positive = 1
    """Of each video, evenly spaced, in evaluations of features, which average them; 1: the middle one."""
    percentiles: Range = (0.5, 99.5)
    """Of volumes without value_range: levels begin and end at these percentiles of each volume and channel."""
    channel: Annotated[int, Field(ge=0)] | None = None
    """Of volumes with a fourth axis: this entry of it, as a volume of one channel."""
    spacing: tuple[float, float, float] | None = None
    """Of volumes in NIfTI files: resampled to so many millimetres a voxel (depth, height, width); null: as they are."""
    max_pixels: Positive = 100_000_000
    """Images with more pixels are refused before decoding."""
    max_bad_fraction: Probability = 0.05
    """Stop when more than this part of the images seen (and at least 10) could not be read."""


class MixConfig(Section):
    """Several images, and their labels, mixed into one; by methods that learn from labels.

    Partners are drawn inside groups of neighbouring places of the global batch, and a micro-batch holds whole groups: so it
    does not matter on how many processes, or in how many pieces, a global batch is computed.
    """

    name: Literal["none", "mixup", "cutmix", "mixup+cutmix", "ricap"] = "none"
    mixup_alpha: Annotated[float, Field(gt=0)] = 0.8
    """lambda is drawn from Beta(alpha, alpha); 0.2 is the paper's value for ImageNet, 0.8 that of DeiT."""
    cutmix_alpha: Annotated[float, Field(gt=0)] = 1.0
    ricap_alpha: Annotated[float, Field(gt=0)] = 0.3
    """The boundary of RICAP's four pieces is drawn from it, along each axis."""
    switch: Probability = 0.5
    """Of mixup+cutmix: how often it is CutMix."""
    probability: Probability = 1.0
    """How often anything is mixed."""
    mode: Literal["batch", "group"] = "batch"
    """One draw of lambda, box or boundary for the whole global batch, or one for each group."""
    group: Annotated[int, Field(ge=2, le=4096)] = 8
    """Neighbouring images that are mixed with one another."""
    until: Duration | None = None
    """Nothing is mixed from here on; null: to the end."""

    @property
    def images(self) -> int:
        """How many go into one."""
        return {"none": 1, "ricap": 4}.get(self.name, 2)

    @model_validator(mode="after")
    def _check(self) -> "MixConfig":
        if self.group < self.images:
            raise ValueError(f"group={self.group}: {self.name} mixes {self.images} images; give {self.images} or more")
        return self
