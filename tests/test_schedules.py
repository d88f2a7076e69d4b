"""Schedules against the published formulas, and lengths in every unit."""

import numpy as np
import pytest

from selfsup.config import load
from selfsup.errors import UserError
from selfsup.schedules import Plan, constant, cosine, evaluate, linear, optimizer_schedules, plan


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
