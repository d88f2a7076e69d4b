"""The recipe that is proposed first, DINO: of a small ConvNet, or of a ViT-S/16 where there are a GPU and images for it.

Sources: [P] Caron et al., 2021, arXiv:2104.14294, table 8, ViT-S/16 on 16 GPUs (V100) with 64 images each: 2x224 + 6x96 crops
take 12.9 GB a GPU and 60.7 h for 300 epochs, 2x224 + 10x96 15.4 GB and 72.6 h. [R] this library's README: the demo recipe
trains its 9 epochs of 10,000 images in 4.5 minutes on two cores; a checkpoint of it has 22 MB, one of ViT-S/16 705 MB.
[B] benchmarks/results/peers_cpu.json: a DINO step of ViT-S/16 with 8 images takes 5.8 s on two cores.
"""

import math

import torch

from selfsup import runtime
from selfsup.doctor.machine import Machine
from selfsup.doctor.plan import Plan, pair, power_below, span
from selfsup.doctor.survey import Survey

SMALL = 96
"""Pixels of the short side below which crops of 224 would only enlarge what is there."""

LARGE_SET = 200_000
"""Images from which on the recipe for ImageNet is right as it is."""

_GB = 10**9
_BYTES_AN_IMAGE = 0.25 * _GB  # of ViT-S/16, 2x224 + 8x96, half precision: (12.9 + 15.4) / 2 / 64 in [P], rounded up
_IMAGES_A_SECOND = 100.0  # of one V100: 300 * 1,281,167 / (66.6 h * 16) in [P]
_DEMO_CORE_SECONDS = 0.006  # an image of the demo recipe: 2 cores * 4.5 min / 90,000 in [R]
_VIT_CORE_SECONDS = 1.5  # an image of ViT-S/16: 2 cores * 5.8 s / 8 in [B]
_DEMO_STEPS = 2500  # about what the demo's 9 epochs are


def small_network(seen: Survey, machine: Machine, images: int, side: int) -> Plan:
    """side: pixels of the short side of half of the images."""
    plan = Plan("demo", seen.spec)
    tiny = side < SMALL
    if tiny:
        why = f"the short side of half of the images is at most {side} pixels: a small ConvNet (0.5 M parameters)"
    else:
        days = images * 100 * _VIT_CORE_SECONDS / machine.cpus / 86400
        why = (
            f"no GPU: a small ConvNet; 100 epochs of a ViT-S/16 would take {span(days * 86400)} on {machine.cpus} CPUs"
        )
    plan.say("recipe", plan.recipe, why)

    batch = 32 if not machine.gpus else min(128, max(32, power_below(images / 50)))
    batch = min(batch, power_below(max(images / 4, 2)))
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
            f"{pair(low)} and {pair(high)}",
            "of the recipe: what is small and centred is lost in small crops",
        )
    else:
        _wide_crops(plan, seen)
    _prototypes(plan, images)
    epochs = max(9, math.ceil(_DEMO_STEPS * batch / images))
    if epochs != 9:
        plan.set(f"epochs={epochs}")
    cost = _DEMO_CORE_SECONDS * (size**2 + local**2) / (28**2 + 16**2)
    time = "" if machine.gpus else f"; about {span(images * epochs * cost / machine.cpus)} on {machine.cpus} CPUs"
    plan.say("epochs", epochs, f"at least {_DEMO_STEPS:,} steps{time}")
    plan.say("precision", "fp32", "of the recipe: faster than bf16 at this size on every CPU tried")
    plan.small, plan.size, plan.local, plan.gpus = True, size, local, min(len(machine.gpus), 1)
    plan.room = min(512 if machine.gpus else 128, power_below(max(images / 4, 2)))
    return plan


def _wide_crops(plan: Plan, seen: Survey) -> None:
    """Those for photographs, in place of the demo's."""
    wide, narrow = _scales(seen, (0.32, 1.0), (0.05, 0.32))
    kinds = {"global": wide, "local": narrow}
    for kind, scale in kinds.items():
        plan.set(f"views.{kind}.scale={pair(scale)}", f"views.{kind}.ratio=[0.75,1.33]")
        if seen.channels == 3:
            plan.set(f"views.{kind}.grayscale=0.2")
    plan.say("crop scales", f"{pair(wide)} and {pair(narrow)}", _why_scales(seen, wide, narrow))


def vision_transformer(seen: Survey, machine: Machine, images: int, side: int) -> Plan:
    """The same; the machine has a GPU."""
    gpus = machine.gpus
    plan = Plan("dino_vits16" if images >= LARGE_SET else "dino_vits16_smalldata", seen.spec)
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

    batch = min(plan.base.global_batch, power_below(max(images / 4, 2)))
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
        plan.set(f"views.global.scale={pair(wide)}", f"views.local.scale={pair(narrow)}")
    plan.say("crop scales", f"{pair(wide)} and {pair(narrow)}", _why_scales(seen, wide, narrow))
    _prototypes(plan, images)
    epochs = plan.base.epochs or 1
    seconds = images * epochs / (_IMAGES_A_SECOND * count) * (size / 224) ** 2
    plan.say(
        "epochs", f"{epochs:g}", f"of the recipe; on V100s it would take about {span(seconds)}, on newer GPUs less"
    )
    device = torch.device("cuda")
    if gpus[0].bf16:
        plan.say("precision", runtime.pick_precision("bf16", device), "the GPU has bf16, which needs no loss scale")
    else:
        plan.set("precision=fp16")
        plan.say("precision", "fp16", f"{gpus[0].name} has no bf16; a loss scale is kept")
    plan.size, plan.local, plan.gpus, plan.free = size, local, count, free * count
    plan.room = min(power_below(fits) * count, power_below(max(images / 4, 2)))
    return plan


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


def _prototypes(plan: Plan, images: int) -> None:
    given = int(plan.base.method.options["out_dim"])
    wanted = min(given, max(256, power_below(images / 4)))
    if wanted < given:
        plan.set(f"method.out_dim={wanted}")
        plan.say("prototypes", wanted, f"{images:,} images: no more than one for four of them, instead of {given:,}")
