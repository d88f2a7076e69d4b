"""Schedules against the published formulas, and lengths in every unit."""

import numpy as np
import pytest

from selfsup.config import load
from selfsup.errors import UserError
from selfsup.schedules import (
    Plan,
    averaging,
    constant,
    cooled_down,
    cosine,
    evaluate,
    linear,
    optimizer_schedules,
    plan,
    steps_down,
    warmed_up,
)


def published(base: float, final: float, total: int, warmup: int) -> np.ndarray:
    """The cosine schedule of DINO's code, from its description: np.linspace up, then half a cosine."""
    up = np.linspace(0, base, warmup) if warmup > 0 else np.array([])
    i = np.arange(total - warmup)
    down = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate([up, down])


@pytest.mark.parametrize(
    "base, final, total, warmup",
    [
        (5e-4, 1e-6, 1000, 100),
        (0.04, 0.4, 333, 0),
        (0.996, 1.0, 57, 0),
        (1.0, 0.0, 10, 1),
        (0.3, 0.1, 10, 9),
        (0.3, 0.1, 10, 8),
    ],
)
def test_cosine_is_the_published_one(base: float, final: float, total: int, warmup: int) -> None:
    schedule = cosine(base, final, total, warmup)
    np.testing.assert_allclose([schedule(s) for s in range(total)], published(base, final, total, warmup), rtol=1e-12)
    assert schedule(total) == pytest.approx(final) and schedule(total + 1000) == pytest.approx(final)


def test_linear_and_constant() -> None:
    schedule = linear(0.04, 0.07, 30)
    assert [schedule(s) for s in (0, 15, 30, 31, 1000)] == pytest.approx([0.04, 0.055, 0.07, 0.07, 0.07])
    assert linear(1.0, 2.0, 0)(0) == 2.0
    assert constant(3.0)(10**9) == 3.0


def test_no_warmup_means_full_rate_at_once_and_warmup_is_not_silently_off() -> None:
    config = load(None, ["steps=100", "optimizer.warmup=0 steps", "optimizer.lr=0.5"])
    rate = optimizer_schedules(config, plan(config, 1000))["lr"]
    assert rate(0) == 0.5
    config = load(None, ["steps=100", "optimizer.warmup=10%", "optimizer.lr=0.5"])
    rate = optimizer_schedules(config, plan(config, 1000))["lr"]
    assert rate(0) == 0 and rate(5) == pytest.approx(0.5 * 5 / 9) and rate(9) == 0.5 and rate(10) == 0.5
    assert rate(11) < 0.5


def test_learning_rate_scales_with_the_batch() -> None:
    for batch in (64, 256, 1024):
        config = load(None, [f"global_batch={batch}", "optimizer.base_lr=1e-3", "steps=10", "optimizer.warmup=0 steps"])
        assert optimizer_schedules(config, plan(config, 2000))["lr"](0) == pytest.approx(1e-3 * batch / 256)
    config = load(None, ["global_batch=1024", "optimizer.lr=1e-3", "steps=10", "optimizer.warmup=0 steps"])
    assert optimizer_schedules(config, plan(config, 2000))["lr"](0) == 1e-3


def test_min_lr_above_the_peak_does_not_raise_the_rate() -> None:
    config = load(None, ["optimizer.lr=1e-7", "steps=10", "optimizer.warmup=0 steps"])
    rate = optimizer_schedules(config, plan(config, 2000))["lr"]
    assert max(rate(s) for s in range(11)) == pytest.approx(1e-7)


def test_weight_decay_constant_or_cosine() -> None:
    config = load(None, ["steps=10", "optimizer.weight_decay=0.1", "optimizer.weight_decay_end=null"])
    decay = optimizer_schedules(config, plan(config, 100))["wd"]
    assert {decay(s) for s in range(12)} == {0.1}


def test_warmup_longer_than_the_run() -> None:
    config = load(None, ["steps=10", "optimizer.warmup=100 epochs", "optimizer.lr=1"])
    rate = optimizer_schedules(config, plan(config, 6400))["lr"]
    assert all(0 <= rate(s) <= 1 for s in range(11)) and rate(9) == 1


def test_lengths() -> None:
    config = load(None, ["global_batch=64"])
    assert plan(config.model_copy(update={"steps": 7}), 1000).steps == 7
    assert plan(config.model_copy(update={"samples": 1000}), 1000).steps == 16  # rounded up: never fewer samples
    assert plan(config.model_copy(update={"epochs": 2.0}), 1000).steps == 32  # 2,000 / 64 = 31.25: true epochs
    assert plan(config.model_copy(update={"epochs": 0.5}), 1000).steps == 8
    assert plan(config.model_copy(update={"epochs": 0.01}), 1000).steps == 1


def test_durations_of_a_plan() -> None:
    p = Plan(steps=200, images=1000, global_batch=50)
    assert p.steps_of("3 epochs") == 60 and p.steps_of("12 steps") == 12
    assert p.steps_of("500 samples") == 10 and p.steps_of("10%") == 20 and p.steps_of("0 epochs") == 0
    assert p.epoch(30) == 1.5


def test_fewer_images_than_a_global_batch() -> None:
    """7 images with global_batch 64: says both numbers and what would work."""
    config = load(None, ["data=photos", "global_batch=64"])
    with pytest.raises(UserError, match=r"photos has 7 images.*global_batch=64.*global_batch=7"):
        plan(config, 7)
    assert plan(load(None, ["global_batch=7"]), 7).images == 7


def test_evaluate() -> None:
    assert evaluate({"a": constant(1.0), "b": linear(0, 1, 10)}, 5) == {"a": 1.0, "b": 0.5}


# ------------------------------------------------------------------------------------------------- other than the cosine


def rates(*overrides: str, steps: int = 10) -> list[float]:
    """Of every step, and the one behind the last; 100 images, 10 a step."""
    config = load(None, [f"steps={steps}", "global_batch=10", "optimizer.lr=1", "optimizer.min_lr=0", *overrides])
    schedule = optimizer_schedules(config, plan(config, 100))["lr"]
    return [schedule(step) for step in range(steps + 1)]


NO_WARMUP = "optimizer.warmup=0 steps"


def test_warm_up_constant_linear_cool_down() -> None:
    """Zhai et al., 2022, section 3.5, point by point: to zero behind the last step, which still learns."""
    options = ["optimizer.schedule=constant", "optimizer.warmup=3 steps", "optimizer.cooldown=4 steps"]
    assert rates(*options) == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert rates(*options, "optimizer.min_lr=0.2") == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates("optimizer.schedule=constant", NO_WARMUP) == [1] * 11
    assert rates("optimizer.schedule=constant", NO_WARMUP, "optimizer.cooldown=100%") == pytest.approx(
        [1 - i / 10 for i in range(11)]
    )


def test_linear_decay() -> None:
    found = rates("optimizer.schedule=linear", "optimizer.warmup=2 steps", "optimizer.min_lr=0.2")
    assert found == pytest.approx([0, 1, *(1 - 0.8 * i / 8 for i in range(9))])


def test_step_decay() -> None:
    """Milestones in any unit, from the beginning of the run; the rate falls at the milestone itself."""
    options = ["optimizer.schedule=step", "optimizer.milestones=['5 steps','80 samples']", "optimizer.step_factor=0.5"]
    assert rates(*options, NO_WARMUP) == [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    both = rates(*options, "optimizer.warmup=2 steps", "optimizer.cooldown=4 steps")
    assert both == pytest.approx([0, 1, 1, 1, 1, 0.5, 0.5, 0.375, 0.25, 0.125, 0])
    epochs = ["optimizer.schedule=step", "optimizer.milestones=['1 epochs','50%']", NO_WARMUP]
    assert rates(*epochs, steps=40)[9:22] == pytest.approx([1] + [0.1] * 10 + [0.01] * 2)


def test_kinds_of_warm_up() -> None:
    """Goyal et al., 2017, section 2.2: a low constant rate and then the whole one; or a gradual rise, from any start."""
    flat = ["optimizer.schedule=constant", "optimizer.warmup=4 steps"]
    assert rates(*flat, "optimizer.warmup_kind=constant") == [0.1] * 4 + [1] * 7
    assert rates(*flat, "optimizer.warmup_kind=constant", "optimizer.warmup_factor=0.25")[:5] == [0.25] * 4 + [1]
    assert rates(*flat, "optimizer.warmup_factor=0.25")[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates(*flat)[:5] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    cosine_after = rates("optimizer.warmup=4 steps", "optimizer.warmup_kind=constant")
    assert cosine_after[4:] == [cosine(1, 0, 10, 4)(s) for s in range(4, 11)]


@pytest.mark.parametrize("warmup", [0, 1, 2, 37, 333, 400])
@pytest.mark.parametrize("peak", [5e-4, 0.03, 1.7])
def test_the_default_is_the_published_cosine_bit_for_bit(warmup: int, peak: float) -> None:
    config = load(None, ["steps=333", f"optimizer.lr={peak!r}", f"optimizer.warmup={warmup} steps"])
    found = optimizer_schedules(config, plan(config, 1000))
    published = cosine(peak, 1e-6, 333, min(warmup, 333))
    assert [found["lr"](s) for s in range(335)] == [published(s) for s in range(335)]
    assert found.keys() == {"lr", "wd"}


def test_decay_of_the_head() -> None:
    config = load(None, ["steps=10", "optimizer.head_weight_decay=3", "optimizer.weight_decay=0.03"])
    found = optimizer_schedules(config, plan(config, 100))
    assert {found["wd_head"](s) for s in range(10)} == {3.0}
    config = load(None, ["steps=10", "optimizer.head_weight_decay=3", "optimizer.head_weight_decay_end=1"])
    found = optimizer_schedules(config, plan(config, 100))["wd_head"]
    assert found(0) == 3 and found(5) == pytest.approx(2) and found(10) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["optimizer.schedule=constant", "optimizer.cooldown=11 steps"], "optimizer.cooldown='11 steps'"),
        (["optimizer.schedule=constant", "optimizer.cooldown=200%"], "optimizer.cooldown='200%'"),
        (["optimizer.schedule=constant", "optimizer.cooldown=6 steps", "optimizer.warmup=5 steps"], "shorten one"),
        (["optimizer.schedule=step", "optimizer.milestones=['1 steps','2 epochs']"], "'2 epochs'"),
    ],
)
def test_a_run_too_short_for_its_schedule(options: list[str], named: str) -> None:
    with pytest.raises(UserError, match="optimizer") as caught:
        rates(*options)
    assert named in str(caught.value) and "10" in str(caught.value)


def test_pieces() -> None:
    assert [steps_down(8.0, 0.5, [2, 2, 4])(s) for s in range(6)] == [8, 8, 2, 2, 1, 1]
    assert [cooled_down(constant(4.0), 0.0, 4, 2)(s) for s in range(6)] == [4, 4, 4, 2, 0, 0]
    assert cooled_down(constant(4.0), 0.0, 4, 0)(99) == 4
    assert [warmed_up(constant(4.0), 1.0, 4.0, 1)(s) for s in range(2)] == [1, 4]


def test_averaging_begins_as_the_mean_of_all() -> None:
    """0, 1/2, 2/3, ... until the momentum is smaller."""
    momentum = averaging(0.9)
    assert [momentum(step) for step in (0, 1, 2, 8)] == pytest.approx([0, 1 / 2, 2 / 3, 8 / 9])
    assert momentum(9) == momentum(10_000) == 0.9
