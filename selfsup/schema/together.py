"""What does not go together: keys that each are right and of different sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsup.schema.views import Crops
    from selfsup.schema.whole import Config


def faults(c: Config) -> Iterator[str]:
    """One line for each fault, naming the keys, the most basic first."""
    yield from _length(c)
    yield from _evaluations(c)
    if c.teacher.cache is not None and c.teacher.cache_epochs % c.data.copies:
        yield (
            f"data.copies={c.data.copies} with teacher.cache_epochs={c.teacher.cache_epochs}: copies would be alike; "
            f"give a multiple, as in teacher.cache_epochs={c.data.copies}"
        )
    yield from _clips(c)
    yield from _in_volumes(c) if c.volumes else _of_volumes(c)
    yield from _channels(c)
    yield from _depth(c)


def _kinds(c: Config) -> list[tuple[str, Crops]]:
    return [("global", c.views.global_), ("local", c.views.local)]


def _length(c: Config) -> Iterator[str]:
    given = [k for k in ("steps", "epochs", "samples") if getattr(c, k) is not None]
    if len(given) > 1:
        yield f"give one of steps, epochs, samples; seen {' and '.join(given)}"
    if c.global_batch % c.accumulate:
        yield f"accumulate={c.accumulate} does not divide global_batch={c.global_batch}"


def _evaluations(c: Config) -> Iterator[str]:
    if c.checkpoint.keep_best and not c.eval.every:
        yield "checkpoint.keep_best needs eval.every: the best are chosen by its accuracy"
    if c.checkpoint.keep_best and c.eval.as_jobs:
        yield (
            "checkpoint.keep_best needs figures when a checkpoint is written, and those of eval.as_jobs come later; "
            "use eval.as_jobs=false or checkpoint.keep_best=0"
        )
    if c.early_stop.patience and (not c.eval.every or c.eval.as_jobs):
        yield (
            f"early_stop.patience={c.early_stop.patience} counts evaluations during training; "
            "give eval.every, and eval.as_jobs=false"
        )


def _clips(c: Config) -> Iterator[str]:
    for kind, crops in _kinds(c):
        if c.data.frames is None and (crops.frames or crops.stride):
            yield f"views.{kind}.frames and .stride are of clips; give data.frames as well"
        if c.data.frames is not None and crops.style != "none":
            yield f"views.{kind}.style={crops.style} is that of another image; clips have none (data.frames)"
    if c.data.frames is None and (c.data.stride, c.data.clips) != (1, 1):
        yield "data.stride and data.clips are of clips; give data.frames as well"
    if c.data.frames is not None and c.data.depth != 8:
        yield f"data.depth={c.data.depth}: clips (data.frames) have 8 bits; leave it out"


def _of_volumes(c: Config) -> Iterator[str]:
    """Keys of volumes where data are images."""
    kinds = [(kind, crops) for kind, crops in _kinds(c) if crops.count]
    given = [f"views.{k}.{key}" for k, crops in kinds for key in ("slices", "extent", "dflip") if getattr(crops, key)]
    given += [f"data.{key}" for key in ("channel", "spacing") if getattr(c.data, key) is not None]
    if given:
        yield f"{', '.join(given)}: of volumes; use backbone=vit3d_small, or leave it out"


_NOT_IN_VOLUMES = (
    "grayscale",
    "blur",
    "lighting",
    "erase",
    "cutout",
    "noise",
    "salt_pepper",
    "rotate",
    "translate",
    "shear",
)


def _in_volumes(c: Config) -> Iterator[str]:
    """What volumes cannot have."""
    low, high = c.data.percentiles
    if not 0 <= low < high <= 100:
        yield f"data.percentiles={list(c.data.percentiles)}: two numbers from 0 to 100, the smaller first"
    if c.data.spacing is not None and min(c.data.spacing) <= 0:
        yield f"data.spacing={list(c.data.spacing)}: millimetres above 0"
    if c.eval.every:
        yield f"eval.every={c.eval.every}: k-NN is of images; of volumes there is selfsup eval segment3d; leave it out"
    if c.data.depth != 8 or c.data.frames is not None:
        yield "data.depth=16 and data.frames are not for volumes, which have 8 bits; leave them out"
    if c.mix.name != "none":
        yield f"mix.name={c.mix.name}: of images; leave it out"
    refused: list[str] = []
    for kind, crops in _kinds(c):
        if not crops.count:
            continue
        keys = [*_NOT_IN_VOLUMES, *(("contrast", "saturation", "hue") if _any(crops.jitter) else ())]
        refused += [f"views.{kind}.{key}=0" for key in keys if _any(getattr(crops, key))]
        refused += [f"views.{kind}.zoom=[1,1]"] if crops.zoom != (1.0, 1.0) else []
        refused += [f"views.{kind}.{key}=none" for key in ("policy", "style") if getattr(crops, key) != "none"]
        refused += [f"views.{kind}.module=null"] if crops.module else []
    if refused:
        yield (
            "volumes take crops, flips, jitter of brightness, and solarize; the recipes mae_vit3d and dino_vit3d leave the "
            f"others out; give {' '.join(refused)}"
        )


def _channels(c: Config) -> Iterator[str]:
    channels, ranges = c.backbone.in_chans, c.data.value_range
    for key in ("mean", "std"):
        value = getattr(c.data, key)
        if value is not None and len(value) != channels:
            yield f"data.{key} has {len(value)} values for backbone.in_chans={channels}"
    if ranges is not None and isinstance(ranges[0], tuple) and len(ranges) != channels:
        yield f"data.value_range has {len(ranges)} ranges for backbone.in_chans={channels}"
    for kind, crops in _kinds(c):
        if crops.policy != "none" and channels not in (1, 3):
            yield f"views.{kind}.policy={crops.policy} is for images of 1 or 3 channels; seen backbone.in_chans={channels}"
        if crops.lighting and channels != 3:
            yield f"views.{kind}.lighting={crops.lighting:g} is for images of 3 channels; seen backbone.in_chans={channels}"


def _depth(c: Config) -> Iterator[str]:
    for kind, crops in _kinds(c):
        if crops.policy != "none" and c.data.depth != 8:
            yield f"views.{kind}.policy={crops.policy} works on 8 bits; use data.depth=8, or views.{kind}.policy=none"
        if crops.style != "none" and c.data.depth != 8:
            yield f"views.{kind}.style={crops.style} works on 8 bits; give data.depth=8, or style=none"


def _any(value: Any) -> bool:
    """Whether a probability, or one of several, or a strength, is above 0."""
    return any(value) if isinstance(value, tuple) else bool(value)
