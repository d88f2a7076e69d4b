"""The collapse monitor names what happens, in time, and is quiet while nothing does."""

import math

import pytest
import torch

from selfsup.health import CollapseMonitor
from selfsup.losses.dino import teacher_health

HEALTHY = {"teacher_entropy": 0.6, "information": 0.4, "feature_std": 0.5}


def teacher(kind: str, k: int = 256, images: int = 32) -> dict[str, float]:
    """Health of a real distribution over prototypes, with a little noise on its logits."""
    noise = 0.01 * torch.randn(2, images, k)
    if kind == "uniform":
        logits = noise
    elif kind == "constant":
        logits = noise
        logits[..., 7] += 30
    else:  # each image its own few prototypes
        logits = noise + 8 * torch.eye(images, k)
    entropy, information = teacher_health(torch.softmax(logits, -1))
    return {"teacher_entropy": entropy.item(), "information": information.item(), "feature_std": 0.5}


def states(monitor: CollapseMonitor, figures: list[dict[str, float]], first: int = 1) -> list[str]:
    return [monitor.judge(first + i, f) for i, f in enumerate(figures)]


@pytest.mark.parametrize("kind", ["uniform", "constant"])
def test_both_kinds_from_the_start(kind: str) -> None:
    """Named by its own name within 50 steps, and not before it could be known."""
    torch.manual_seed(0)
    found = states(CollapseMonitor(), [teacher(kind) for _ in range(50)])
    assert found[-1] == f"collapse: {kind}"
    assert set(found) == {"ok", f"collapse: {kind}"}
    assert found[:20] == ["ok"] * 20


@pytest.mark.parametrize("kind", ["uniform", "constant"])
def test_collapse_in_the_middle_of_a_run(kind: str) -> None:
    torch.manual_seed(0)
    monitor = CollapseMonitor()
    assert set(states(monitor, [teacher("healthy") for _ in range(300)])) == {"ok"}
    found = states(monitor, [teacher(kind) for _ in range(50)], first=301)
    assert found[-1] == f"collapse: {kind}" and found[0] == "ok"


def test_constant_features() -> None:
    found = states(CollapseMonitor(), [{**HEALTHY, "feature_std": 0.01}] * 50)
    assert found[-1] == "collapse: features"


def test_does_not_cry_wolf() -> None:
    """Healthy figures, a bad start, dips shorter than its patience, and steps that were not finite."""
    torch.manual_seed(0)
    bad, good = teacher("uniform"), teacher("healthy")
    assert set(states(CollapseMonitor(), [HEALTHY] * 500)) == {"ok"}
    assert set(states(CollapseMonitor(), [bad] * 25 + [good] * 100)) == {"ok"}
    assert set(states(CollapseMonitor(), ([bad] * 15 + [good]) * 20)) == {"ok"}
    assert set(states(CollapseMonitor(), [dict.fromkeys(HEALTHY, math.nan)] * 100)) == {"ok"}
    assert set(states(CollapseMonitor(), [{}] * 100)) == {"ok"}  # a method without these figures


def test_recovers() -> None:
    monitor = CollapseMonitor()
    torch.manual_seed(0)
    states(monitor, [teacher("uniform")] * 60)
    assert set(states(monitor, [teacher("healthy")] * 5, first=61)) == {"ok"}


@pytest.mark.parametrize("at", [5, 30, 38, 45])
def test_a_resumed_monitor_judges_as_one(at: int) -> None:
    torch.manual_seed(0)
    figures = [teacher("uniform")] * 60
    whole = states(CollapseMonitor(), figures)
    first = CollapseMonitor()
    found = states(first, figures[:at])
    second = CollapseMonitor()
    second.restore(first.state())
    found += states(second, figures[at:], first=at + 1)
    assert found == whole
