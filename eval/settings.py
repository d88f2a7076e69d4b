"""Keys of the evaluation verbs: frozen, complete, refusing keys they do not know."""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from selfsup import config
from selfsup.config import Level, Positive, Probability, Section, ValueRange
from selfsup.errors import UserError

from .detect_settings import DetectSettings
from .many import Many
from .segment_settings import SegmentSettings
from .short_forms import ShortForms
from .volume_settings import Segment3dSettings

Pooling = Literal["pooled", "cls", "patchmean", "cls+patchmean"]
"""pooled: what the backbone itself returns; cls: the class token; patchmean: mean over patches or map cells; both."""

_LAYER = re.compile(r"^last[1-9]\d*$")


def _as_layer(value: Any) -> Any:
    return int(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value) else value


def _check_layer(value: int | str) -> int | str:
    if isinstance(value, str) and not _LAYER.match(value):
        raise ValueError("a layer is an index (-1 is the last) or 'last4' for the last four, concatenated")
    return value


Layer = Annotated[int | str, BeforeValidator(_as_layer), AfterValidator(_check_layer)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LabelledData(Section):
    """Labelled sets by name (see `data`)."""

    train: str | None = None
    val: str | None = None


class EvalData(Section):
    """Where images come from; what is not given is taken from the run's configuration."""

    path: str | None = None
    val: str | None = None
    value_range: ValueRange | None = None
    max_pixels: Positive | None = None
    depth: Literal[8, 16] | None = None
    background: tuple[Level, Level, Level] | None = None
    frames: Positive | None = None
    """Of a clip; default: the run's, or those the backbone was built for, where it takes clips."""
    stride: Positive | None = None
    clips: Positive | None = None
    """Of each video, evenly spaced, whose features are averaged; default: the run's, else the middle one alone."""


class ImageSettings(ShortForms):
    """Keys shared by every verb: which images, how they are read, and by what."""

    data: EvalData = EvalData()
    eval: LabelledData = LabelledData()
    max_val: Positive | None = None
    """At most so many val images (a seeded, stratified choice)."""
    size: Positive | None = None
    """Pixels, square. Default: the run's global crops; the backbone's input; at most 32 for pixels."""
    resize: Positive | None = None
    """Shorter side before the centre crop. Default: size * 256 / 224, or size itself below 96 pixels."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    batch_size: Positive = 256
    workers: Annotated[int, Field(ge=0)] = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "ImageSettings":
        if self.data.path is not None and self.eval.train is not None:
            raise ValueError("give data or eval.train, not both: each names the training images")
        if self.data.val is not None and self.eval.val is not None:
            raise ValueError("give data.val or eval.val, not both: each names the val images")
        if self.resize is not None and self.size is not None and self.resize < self.size:
            raise ValueError(f"resize={self.resize} is smaller than size={self.size}; the centre crop must fit inside")
        return self


class FeatureSettings(ImageSettings):
    """Keys shared by the verbs that look at features."""

    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Without a val set: this seeded, stratified part of the data is val."""
    max_train: Positive | None = None
    """At most so many training images (a seeded, stratified choice)."""
    channels: Positive | None = None
    """Only for the target `pixels`; default: 1 if the images are grey, else 3."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the backbone's forward pass; features are stored in float32."""
    cache: bool = True
    """Keep features under RUN/eval/features for the next evaluation of the same weights and images."""


class KnnSettings(FeatureSettings):
    """`selfsup eval knn`."""

    k: Annotated[tuple[Positive, ...], Many, Field(min_length=1)] = (20, 10, 100, 200)
    """The first one's figures are the result's `metrics`."""
    temperature: Annotated[tuple[PositiveFloat, ...], Many, Field(min_length=1)] = (0.07,)
    pooling: Pooling = "pooled"
    layer: Layer = -1
    backend: Literal["auto", "faiss", "torch"] = "auto"


class LinearSettings(FeatureSettings):
    """`selfsup eval linear`: every learning rate x layer x pooling at once."""

    lr: Annotated[tuple[PositiveFloat, ...], Many, Field(min_length=1)] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """At a batch of 256; used as lr * batch / 256."""
    pooling: Annotated[tuple[Pooling, ...], Many, Field(min_length=1)] | None = None
    """Default: pooled, and cls+patchmean where there is a class token (else patchmean)."""
    layer: Annotated[tuple[Layer, ...], Many, Field(min_length=1)] = (-1,)
    epochs: Positive = 50
    batch: Positive = 256
    """Images a step, over all ranks."""
    momentum: Probability = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    standardize: bool = True
    """Features to mean 0 and variance 1 by the training images' statistics, so that one grid suits every backbone."""
    augment: bool = False
    """Random resized crops and flips with a forward pass each epoch, instead of cached features."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """The seeded, stratified part of *train* on which learning rate, layer and pooling are chosen."""
    refit: bool | None = None
    """Train the chosen head again on all of train. Default: yes on cached features, no on augmented images."""


class ClassifySettings(ImageSettings):
    """`selfsup eval classify`. Val images: `eval.val`, `data.val`, all of `data`, or those of the run."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward pass."""
    bins: Positive = 15
    """Of the calibration error, of equal width."""


class ExitsSettings(ImageSettings):
    """`selfsup eval exits`. Val images: as for `classify`."""


_FINETUNE_SHORT = {
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "layer_decay": "optimizer.layer_decay",
    "warmup": "optimizer.warmup",
    "label_smoothing": "method.label_smoothing",
    "drop_path": "backbone.drop_path_rate",
}
"""Keys of `selfsup eval finetune` that are short for one of the training."""


class FinetuneSettings(ImageSettings):
    """`selfsup eval finetune`. Every key that is not one of these is one of the training (`selfsup train`)."""

    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Without a val set: this seeded, stratified part of the data is val."""
    max_train: Positive | None = None
    """At most so many training images (a seeded, stratified choice)."""
    bins: Positive = 15
    """Of the calibration error, of equal width."""
    training: dict[str, Any] = Field(default_factory=dict)
    """The recipe `finetune` with the keys of the training laid over it; the backbone and its normalisation are the target's."""


VERBS: dict[str, type[Section]] = {
    "knn": KnnSettings,
    "linear": LinearSettings,
    "classify": ClassifySettings,
    "finetune": FinetuneSettings,
    "exits": ExitsSettings,
    "segment": SegmentSettings,
    "detect": DetectSettings,
    "segment3d": Segment3dSettings,
}


def resolve(verb: str, overrides: Iterable[str]) -> Section:
    """The verb's settings from KEY=VALUE words. Raises UserError naming the key and what would be right."""
    if verb == "finetune":
        return _resolve_finetune(list(overrides))
    if verb == "augmentations":
        return _resolve_augmentations(list(overrides))
    model = model_of(verb)
    short = {**config.SHORT_FORMS, **getattr(model, "SHORT_FORMS", {})}
    return config.validate(model, config.parse_overrides(overrides, short), where=f"eval {verb}")


def model_of(verb: str) -> type[Section]:
    """The schema of a verb's keys; those that are seldom used have files of their own."""
    from . import settings_dense, settings_pictures, settings_scores

    further = settings_pictures.VERBS | settings_dense.VERBS | settings_scores.VERBS
    return (VERBS | further)[verb]


def _resolve_augmentations(overrides: list[str]) -> ImageSettings:
    from .settings_pictures import AugmentationsSettings

    given = config.parse_overrides(overrides)
    own = {key: given.pop(key) for key in ("images",) if key in given}
    return config.validate(AugmentationsSettings, {**own, "training": given}, where="eval augmentations")


def _resolve_finetune(overrides: list[str]) -> FinetuneSettings:
    words = []
    for word in overrides:
        key, equals, value = word.partition("=")
        words.append(f"{_FINETUNE_SHORT.get(key, key)}{equals}{value}")
    given = config.parse_overrides(words)
    own = {key: given.pop(key) for key in list(given) if key in FinetuneSettings.model_fields and key != "training"}
    base = config.read_recipe("finetune")
    if {"steps", "epochs", "samples"} & given.keys():
        base = {key: value for key, value in base.items() if key not in ("steps", "epochs", "samples")}
    training = config.merge(base, given)
    for key, why in (("init_from", "it starts from the target"), ("stop_at", "it runs to its end")):
        if key in given:
            raise UserError(f"eval finetune: {key}={given[key]!r}: {why}; leave it out")
    if "name" in given.get("backbone", {}):
        raise UserError(f"eval finetune: backbone={given['backbone']['name']}: it is the target's; leave it out")
    config.validate(config.Config, training, where="eval finetune")
    return config.validate(FinetuneSettings, {**own, "training": training}, where="eval finetune")
