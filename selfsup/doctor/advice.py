"""From what was seen to a recipe: every choice with its reason, and the command that makes it so.

Checkpoints have the size that this library's README tells: 22 MB of the demo recipe, 705 MB of ViT-S/16.
"""

import math
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from selfsup import config as configuration
from selfsup import methods, schedules
from selfsup.config import Config
from selfsup.doctor.alternatives import Alternative, alternatives, passed_over
from selfsup.doctor.machine import Machine
from selfsup.doctor.plan import Choice, Plan
from selfsup.doctor.recipes import SMALL, small_network, vision_transformer
from selfsup.doctor.survey import Survey

FEW = 500
"""Images below which little can be learned without labels."""

_GB = 10**9
_DEMO_STATE, _VIT_STATE = 22e6, 705e6  # bytes of a checkpoint


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
    alternatives: list[Alternative] = field(default_factory=list)
    """Other methods, the most fitting first."""
    passed_over: str | None = None
    """Methods that the batch is too small for, and why."""


def propose(seen: Survey, machine: Machine, out: Path) -> Proposal | None:
    """None if there are not two readable images. out: the folder that run folders go to."""
    images = round(seen.count * seen.readable / max(seen.decoded, 1))
    if images < 2:
        return None
    side = int(sorted(seen.short_side.tolist())[seen.readable // 2])
    if side < SMALL or not machine.gpus:
        plan = small_network(seen, machine, images, side)
    else:
        plan = vision_transformer(seen, machine, images, side)
    why = "a sane start: any backbone, batches of any size, no labels; others are named below"
    plan.choices.insert(1, Choice("method", "dino", why))
    _colours(plan, seen)
    _workers(plan, seen, machine, max(plan.gpus, 1))
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
    start = ["selfsup"] if plan.gpus < 2 else ["torchrun", "--nproc-per-node", str(plan.gpus), "-m", "selfsup.cli"]
    labelled = seen.classes is not None and seen.classes.count > 1
    return Proposal(
        recipe=plan.recipe,
        overrides=plan.overrides,
        choices=plan.choices,
        command=shlex.join([*start, "train", *words]),
        then=shlex.join(["selfsup", "eval", "knn", str(folder), f"data={seen.spec}"]) if labelled else None,
        config=methods.complete(configuration.load(plan.recipe, plan.overrides)),
        warnings=_warnings(plan, seen, machine, images),
        alternatives=alternatives(plan, seen, images, start, folder),
        passed_over=passed_over(plan),
    )


# ---------------------------------------------------------------------------------------------------------------- common


def _colours(plan: Plan, seen: Survey) -> None:
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


def _workers(plan: Plan, seen: Survey, machine: Machine, processes: int) -> None:
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
    plan.workers = workers
    plan.say("workers", workers, why)


def _warnings(plan: Plan, seen: Survey, machine: Machine, images: int) -> list[str]:
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
