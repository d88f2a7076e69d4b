"""From what was seen to a recipe: every choice with its reason, and the command that makes it so.

Sources: [P] Caron et al., 2021, arXiv:2104.14294, table 8, ViT-S/16 on 16 GPUs (V100) with 64 images each: 2x224 + 6x96 crops
take 12.9 GB a GPU and 60.7 h for 300 epochs, 2x224 + 10x96 15.4 GB and 72.6 h. [R] this library's README: the demo recipe
trains its 9 epochs of 10,000 images in 4.5 minutes on two cores; a checkpoint of it has 22 MB, one of ViT-S/16 705 MB.
[B] benchmarks/results/peers_cpu.json: a DINO step of ViT-S/16 with 8 images takes 5.8 s on two cores.
"""

import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import torch

from selfsup import config as configuration
from selfsup import methods, runtime, schedules
from selfsup.config import Config
from selfsup.doctor.machine import Machine
from selfsup.doctor.survey import Survey

SMALL = 96
"""Pixels of the short side below which crops of 224 would only enlarge what is there."""

LARGE_SET = 200_000
"""Images from which on the recipe for ImageNet is right as it is."""

FEW = 500
"""Images below which little can be learned without labels."""

_GB = 10**9
_BYTES_AN_IMAGE = 0.25 * _GB  # of ViT-S/16, 2x224 + 8x96, half precision: (12.9 + 15.4) / 2 / 64 in [P], rounded up
_IMAGES_A_SECOND = 100.0  # of one V100: 300 * 1,281,167 / (66.6 h * 16) in [P]
_DEMO_CORE_SECONDS = 0.006  # an image of the demo recipe: 2 cores * 4.5 min / 90,000 in [R]
_VIT_CORE_SECONDS = 1.5  # an image of ViT-S/16: 2 cores * 5.8 s / 8 in [B]
_DEMO_STATE, _VIT_STATE = 22e6, 705e6  # bytes of a checkpoint in [R]
_DEMO_STEPS = 2500  # about what the demo's 9 epochs are


@dataclass(frozen=True)
class Choice:
    """One setting, and why."""

    what: str
    value: str
    why: str


@dataclass
class Proposal:
    """What to run."""

    recipe: str
    overrides: list[str]
    choices: list[Choice]
    command: str
    then: str | None
    """An evaluation that the images' own labels allow."""
    config: Config
    warnings: list[str] = field(default_factory=list)


class _Plan:
    """Overrides and reasons as they come together."""

    def __init__(self, recipe: str, spec: str) -> None:
        self.recipe = recipe
        self.base = configuration.load(recipe, [])
        self.overrides = [f"data={spec}"]
        self.choices: list[Choice] = []

    def say(self, what: str, value: object, why: str) -> None:
        self.choices.append(Choice(what, str(value), why))

    def set(self, *overrides: str) -> None:
        self.overrides += overrides


def propose(seen: Survey, machine: Machine, out: Path) -> Proposal | None:
    """None if there are not two readable images. out: the folder that run folders go to."""
    images = round(seen.count * seen.readable / max(seen.decoded, 1))
    if images < 2:
        return None
    side = int(sorted(seen.short_side.tolist())[seen.readable // 2])
    if side < SMALL or not machine.gpus:
        plan, gpus = _small_network(seen, machine, images, side), min(len(machine.gpus), 1)
    else:
        plan, gpus = _vision_transformer(seen, machine, images, side)
    _colours(plan, seen)
    _workers(plan, seen, machine, max(gpus, 1))
    bad = seen.bad_count / max(seen.decoded, 1)
    if bad > 0.6 * plan.base.data.max_bad_fraction:
        allowed = min(1.0, math.ceil(150 * bad) / 100)
        plan.set(f"data.max_bad_fraction={allowed:g}")
        plan.say(
            "unreadable",
            f"data.max_bad_fraction={allowed:g}",
            f"{bad:.0%} of the sample cannot be read; a run stops at {plan.base.data.max_bad_fraction:.0%}. Better: remove them",
        )
    folder = _free_name(out, seen.spec)
    words = [plan.recipe, *plan.overrides, "--out", str(folder)]
    start = ["selfsup"] if gpus < 2 else ["torchrun", "--nproc-per-node", str(gpus), "-m", "selfsup.cli"]
    labelled = seen.classes is not None and seen.classes.count > 1
    return Proposal(
        recipe=plan.recipe,
        overrides=plan.overrides,
        choices=plan.choices,
        command=shlex.join([*start, "train", *words]),
        then=shlex.join(["selfsup", "eval", "knn", str(folder), f"data={seen.spec}"]) if labelled else None,
        config=methods.complete(configuration.load(plan.recipe, plan.overrides)),
        warnings=_warnings(plan, seen, machine, images),
    )


# --------------------------------------------------------------------------------------------------------------- recipes


def _small_network(seen: Survey, machine: Machine, images: int, side: int) -> _Plan:
    plan = _Plan("demo", seen.spec)
    tiny = side < SMALL
    if tiny:
        why = f"the short side of half of the images is at most {side} pixels: a small ConvNet (0.5 M parameters)"
    else:
        days = images * 100 * _VIT_CORE_SECONDS / machine.cpus / 86400
        why = (
            f"no GPU: a small ConvNet; 100 epochs of a ViT-S/16 would take {_span(days * 86400)} on {machine.cpus} CPUs"
        )
    plan.say("recipe", plan.recipe, why)

    batch = 32 if not machine.gpus else min(128, max(32, _power_below(images / 50)))
    batch = min(batch, _power_below(max(images / 4, 2)))
    rate = 0.0004 * batch / 32
    if batch != plan.base.global_batch:
        plan.set(f"global_batch={batch}", f"optimizer.lr={rate:g}", f"optimizer.min_lr={rate / 2:g}")
    why = (
        "of the recipe: many steps in a short run"
        if batch == 32
        else f"{images:,} images: "
        + ("at least four steps an epoch" if batch < 32 else "a GPU is busy, and an epoch still has fifty steps")
    )
    plan.say("global_batch", batch, why)
    plan.say(
        "learning rate",
        f"{rate:g}",
        "of the recipe, 0.0004 for a batch of 32" + ("" if batch == 32 else "; in proportion to the batch"),
    )

    size = min(max(4 * round(side / 4), 16), 96) if tiny else 96
    local = max(4 * round(size * 16 / 28 / 4), 12)
    if size != plan.base.views.global_.size:
        plan.set(f"views.global.size={size}", f"views.local.size={local}")
    why = (
        "the images' own size; local crops in the recipe's proportion"
        if tiny
        else "of the images, which are larger, as much as CPUs can take"
    )
    plan.say("crop size", f"{size} and {local} pixels", why)
    if tiny:
        low, high = plan.base.views.global_.scale, plan.base.views.local.scale
        plan.say(
            "crop scales",
            f"{_pair(low)} and {_pair(high)}",
            "of the recipe: what is small and centred is lost in small crops",
        )
    else:
        _wide_crops(plan, seen)
    _prototypes(plan, images)
    epochs = max(9, math.ceil(_DEMO_STEPS * batch / images))
    if epochs != 9:
        plan.set(f"epochs={epochs}")
    cost = _DEMO_CORE_SECONDS * (size**2 + local**2) / (28**2 + 16**2)
    time = "" if machine.gpus else f"; about {_span(images * epochs * cost / machine.cpus)} on {machine.cpus} CPUs"
    plan.say("epochs", epochs, f"at least {_DEMO_STEPS:,} steps{time}")
    plan.say("precision", "fp32", "of the recipe: faster than bf16 at this size on every CPU tried")
    return plan


def _wide_crops(plan: _Plan, seen: Survey) -> None:
    """Those for photographs, in place of the demo's."""
    wide, narrow = _scales(seen, (0.32, 1.0), (0.05, 0.32))
    kinds = {"global": wide, "local": narrow}
    for kind, scale in kinds.items():
        plan.set(f"views.{kind}.scale={_pair(scale)}", f"views.{kind}.ratio=[0.75,1.33]")
        if seen.channels == 3:
            plan.set(f"views.{kind}.grayscale=0.2")
    plan.say("crop scales", f"{_pair(wide)} and {_pair(narrow)}", _why_scales(seen, wide, narrow))


def _vision_transformer(seen: Survey, machine: Machine, images: int, side: int) -> tuple[_Plan, int]:
    gpus = machine.gpus
    plan = _Plan("dino_vits16" if images >= LARGE_SET else "dino_vits16_smalldata", seen.spec)
    many = "enough for" if images >= LARGE_SET else "too few for"
    plan.say(
        "recipe", plan.recipe, f"{images:,} images, {side} pixels and more, a GPU: ViT-S/16; {many} ImageNet's settings"
    )

    size = 224 if side >= 224 else 16 * (side // 16)
    local = 96 if size == 224 else max(16 * round(size * 96 / 224 / 16), 32)
    if size != 224:
        plan.set(f"views.global.size={size}", f"views.local.size={local}")
    why = (
        "of the recipe"
        if size == 224
        else f"half of the images are at most {side} pixels high or wide; a multiple of the patch"
    )
    plan.say("crop size", f"{size} and {local} pixels", why)

    batch = min(plan.base.global_batch, _power_below(max(images / 4, 2)))
    count = max(1, min(len(gpus), batch // 8))
    batch -= batch % count
    free = min(gpu.free for gpu in gpus[:count])
    fits = max(1, int((0.9 * free - 2 * _GB) / (_BYTES_AN_IMAGE * (size / 224) ** 2)))
    accumulate = 1
    while batch // count // accumulate > fits and batch % (2 * accumulate * count) == 0:
        accumulate *= 2
    if batch != plan.base.global_batch:
        plan.set(f"global_batch={batch}")
    if accumulate > 1:
        plan.set(f"accumulate={accumulate}")
    why = f"{count} GPU(s) with {free / _GB:.0f} GB free, about {fits} images each at a time"
    why += f": in {accumulate} pieces, the same gradient" if accumulate > 1 else ""
    plan.say(
        "global_batch",
        batch,
        ("of the recipe; " if batch == plan.base.global_batch else f"only {images:,} images; ") + why,
    )
    rate = plan.base.optimizer.base_lr * batch / 256
    plan.say(
        "learning rate",
        f"{rate:.3g}",
        f"base_lr {plan.base.optimizer.base_lr:g} x {batch} / 256, the rule of the recipe",
    )

    given = plan.base.views.global_.scale, plan.base.views.local.scale
    wide, narrow = _scales(seen, *given)
    if (wide, narrow) != given:
        plan.set(f"views.global.scale={_pair(wide)}", f"views.local.scale={_pair(narrow)}")
    plan.say("crop scales", f"{_pair(wide)} and {_pair(narrow)}", _why_scales(seen, wide, narrow))
    _prototypes(plan, images)
    epochs = plan.base.epochs or 1
    seconds = images * epochs / (_IMAGES_A_SECOND * count) * (size / 224) ** 2
    plan.say(
        "epochs", f"{epochs:g}", f"of the recipe; on V100s it would take about {_span(seconds)}, on newer GPUs less"
    )
    device = torch.device("cuda")
    if gpus[0].bf16:
        plan.say("precision", runtime.pick_precision("bf16", device), "the GPU has bf16, which needs no loss scale")
    else:
        plan.set("precision=fp16")
        plan.say("precision", "fp16", f"{gpus[0].name} has no bf16; a loss scale is kept")
    return plan, count


def _scales(
    seen: Survey, wide: tuple[float, float], narrow: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of global and local crops: for long images smaller, or none of the near-square boxes would fit."""
    long = sorted(seen.elongation.tolist())[seen.readable // 2]
    if long <= 2:
        return wide, narrow
    low, high = round(max(0.1, 0.5 / long), 2), round(min(1.0, 1.33 / long), 2)
    return (low, max(high, low)), (min(narrow[0], round(low / 3, 2)), low)


def _why_scales(seen: Survey, wide: tuple[float, float], narrow: tuple[float, float]) -> str:
    order = sorted((seen.width * seen.height).tolist())
    smallest = round((narrow[0] * order[len(order) // 2]) ** 0.5)
    long = sorted(seen.elongation.tolist())[seen.readable // 2]
    if long > 2:
        return f"half of the images are {long:.1f} times as long as wide: a nearly square box holds at most {1 / long:.0%} of one"
    return f"as published for photographs; the smallest crop is {smallest} pixels wide in an image of the middle size"


def _prototypes(plan: _Plan, images: int) -> None:
    given = int(plan.base.method.options["out_dim"])
    wanted = min(given, max(256, _power_below(images / 4)))
    if wanted < given:
        plan.set(f"method.out_dim={wanted}")
        plan.say("prototypes", wanted, f"{images:,} images: no more than one for four of them, instead of {given:,}")


# ---------------------------------------------------------------------------------------------------------------- common


def _colours(plan: _Plan, seen: Survey) -> None:
    base = plan.base
    same = seen.channels == base.backbone.in_chans
    near = same and all(abs(a - b) < 0.02 for a, b in zip((*seen.mean, *seen.std), (*base.mean, *base.std)))
    if not same:
        plan.set(f"backbone.in_chans={seen.channels}")
        what = {1: "grey", 3: "colour"}.get(seen.channels, f"of {seen.channels} channels")
        plan.say("channels", seen.channels, f"the images are {what}")
    if near or (same and seen.channels == 3):  # ImageNet's suit photographs, and published weights
        return
    values = [
        f"data.{key}=[{','.join(f'{v:g}' for v in value)}]" for key, value in (("mean", seen.mean), ("std", seen.std))
    ]
    plan.set(*values)
    plan.say("mean and std", " ".join(values), f"of {seen.readable:,} images of the sample")


def _workers(plan: _Plan, seen: Survey, machine: Machine, processes: int) -> None:
    a_second = 1000 / max(seen.decode_ms, 1e-3)
    cost = f"one core reads and decodes {a_second:,.0f} images a second"
    if machine.gpus:
        workers, why = (
            min(16, max(1, machine.cpus // processes - 1)),
            f"{machine.cpus} CPUs for {processes} process(es); {cost}",
        )
    else:
        workers, why = max(1, min(8, machine.cpus // 4)), f"training needs the {machine.cpus} CPUs as well; {cost}"
    if machine.free < 2 * _GB and workers > 1:
        workers, why = 1, f"only {machine.free / _GB:.1f} GB of memory are free; {cost}"
    if workers != plan.base.workers:
        plan.set(f"workers={workers}")
    plan.say("workers", workers, why)


def _warnings(plan: _Plan, seen: Survey, machine: Machine, images: int) -> list[str]:
    found = []
    if images < FEW:
        found.append(
            f"{images:,} images are few to learn from without labels; published weights (init_from=FILE) will be better"
        )
    state = _DEMO_STATE if plan.recipe == "demo" else _VIT_STATE
    needed = state * (plan.base.checkpoint.keep_last + 2)
    if machine.disk_free < needed:
        found.append(
            f"{machine.disk} has {machine.disk_free / _GB:.2f} GB free; checkpoints need {needed / _GB:.2f}: --out elsewhere"
        )
    if machine.free < 4 * state + 1.5 * _GB:
        found.append(f"only {machine.free / _GB:.1f} GB of memory are free")
    if machine.shared_free is not None and machine.shared_free < 256e6:
        found.append(
            f"/dev/shm, through which workers hand over batches, has {machine.shared_free / 1e6:.0f} MB free: workers=0"
        )
    pixels = sorted((seen.width * seen.height).tolist())[seen.readable // 2]
    if pixels > 4_000_000 and seen.decode_ms > 20:
        found.append(
            f"half of the images have {pixels / 1e6:.0f} million pixels and more, decoding one takes {seen.decode_ms:.0f} ms: "
            "a copy at 512 pixels would be read much faster"
        )
    duplicates = seen.duplicates
    if duplicates.found > 0.01 * max(duplicates.hashed, duplicates.looked_at if not seen.sizes_seen else 1, 1):
        found.append(
            f"{duplicates.found:,} duplicates: leave them out, above all before images are split for an evaluation"
        )
    if seen.blank > 0.01 * seen.readable:
        found.append(
            f"{seen.blank} of {seen.readable} decoded images are of one colour: there is nothing to learn from them"
        )
    return found


def learning_rate(proposal: Proposal) -> float:
    """The peak that a run of it will have."""
    return schedules.peak_learning_rate(proposal.config)


def _free_name(out: Path, spec: str) -> Path:
    """A folder that does not exist yet, called after the data."""
    kind, _, rest = spec.partition(":")
    base = f"{kind}-{rest.partition(':')[0]}" if kind in ("torchvision", "timm", "demo") and rest else Path(spec).stem
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", base).strip("._-")[:60] or "run"
    folder, n = out / name, 1
    while folder.exists():
        n += 1
        folder = out / f"{name}-{n}"
    return folder


def _power_below(value: float) -> int:
    return 1 << max(0, int(math.log2(max(value, 1))))


def _pair(values: tuple[float, float]) -> str:
    return f"[{values[0]:g},{values[1]:g}]"


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
