"""Other methods that suit the images and the machine, each with its recipe, the reason, and a command.

What is proposed first is DINO, which takes any backbone, works with batches of any size, and asks nothing of the images but
that crops of one look alike. What speaks for another: labels; images that colour changes would spoil; a batch that is too small
for methods that compare the images of a step with one another (SimCLR: Chen et al., 2020, figure 9; SwAV: Caron et al., 2020,
section 4.1; Barlow Twins: Zbontar et al., 2021, figure 2, which falls slowly), or one that is large enough; much memory.
"""

import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfsup import config as configuration
from selfsup import methods
from selfsup.config import Config
from selfsup.doctor.plan import Plan, power_below
from selfsup.doctor.recipes import LARGE_SET
from selfsup.doctor.survey import Survey

LARGE_BATCH = 256
"""Images from which on a step has enough to contrast, or to share out among prototypes."""

IMBALANCE = 10
"""Largest class over smallest: more is told."""

_DEEP = ("I;16", "I", "F", "uint16", "int16", "float")
_KEPT = ("data=", "backbone.in_chans=", "data.mean=", "data.std=", "workers=", "data.max_bad_fraction=", "precision=")
_VITL_BYTES = 1.3e9  # an image: five times ViT-S (24 x 1024 tokens against 12 x 384), of 0.25 GB


@dataclass(frozen=True)
class Alternative:
    """Another recipe for the same images."""

    method: str
    recipe: str
    why: str
    overrides: list[str] = field(default_factory=list)
    command: str = ""
    config: Config | None = None


def alternatives(plan: Plan, seen: Survey, images: int, start: list[str], folder: Path) -> list[Alternative]:
    """At most five, the most fitting first. start: how a command begins; folder: of the run that is proposed first."""
    found = [
        *_safe_augmentation(plan, seen),
        *_labels(plan, seen, images),
        *_by_batch(plan, images),
        *_by_memory(plan, images),
    ]
    out: list[Alternative] = []
    for each in found:
        if each.recipe in [other.recipe for other in out]:
            continue
        overrides = _overrides(plan, each.recipe, images)
        config = methods.complete(configuration.load(each.recipe, overrides))
        words = [*start, "train", each.recipe, *overrides, "--out", f"{folder}-{each.method}"]
        out.append(Alternative(each.method, each.recipe, each.why, overrides, shlex.join(words), config))
    return out[:5]


def passed_over(plan: Plan) -> str | None:
    """Which methods are left out for the batch, and why; None if it is large enough for them."""
    if plan.room >= LARGE_BATCH:
        return None
    return (
        f"SimCLR, MoCo v3, SwAV, Barlow Twins and VICReg compare the images of a step with one another, and {plan.room} at a "
        "time are few for that"
    )


# -------------------------------------------------------------------------------------------------------------- reasons


def _name(plan: Plan, method: str, large: str) -> str:
    """Of a recipe: the small one where the first proposal is small, else the published one."""
    return f"{method}_demo" if plan.small else f"{method}_{large}"


def _safe_augmentation(plan: Plan, seen: Survey) -> list[Alternative]:
    deep = sorted({mode for mode in seen.modes if mode.startswith(_DEEP)})
    alone = "it crops and nothing else, and predicts hidden pixels"
    if seen.channels not in (1, 3):
        why = f"{seen.channels} channels, which changes of brightness and contrast may spoil: {alone}"
    elif deep:
        why = f"{deep[0]} pixels, whose levels may mean something: {alone}"
    elif seen.channels == 1:
        why = f"grey images, whose brightness and contrast may be what matters, as in medical ones: {alone}"
    else:
        return []
    return [Alternative("mae", _name(plan, "mae", "vitb16"), why)]


def _labels(plan: Plan, seen: Survey, images: int) -> list[Alternative]:
    c = seen.classes
    if c is None or c.count < 2:
        return []
    ratio = c.largest[1] / max(c.smallest[1], 1)
    balance = "balanced" if ratio < 2 else f"the largest {ratio:.3g} times the smallest"
    balance += ", which it will hardly learn" if ratio > IMBALANCE else ""
    what = f"labels of {c.count:,} classes, {balance}"
    found = []
    if not c.unlabelled:
        large = "resnet50_tricks" if images < LARGE_SET else "deit_small"
        why = f"{what}: if those are what you want to tell, learn them"
        found.append(Alternative("supervised", "supervised_demo" if plan.small else large, why))
    if 2 * c.count <= plan.room:
        some = f"; {c.unlabelled:,} images without a label take part as classes of their own" if c.unlabelled else ""
        why = f"{what}: features in which a class is alike, for a k-NN or another task{some}"
        found.append(Alternative("supcon", _name(plan, "supcon", "resnet50"), why))
    return found


def _by_batch(plan: Plan, images: int) -> list[Alternative]:
    if plan.room >= LARGE_BATCH and images >= LARGE_SET and not plan.small:
        why = (
            f"a ConvNet, with many small crops; {plan.room:,} images at a time are enough to share out among prototypes"
        )
        return [Alternative("swav", _name(plan, "swav", "resnet50"), why)]
    why = f"contrasts with a queue of former images, so that {plan.room} at a time are enough; a ConvNet, two crops: cheaper"
    found = [Alternative("moco", _name(plan, "moco", "resnet50"), why)]
    if plan.room >= 32:
        why = "two crops; neither queue, teacher nor negatives, and batches of 64 were enough in its paper (table 2)"
        found.append(Alternative("simsiam", _name(plan, "simsiam", "resnet50"), why))
    return found


def _by_memory(plan: Plan, images: int) -> list[Alternative]:
    if plan.small:
        return [
            Alternative(
                "ibot",
                "ibot_demo",
                "a small ViT that learns hidden patches besides: features for each place in an image",
            )
        ]
    if plan.free * 0.9 / _VITL_BYTES >= LARGE_BATCH and images >= LARGE_SET:
        why = f"{plan.free / 1e9:.0f} GB on all GPUs: a ViT-L/14, for classes and for segmentation"
        return [Alternative("dinov2", "dinov2_vitl14", why)]
    why = "the same ViT-S/16, which learns hidden patches besides: features for each place in an image, as segmentation needs"
    return [Alternative("ibot", "ibot_vits16", why)]


# ------------------------------------------------------------------------------------------------------------- settings


def _overrides(plan: Plan, recipe: str, images: int) -> list[str]:
    """Of the first proposal what is about data and machine; batch, rate, sizes, queue and prototypes as this recipe needs."""
    base = configuration.load(recipe, [])
    kind: Any = methods.find(base.method.name)
    whole = hasattr(kind, "whole_batch")
    out = [word for word in plan.overrides if word.startswith(_KEPT)]
    kinds = ("global", "local") if base.views.local.count else ("global",)
    kept = ("scale", "ratio") if base.method.name == "mae" else ("scale", "ratio", "grayscale")
    crops = tuple(f"views.{kind}.{key}=" for kind in kinds for key in kept)
    out += [word for word in plan.overrides if word.startswith(crops)]
    out += ["data.val=null"] if base.data.val is not None else []
    if not any(word.startswith("workers=") for word in out) and base.workers != plan.workers:
        out.append(f"workers={plan.workers}")

    room = max(plan.room, plan.gpus)
    batch = min(base.global_batch, power_below(max(images / 4, 2)), *([room] if whole else []))
    batch -= batch % max(plan.gpus, 1)
    pieces = 1
    while batch // pieces > room and batch % (2 * pieces * max(plan.gpus, 1)) == 0:
        pieces *= 2
    if batch != base.global_batch:
        out.append(f"global_batch={batch}")
        if base.optimizer.lr is not None:
            share = batch / base.global_batch
            out.append(f"optimizer.lr={base.optimizer.lr * share:.3g}")
            if base.optimizer.min_lr:
                out.append(f"optimizer.min_lr={base.optimizer.min_lr * share:.3g}")
    out += [f"accumulate={pieces}"] if pieces > 1 else []
    out += _sizes(plan, base)
    for key in ("out_dim", "patch_out_dim", "prototypes", "queue_length"):
        given, is_prototypes = _option(kind, base, key), base.method.name in ("ibot", "dinov2", "swav")
        if given and (is_prototypes or key == "queue_length"):
            wanted = max(power_below(images / (4 if is_prototypes else 2)), batch if key == "queue_length" else 64)
            out += [f"method.{key}={wanted}"] if wanted < given else []
    if plan.small and base.epochs:
        steps = base.epochs * 10_000 / base.global_batch  # of the bundled images
        epochs = max(math.ceil(base.epochs), math.ceil(steps * batch / images))
        out += [f"epochs={epochs}"] if epochs != base.epochs else []
    return out


def _option(kind: Any, base: Config, key: str) -> int | None:
    fields = kind.Options.model_fields
    value = base.method.options.get(key, fields[key].default) if key in fields else None
    return int(value) if value else None


def _sizes(plan: Plan, base: Config) -> list[str]:
    """Of crops; a small ViT has as many patches as in its recipe, which are larger in larger images."""
    views, options = base.views, dict(base.backbone.options)
    size, local = plan.size, plan.local
    out: list[str] = []
    if plan.small and "patch_size" in options:
        tokens = int(options["img_size"]) // int(options["patch_size"])
        patch = max(1, round(size / tokens))
        size, local = tokens * patch, max(1, round(local / patch)) * patch
        if size != options["img_size"]:
            out += [f"backbone.img_size={size}", f"backbone.patch_size={patch}"]
    elif not plan.small and size != views.global_.size and (patches := re.search(r"patch(\d+)", base.backbone.name)):
        patch = int(patches[1])
        size, local = patch * (size // patch), max(patch * round(local / patch), 2 * patch)
        out += [] if options.get("dynamic_img_size") else [f"backbone.img_size={size}"]
    if size != views.global_.size:
        out.append(f"views.global.size={size}")
        if views.local.count and local != views.local.size:
            out.append(f"views.local.size={local}")
    return out
