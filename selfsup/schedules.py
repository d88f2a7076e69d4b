"""Schedules: pure functions from the step (0, 1, 2, ...) to a float. No state, so a resume needs nothing from them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from selfsup.config import Config, parse_duration
from selfsup.errors import UserError

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: value


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` at step 0 to `end` at `steps` and after it."""
    if steps <= 0:
        return constant(end)
    return lambda step: start + (end - start) * min(1.0, step / steps)


def cosine(start: float, end: float, steps: int, warmup: int = 0) -> Schedule:
    """Linear from 0 to `start` over `warmup` steps, then half a cosine to `end` (Caron et al., 2021, section 3.2).

    As in DINO's code the warm-up reaches `start` at its last step, and `end` is approached but not reached at the
    last step; from `steps` on the value is `end`.
    """
    span = max(1, steps - warmup)

    def value(step: int) -> float:
        if step < warmup:
            return start * step / max(1, warmup - 1)
        return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(1.0, (step - warmup) / span)))

    return value


@dataclass(frozen=True)
class Plan:
    """How long a run is, in every unit."""

    steps: int
    images: int
    """Images in the data set."""
    global_batch: int

    def steps_of(self, duration: str) -> int:
        """'10 epochs', '500 steps', '100000 samples' or '10%' in steps, rounded to the nearest."""
        amount, unit = parse_duration(duration)
        per_unit = {
            "step": 1.0,
            "sample": 1 / self.global_batch,
            "epoch": self.images / self.global_batch,
            "%": self.steps / 100,
        }[unit]
        return round(amount * per_unit)

    def epoch(self, step: int) -> float:
        """Epochs seen after `step` steps: true passes over the data."""
        return step * self.global_batch / self.images


def plan(config: Config, images: int) -> Plan:
    """The length of a run over `images` images; raises UserError if they do not fill one global batch."""
    if images < config.global_batch:
        raise UserError(
            f"data={config.data.path} has {images} images, fewer than global_batch={config.global_batch}; "
            f"lower it, as in global_batch={max(1, images)}"
        )
    if config.steps is not None:
        steps = config.steps
    elif config.samples is not None:
        steps = math.ceil(config.samples / config.global_batch)
    else:
        steps = math.ceil((config.epochs or 100.0) * images / config.global_batch)
    return Plan(steps=steps, images=images, global_batch=config.global_batch)


def peak_learning_rate(config: Config) -> float:
    """As given, or the base rate scaled linearly with the batch (Goyal et al., 2017)."""
    o = config.optimizer
    return o.lr if o.lr is not None else o.base_lr * config.global_batch / 256


def optimizer_schedules(config: Config, plan: Plan) -> dict[str, Schedule]:
    """Learning rate and weight decay."""
    o, peak = config.optimizer, peak_learning_rate(config)
    end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
    return {
        "lr": cosine(peak, min(o.min_lr, peak), plan.steps, min(plan.steps_of(o.warmup), plan.steps)),
        "wd": cosine(o.weight_decay, end, plan.steps),
    }


def evaluate(schedules: Mapping[str, Schedule], step: int) -> dict[str, float]:
    """The value of every schedule at `step`."""
    return {name: schedule(step) for name, schedule in schedules.items()}
