"""Schedules: pure functions from the step (0, 1, 2, ...) to a float. No state, so a resume needs nothing from them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from selfsup.config import Config, OptimizerConfig, parse_duration
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


def steps_down(start: float, factor: float, at: Sequence[int]) -> Schedule:
    """`start` times `factor` for each of the steps `at` that has come: the steps are the first at the lower value."""
    return lambda step: start * factor ** sum(step >= each for each in at)


def warmed_up(then: Schedule, low: float, high: float, steps: int, kind: str = "gradual") -> Schedule:
    """`then` from `steps` on (Goyal et al., 2017, section 2.2).

    Before, gradual: in a line from `low` to `high`, which the last step reaches; constant: `low`.
    """

    def value(step: int) -> float:
        if step >= steps:
            return then(step)
        return low if kind == "constant" else low + (high - low) * step / max(1, steps - 1)

    return value


def cooled_down(first: Schedule, end: float, steps: int, cooldown: int) -> Schedule:
    """`first`, and over the last `cooldown` of `steps` steps in a line from where it is then to `end`.

    As with `cosine`, `end` is approached but not reached at the last step: that one still learns when `end` is 0.
    """
    begin = steps - cooldown
    if cooldown <= 0:
        return first
    return lambda step: first(step) if step < begin else linear(first(begin), end, cooldown)(step - begin)


def averaging(momentum: float) -> Schedule:
    """Of averaged weights: the true mean of all so far, until the exponential one with `momentum` is the more correct.

    min(1 - 1 / (step + 1), momentum), as in the published code of Tarvainen & Valpola, 2017.
    """
    return lambda step: min(1 - 1 / (step + 1), momentum)


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


def learning_rate(o: OptimizerConfig, peak: float, plan: Plan) -> Schedule:
    """Warm-up, schedule and cool-down as `o` says. Raises UserError if the run has no room for them."""
    end, total = min(o.min_lr, peak), plan.steps
    warmup, cooldown = min(plan.steps_of(o.warmup), total), plan.steps_of(o.cooldown)
    if cooldown and warmup + cooldown > total:
        raise UserError(
            f"optimizer.cooldown={o.cooldown!r} is {cooldown:,} steps, optimizer.warmup={o.warmup!r} is {warmup:,}, and the "
            f"run has {total:,}; shorten one, or train longer"
        )
    milestones = [plan.steps_of(each) for each in o.milestones]
    if late := [given for given, step in zip(o.milestones, milestones) if step >= total]:
        raise UserError(
            f"optimizer.milestones: {late[0]!r} is not before the end of the run ({total:,} steps); give earlier ones, "
            "as in ['30%','60%','90%']"
        )
    span = total - warmup
    body = {
        "cosine": cosine(peak, end, total, warmup),
        "linear": lambda step: linear(peak, end, span)(step - warmup),
        "constant": constant(peak),
        "step": steps_down(peak, o.step_factor, milestones),
    }[o.schedule]
    default = 0.0 if o.warmup_kind == "gradual" else 0.1
    low = peak * (default if o.warmup_factor is None else o.warmup_factor)
    return cooled_down(warmed_up(body, low, peak, warmup, o.warmup_kind), end, total, cooldown)


def optimizer_schedules(config: Config, plan: Plan) -> dict[str, Schedule]:
    """Learning rate and weight decay, and that of the heads ("wd_head") if it has its own."""
    o = config.optimizer

    def decay(start: float, end: float | None) -> Schedule:
        return cosine(start, start if end is None else end, plan.steps)

    out = {"lr": learning_rate(o, peak_learning_rate(config), plan), "wd": decay(o.weight_decay, o.weight_decay_end)}
    if o.head_weight_decay is not None:
        out["wd_head"] = decay(o.head_weight_decay, o.head_weight_decay_end)
    return out


def evaluate(schedules: Mapping[str, Schedule], step: int) -> dict[str, float]:
    """The value of every schedule at `step`."""
    return {name: schedule(step) for name, schedule in schedules.items()}
