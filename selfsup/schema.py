"""The schema of a configuration: frozen sections that refuse keys they do not know, with every default.

`selfsup.config` reads, merges, explains and writes them, and gives out these names as well.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from selfsup.errors import UserError

# `data=X` is short for `data.path=X`, and so on.
SHORT_FORMS = {
    "data": "path",
    "method": "name",
    "optimizer": "name",
    "backbone": "name",
    "mix": "name",
    "init_from": "path",
    "teacher": "path",
}

_DURATION = re.compile(r"^(\d+(?:\.\d+)?)\s*(%|epochs?|steps?|samples?)$")


def _check_duration(value: str) -> str:
    match = _DURATION.match(value)
    if match is None or float(match.group(1)) > 1e15:
        raise ValueError("a duration looks like '10 epochs', '500 steps', '100000 samples' or '10%'")
    return value


def parse_duration(value: str) -> tuple[float, str]:
    """'10 epochs' -> (10.0, 'epoch'); units are '%', 'epoch', 'step', 'sample'."""
    match = _DURATION.match(value)
    if match is None:
        raise UserError(f"not a duration: {value!r}; write '10 epochs', '500 steps', '100000 samples' or '10%'")
    return float(match.group(1)), match.group(2).rstrip("s")


Duration = Annotated[str, AfterValidator(_check_duration)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0, le=10**15)]
Range = tuple[float, float]


def _rising(value: Any) -> Any:
    """Two numbers low < high, or such a pair a channel."""
    pairs = [value] if value and not isinstance(value[0], tuple) else list(value)
    if not pairs or any(not low < high for low, high in pairs):
        raise ValueError("a value range is two numbers, low < high, or one such pair a channel")
    return value


ValueRange = Annotated[Range | tuple[Range, ...], AfterValidator(_rising)]
Level = Annotated[int, Field(ge=0, le=255)]
Shortcut = Literal["packed", "cls", "prototypes", "heap"]


class Section(BaseModel):
    """A frozen group of keys that refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, validate_default=True, allow_inf_nan=False
    )


class OpenSection(BaseModel):
    """A frozen group whose further keys are checked by their owner (a method, timm)."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        """The keys that are not fields of this section."""
        return dict(self.__pydantic_extra__ or {})


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


class Crops(Section):
    """One kind of view: how many, how large, and what happens to them.

    A probability given as a list holds one value a view (DINO blurs its two global views with p = 1.0 and 0.1).
    """

    count: Annotated[int, Field(ge=0)] = 2
    size: Positive = 224
    """Pixels, square."""
    scale: Range = (0.4, 1.0)
    """Area of the crop as a fraction of the image."""
    ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio, width / height."""
    frames: Positive | None = None
    """Of a clip of this kind of views; null: data.frames. Local clips may be shorter in time as well as in space."""
    stride: Positive | None = None
    """From one frame to the next; null: data.stride."""
    slices: Positive | None = None
    """Of a crop of volumes; null: as many as `size`."""
    extent: Range | None = None
    """Of volumes: a crop covers so many times its own voxels along each axis, whatever scale and ratio are, and [1, 1] cuts it
    without resampling; null: scale and ratio, as parts of the volume."""
    dflip: Probability = 0.0
    """Of volumes: flips along the depth."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Of images; volumes are resampled trilinearly."""
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    jitter: Probability | tuple[Probability, ...] = 0.8
    """Probability that colour is jittered at all."""
    brightness: Annotated[float, Field(ge=0)] = 0.4
    contrast: Annotated[float, Field(ge=0)] = 0.4
    saturation: Annotated[float, Field(ge=0)] = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    grayscale: Probability | tuple[Probability, ...] = 0.2
    blur: Probability | tuple[Probability, ...] = 0.5
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the Gaussian in pixels."""
    solarize: Probability | tuple[Probability, ...] = 0.0
    solarize_threshold: Level = 128
    policy: Literal["none", "randaugment", "autoaugment", "trivialaugment"] = "none"
    """Drawn operations on the crop before all others; for 1 or 3 channels."""
    policy_probability: Probability = 1.0
    """Part of the crops that get one."""
    policy_ops: Annotated[int, Field(ge=1, le=14)] = 2
    """Of RandAugment: operations one after another, N."""
    policy_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Of RandAugment: their strength, M."""
    policy_table: Literal["imagenet", "cifar10", "svhn"] = "imagenet"
    """Of AutoAugment: the data set on which it was found."""
    policy_fill: Level | tuple[Level, ...] = 128
    """Where an operation leaves nothing: a level, or one a channel."""
    policy_interpolation: Literal["nearest", "bilinear"] = "bilinear"
    lighting: Annotated[float, Field(ge=0)] = 0.0
    """PCA colour noise (Krizhevsky et al., 2012; their value is 0.1): standard deviation; for 3 channels."""
    erase: Probability | tuple[Probability, ...] = 0.0
    """Random erasing (Zhong et al., 2020): probability."""
    erase_area: Range = (0.02, 0.33)
    """Of the box, as a fraction of the crop."""
    erase_ratio: Range = (0.3, 3.3)
    """Height / width."""
    erase_fill: Literal["zero", "noise", "mean"] = "zero"
    """zero: the data's mean; noise: normal, for each pixel and channel; mean: the crop's own mean colour."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Cutout (DeVries and Taylor, 2017): pixels along the side of a square set to the data's mean; 0: none."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """By up to so many degrees either way, before colours change; as are the next four."""
    translate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """By up to this fraction of width and height."""
    zoom: Range = (1.0, 1.0)
    """Times; below 1 smaller."""
    shear: Annotated[float, Field(ge=0, le=80)] = 0.0
    """By up to so many degrees along each axis."""
    affine: Probability = 1.0
    """Of rotation, translation, zoom and shear together."""
    fill: Literal["constant", "edge", "reflect", "symmetric", "wrap"] = "constant"
    """What they show beyond the image, as of numpy.pad."""
    fill_level: Level | None = None
    """Of constant fill; null: the data's mean."""
    style: Literal["none", "fourier", "statistics"] = "none"
    """Of another image of the data: its low frequencies' amplitudes (FDA; Yang & Soatto, 2020), or each channel's mean and
    standard deviation (AdaIN of pixels; Huang & Belongie, 2017)."""
    style_probability: Probability = 1.0
    fourier_beta: Range = (0.005, 0.03)
    """The highest frequency that is taken, as a part of the shorter side."""
    module: str | None = None
    """`package.module:Class`, an image-to-image network for values in [0, 1], used as it is, before colours change."""
    module_probability: Probability = 1.0
    noise: Probability = 0.0
    """Gaussian noise on each value, last of all but salt and pepper."""
    noise_std: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]] = (0.0, 20.0)
    """Its standard deviation in levels of 255."""
    salt_pepper: Probability = 0.0
    """Some pixels become white or black."""
    salt_pepper_part: tuple[Probability, Probability] = (0.0, 0.05)

    @model_validator(mode="after")
    def _check(self) -> "Crops":
        for key in ("scale", "ratio", "blur_sigma", "erase_area", "erase_ratio", "zoom", "fourier_beta", "extent"):
            low, high = getattr(self, key) or (1, 1)
            if not 0 < low <= high:
                raise ValueError(f"{key} must be two numbers, 0 < low <= high; seen ({low}, {high})")
        for key in ("scale", "erase_area"):
            if getattr(self, key)[1] > 1:
                raise ValueError(f"{key} is a fraction of the image's area, at most 1; seen {getattr(self, key)}")
        for key in ("noise_std", "salt_pepper_part"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key} must be two numbers, low <= high; seen ({low}, {high})")
        if self.fourier_beta[1] > 0.45:
            raise ValueError(f"fourier_beta is a part of the shorter side, at most 0.45; seen {self.fourier_beta}")
        if self.cutout > self.size:
            raise ValueError(f"cutout={self.cutout} is larger than the crop of {self.size} pixels")
        for key in ("jitter", "grayscale", "blur", "solarize", "erase"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != self.count:
                raise ValueError(
                    f"{key} holds {len(value)} probabilities for {self.count} views; give one a view, or one for all"
                )
        return self

    def highest(self, key: str) -> float:
        """The largest probability `key` of any view."""
        value = getattr(self, key)
        return max(value) if isinstance(value, tuple) else value

    @property
    def shape(self) -> int | tuple[int, int, int]:
        """`size`, or of volumes (depth, height, width) where the depth is another."""
        return self.size if self.slices is None else (self.slices, self.size, self.size)

    def probability(self, key: str, view: int) -> float:
        """The probability `key` of the view with this index."""
        value = getattr(self, key)
        return value[view] if isinstance(value, tuple) else value


class ViewsConfig(Section):
    """Multi-crop (Caron et al., 2020, SwAV, section 3.3; the values of DINO's published code)."""

    global_: Crops = Field(default=Crops(blur=(1.0, 0.1), solarize=(0.0, 0.2)), alias="global")
    local: Crops = Crops(count=8, size=96, scale=(0.05, 0.4))

    def colour_keys(self) -> list[str]:
        """What is on, but is for images of three channels alone."""
        kinds = [crops for crops in (self.global_, self.local) if crops.count]
        jittered = [c for c in kinds if c.highest("jitter") > 0]
        found = [key for key in ("saturation", "hue") if any(getattr(c, key) for c in jittered)]
        return found + (["grayscale"] if any(c.highest("grayscale") > 0 for c in kinds) else [])

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, values: Any) -> Any:
        """A kind of which some keys are given keeps its own defaults for the others, not those of `Crops`."""
        if not isinstance(values, Mapping):
            return values
        out = dict(values)
        for name, field in cls.model_fields.items():
            for key in (name, field.alias):
                if isinstance(given := out.get(key), Mapping):
                    out[key] = {**field.default.model_dump(), **given}
        return out


class BackboneConfig(OpenSection):
    """A backbone by its timm name, or mit_b0 to mit_b5; every other key is an option of timm's `create_model`.

    Of ResNets besides: deformable=[3, 4], deformable_modulated (see `backbones/deformable.py`).
    """

    name: str = "vit_small_patch16_224"
    pos_interp: Literal["size", "timm", "dino"] = "timm"
    """How position embeddings meet another image size: bicubic by size, timm's (antialiased), or DINO's by scale factor."""
    in_chans: Positive = 3
    pretrained: bool = False
    init: Literal["default", "xavier"] = "default"
    """Of weights that are not pretrained: timm's own, or uniform of Glorot & Bengio, 2010, equation 16, with zero biases."""

    @model_validator(mode="after")
    def _check_init(self) -> "BackboneConfig":
        if self.pretrained and self.init != "default":
            raise ValueError(
                f"init={self.init} would undo pretrained=true; leave out one of backbone.init and backbone.pretrained"
            )
        return self


class MethodConfig(OpenSection):
    """A method by name, or `package.module:Class`; its options are checked by its own schema."""

    name: str = "dino"


class TeacherConfig(Section):
    """A frozen network to learn from, for methods that take one (distill, deit)."""

    path: str | None = None
    """Run, RUN@student, checkpoint, exported folder, weights file, timm name, or `package.module:function`."""
    pretrained: bool = True
    """Of a timm name: with its published weights; there is no other way to learn from it."""
    size: Positive | None = None
    """Pixels at which it sees the student's views; null: those it was built for."""
    mean: tuple[float, ...] | None = None
    """Per channel, of values in [0, 1]; null: as its files say, or as the student's."""
    std: tuple[float, ...] | None = None
    cache: str | None = None
    """Folder in which its outputs are kept, in half precision, and found again."""
    cache_epochs: Positive = 1
    """With a cache, the augmentation repeats after so many epochs."""
    cache_topk: Positive | None = None
    """With a cache, keep the largest k logits and the mass of the others; null: all of them."""

    @model_validator(mode="after")
    def _check(self) -> "TeacherConfig":
        if self.cache is None and (self.cache_epochs != 1 or self.cache_topk is not None):
            raise ValueError("cache_epochs and cache_topk are of a cache; give teacher.cache=FOLDER as well")
        return self


class OptimizerConfig(Section):
    """Optimizer, its schedules, regularisation of weights, and clipping."""

    name: Literal["adamw", "sgd", "lars", "lamb", "adafactor", "adabound"] = "adamw"
    lr: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate as it is used; default: base_lr * global_batch / 256."""
    base_lr: Annotated[float, Field(gt=0)] = 5e-4
    min_lr: Annotated[float, Field(ge=0)] = 1e-6
    """Where the schedule ends; 0 for a cool-down to zero."""
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    """After the warm-up: down to min_lr by half a cosine or a line; at the peak; or times step_factor at each milestone."""
    warmup: Duration = "10%"
    warmup_kind: Literal["gradual", "constant"] = "gradual"
    """Rise to the peak in a line, or stay low and then jump (Goyal et al., 2017, section 2.2)."""
    warmup_factor: Probability | None = None
    """Of the peak, where a gradual warm-up begins (default 0) and a constant one stays (default 0.1)."""
    cooldown: Duration = "0%"
    """In a line to min_lr over the last so many steps, from a constant or step schedule (Zhai et al., 2022, section 3.5)."""
    milestones: tuple[Duration, ...] = ()
    """Of schedule=step, from the beginning of the run: ["30 epochs", "60 epochs", "80 epochs"]."""
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.04
    weight_decay_end: Annotated[float, Field(ge=0)] | None = 0.4
    """Cosine from weight_decay to this; null keeps it constant."""
    head_weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Of what is not the backbone; null: as the backbone's. A stronger one helps few-shot transfer (Zhai et al., 2022, 3.1)."""
    head_weight_decay_end: Annotated[float, Field(ge=0)] | None = None
    """Cosine from head_weight_decay to this; null keeps it constant."""
    decay_all: bool = False
    """Decay biases and norms too; false leaves them alone (He et al., 2019, "Bag of Tricks", section 3.1)."""
    decoupled: bool | None = None
    """Weight decay shrinks the weights by lr * decay (Loshchilov & Hutter, 2019), or is an L2 term's gradient, which momentum
    and scaling see. null: as the optimizer's paper has it, that is decoupled for adamw and adafactor, L2 for sgd, lars and
    adabound; lamb adds it to the update that the trust ratio scales. adamw with false is Adam."""
    l1: Annotated[float, Field(ge=0)] = 0.0
    """Times sign(w), added to the clipped gradients of the weights that are decayed."""
    clip: Annotated[float, Field(gt=0)] | None = 3.0
    clip_mode: Literal["parameter", "global"] = "parameter"
    """Clip each parameter's gradient norm (DINO's code) or the norm over all."""
    momentum: Probability = 0.9
    """Of sgd and lars."""
    nesterov: bool = False
    """Of sgd and lars."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Of adamw, lamb, adabound; of adafactor its momentum, and the limit that the decay of its second moment grows to."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Not of adafactor, which adds 1e-30 to squared gradients."""
    momentum_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of adafactor (Zhai et al., 2022, section 3.4)."""
    final_lr: Annotated[float, Field(gt=0)] = 0.1
    """Of adabound: the rate of SGD that its bounds close on, at the peak; it follows the schedule as lr does."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        fixed = {"adafactor": True, "sgd": False, "lars": False}.get(self.name)
        if fixed is not None and self.decoupled not in (None, fixed):
            kind = "decoupled" if fixed else "L2"
            raise ValueError(f"decoupled={self.decoupled}: weight decay of {self.name} is {kind}; leave it out")
        if self.nesterov and not self.momentum and self.name in ("sgd", "lars"):
            raise ValueError("nesterov=true needs optimizer.momentum above 0, as in 0.9")
        if self.head_weight_decay_end is not None and self.head_weight_decay is None:
            raise ValueError("head_weight_decay_end needs optimizer.head_weight_decay, where it starts")
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"schedule={self.schedule} with {len(self.milestones)} milestones: they go together, as in "
                "optimizer.schedule=step optimizer.milestones=['30 epochs','60 epochs']"
            )
        if parse_duration(self.cooldown)[0] and self.schedule in ("cosine", "linear"):
            raise ValueError(
                f"cooldown={self.cooldown!r}: schedule={self.schedule} comes down by itself; use schedule=constant or step"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and which stay."""

    every: Positive = 250
    """Steps."""
    keep_last: Positive = 2
    keep_every: Positive | None = None
    """Also keep, for good, those of steps divisible by this."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Also keep so many with the best top-1, of what tells classes or else of the k-NN; evaluations then end with a save.
    Needs eval.every."""


class EvalConfig(Section):
    """Labelled data for evaluation during and after training."""

    every: Positive | None = None
    """k-NN every so many steps; null: only when asked for."""
    train: str | None = None
    val: str | None = None
    k: tuple[Positive, ...] = (20,)
    temperature: Annotated[float, Field(gt=0)] = 0.07
    max_train: Positive | None = 20_000
    """At most this many bank images in evaluations during training (a seeded choice)."""
    as_jobs: bool = False
    """Evaluations of `every` run as separate jobs beside the training, where it was submitted; figures in RUN/eval/step_*."""


class EarlyStopConfig(Section):
    """Ending a run whose evaluations get no better (Prechelt, 1998)."""

    patience: Positive | None = None
    """So many evaluations in a row without a new best end the run, as done; null: none does. Needs eval.every."""
    metric: str | None = None
    """A figure of the evaluations; null: top1 where something tells classes, else knn_top1."""
    mode: Literal["max", "min"] = "max"
    """Whether larger or smaller is better."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A new best is better by more than this."""


class InitConfig(Section):
    """Starting from a run or a published checkpoint."""

    path: str | None = None
    heads: Literal["load", "fresh"] = "fresh"
    head_only: Duration | None = None
    """Train the heads alone for this long at first."""


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


class SpikeConfig(Section):
    """What to do about a loss that jumps: go back to the last checkpoint and leave the batch out (PaLM, section 5.1)."""

    factor: Annotated[float, Field(gt=1)] | None = None
    """A loss above so many times the median of the last `window` steps is a spike; null: none is."""
    window: Annotated[int, Field(ge=8)] = 64
    """Steps."""
    skip: Positive = 1
    """Batches left out: the spiking one and those before it, as far as the checkpoint does not hold them."""
    max_rollbacks: Positive = 3
    """Stop at one more."""


class Config(Section):
    """Everything a training run depends on."""

    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = MethodConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mix: MixConfig = MixConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    init_from: InitConfig = InitConfig()
    spike: SpikeConfig = SpikeConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, le=1e9)] | None = None
    samples: Positive | None = None
    global_batch: Positive = 64
    accumulate: Positive = 1
    """Micro-batches per step on every rank."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp64"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool | None = None
    """Bitwise repeatable kernels; null: yes on a CPU, no on CUDA."""
    parallel: Literal["ddp"] = "ddp"
    compile: bool = False
    grad_checkpointing: bool = False
    shortcuts: tuple[Shortcut, ...] = get_args(Shortcut)
    """Ways to the same numbers, up to the order of sums, in less time and memory; [] computes everything as it is written
    in the papers. packed: plain ViTs take crops of all sizes through their linear layers at once, and keep less for the
    backward pass; cls: their last block computes CLS alone where only CLS is used (with packed); prototypes: the loss over
    prototypes in one function with a gradient of its own; heap: on a CPU memory that a step frees is kept for the next."""
    workers: Annotated[int, Field(ge=0)] = 2
    threads: Positive | None = None
    """Compute threads a process; null: this machine's CPUs shared among its ranks."""
    log_every: Positive = 10
    tensorboard: bool = True
    """Also write TensorBoard files, if that package is installed."""
    pictures: bool = True
    """Draw RUN/pictures/augmentations.png: the first images of the first step, as the network sees them."""
    report: bool = True
    """The command writes RUN/report.html when training is done; `selfsup report RUN` writes it at any time."""
    stop_at: Positive | None = None
    """End early at this step with exit code 75; schedules are left alone."""
    profile: bool = False
    """Write RUN/profile: a table of where a step goes, and a trace of two steps."""
    max_nonfinite: Positive = 10
    """Stop after so many steps in a row whose loss or gradients are not finite."""
    hang_timeout: Annotated[float, Field(ge=1, le=10_000_000)] = 1800
    """Seconds without progress after which a run reports who hangs, and ends; also how long ranks wait for one another."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        return expand_short_forms(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _check(self) -> "Config":
        given = [k for k in ("steps", "epochs", "samples") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of steps, epochs, samples; seen {' and '.join(given)}")
        if self.global_batch % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide global_batch={self.global_batch}")
        if self.checkpoint.keep_best and not self.eval.every:
            raise ValueError("checkpoint.keep_best needs eval.every: the best are chosen by its accuracy")
        if self.checkpoint.keep_best and self.eval.as_jobs:
            raise ValueError(
                "checkpoint.keep_best needs figures when a checkpoint is written, and those of eval.as_jobs come later; "
                "use eval.as_jobs=false or checkpoint.keep_best=0"
            )
        if self.early_stop.patience and (not self.eval.every or self.eval.as_jobs):
            raise ValueError(
                f"early_stop.patience={self.early_stop.patience} counts evaluations during training; "
                "give eval.every, and eval.as_jobs=false"
            )
        if self.teacher.cache is not None and self.teacher.cache_epochs % self.data.copies:
            raise ValueError(
                f"data.copies={self.data.copies} with teacher.cache_epochs={self.teacher.cache_epochs}: copies would be alike; "
                f"give a multiple, as in teacher.cache_epochs={self.data.copies}"
            )
        for kind, crops in (("global", self.views.global_), ("local", self.views.local)):
            if self.data.frames is None and (crops.frames or crops.stride):
                raise ValueError(f"views.{kind}.frames and .stride are of clips; give data.frames as well")
            if self.data.frames is not None and crops.style != "none":
                raise ValueError(f"views.{kind}.style={crops.style} is that of another image; clips have none (data.frames)")
        if fault := self._volume_fault():
            raise ValueError(fault)
        for key in ("mean", "std"):
            value = getattr(self.data, key)
            if value is not None and len(value) != self.backbone.in_chans:
                raise ValueError(f"data.{key} has {len(value)} values for backbone.in_chans={self.backbone.in_chans}")
        if self.data.frames is not None and self.data.depth != 8:
            raise ValueError(f"data.depth={self.data.depth}: clips (data.frames) have 8 bits; leave it out")
        channels, ranges = self.backbone.in_chans, self.data.value_range
        if ranges is not None and isinstance(ranges[0], tuple) and len(ranges) != channels:
            raise ValueError(f"data.value_range has {len(ranges)} ranges for backbone.in_chans={channels}")
        for kind, crops in (("global", self.views.global_), ("local", self.views.local)):
            if crops.policy != "none" and channels not in (1, 3):
                raise ValueError(
                    f"views.{kind}.policy={crops.policy} is for images of 1 or 3 channels; seen backbone.in_chans={channels}"
                )
            if crops.policy != "none" and self.data.depth != 8:
                raise ValueError(
                    f"views.{kind}.policy={crops.policy} works on 8 bits; use data.depth=8, or views.{kind}.policy=none"
                )
            if crops.style != "none" and self.data.depth != 8:
                raise ValueError(f"views.{kind}.style={crops.style} works on 8 bits; give data.depth=8, or style=none")
            if crops.lighting and channels != 3:
                raise ValueError(
                    f"views.{kind}.lighting={crops.lighting:g} is for images of 3 channels; seen backbone.in_chans={channels}"
                )
        return self

    @property
    def volumes(self) -> bool:
        """Whether data are volumes: the backbone says it."""
        return self.backbone.name.startswith("vit3d")

    def _volume_fault(self) -> str:
        """What is set that does not go together with volumes, or without them; '' if nothing is."""
        kinds = [(k, c) for k, c in (("global", self.views.global_), ("local", self.views.local)) if c.count]
        if not self.volumes:
            given = [f"views.{k}.{key}" for k, c in kinds for key in ("slices", "extent", "dflip") if getattr(c, key)]
            given += [f"data.{key}" for key in ("channel", "spacing") if getattr(self.data, key) is not None]
            return f"{', '.join(given)}: of volumes; use backbone=vit3d_small, or leave it out" if given else ""
        low, high = self.data.percentiles
        if not 0 <= low < high <= 100:
            return f"data.percentiles={list(self.data.percentiles)}: two numbers from 0 to 100, the smaller first"
        if self.data.spacing is not None and min(self.data.spacing) <= 0:
            return f"data.spacing={list(self.data.spacing)}: millimetres above 0"
        if self.eval.every:
            return f"eval.every={self.eval.every}: k-NN is of images; of volumes there is selfsup eval segment3d; leave it out"
        if self.data.depth != 8 or self.data.frames is not None:
            return "data.depth=16 and data.frames are not for volumes, which have 8 bits; leave them out"
        if self.mix.name != "none":
            return f"mix.name={self.mix.name}: of images; leave it out"
        refusable = ("grayscale", "blur", "lighting", "erase", "cutout", "noise", "salt_pepper", "rotate", "translate", "shear")
        refused = []
        for kind, crops in kinds:
            keys = [*refusable, *(("contrast", "saturation", "hue") if _any(crops.jitter) else ())]
            refused += [f"views.{kind}.{key}=0" for key in keys if _any(getattr(crops, key))]
            refused += [f"views.{kind}.zoom=[1,1]"] if crops.zoom != (1.0, 1.0) else []
            refused += [f"views.{kind}.{key}=none" for key in ("policy", "style") if getattr(crops, key) != "none"]
            refused += [f"views.{kind}.module=null"] if crops.module else []
        if not refused:
            return ""
        return (
            "volumes take crops, flips, jitter of brightness, and solarize; the recipes mae_vit3d and dino_vit3d leave the "
            f"others out; give {' '.join(refused)}"
        )

    @property
    def mean(self) -> tuple[float, ...]:
        """Channel means of values in [0, 1]."""
        return self.data.mean or (
            (0.485, 0.456, 0.406) if self.backbone.in_chans == 3 else (0.5,) * self.backbone.in_chans
        )

    @property
    def std(self) -> tuple[float, ...]:
        """Channel standard deviations of values in [0, 1]."""
        return self.data.std or (
            (0.229, 0.224, 0.225) if self.backbone.in_chans == 3 else (0.25,) * self.backbone.in_chans
        )


def _any(value: Any) -> bool:
    """Whether a probability, or one of several, or a strength, is above 0."""
    return any(value) if isinstance(value, tuple) else bool(value)


def expand_short_forms(values: Mapping[str, Any]) -> dict[str, Any]:
    """{'data': 'x'} -> {'data': {'path': 'x'}}."""
    out = dict(values)
    for key, inner in SHORT_FORMS.items():
        if key in out and not isinstance(out[key], (dict, BaseModel)):
            out[key] = {inner: out[key]} if out[key] is not None else {}
    return out
