"""Loss spikes: what is one and what is not, what the window holds, and that a restored detector goes on the same."""

import json
import math
import random

import pytest

from selfsup.spikes import SpikeDetector


def fed(losses: list[float], factor: float | None = 10, window: int = 64) -> SpikeDetector:
    detector = SpikeDetector(factor, window)
    for step, loss in enumerate(losses):
        detector.judge(step, loss)
    return detector


def test_a_loss_above_factor_times_the_median_is_a_spike() -> None:
    """The bound is factor x median exactly for a steady loss; at the bound is no spike yet."""
    detector = fed([4.0] * 32)
    assert detector.threshold() == 40.0
    assert not detector.judge(32, 40.0)
    assert detector.judge(33, math.nextafter(40.0, 50.0))
    assert detector.judge(34, 4000.0)
    assert not detector.judge(35, 4.0)


def test_no_verdict_before_a_quarter_of_the_window() -> None:
    """With window 64, sixteen finite losses are needed; losses that are not finite do not count among them."""
    detector = fed([4.0] * 15 + [math.nan, math.inf])
    assert not detector.judge(17, 4000.0)  # judged on 15: remembered, as nothing says that it is unusual
    assert detector.judge(18, 1e9)
    assert SpikeDetector(10, window=1).threshold() == math.inf  # never on nothing at all


def test_spikes_and_non_finite_losses_never_enter_the_window() -> None:
    """However long they last, the bound stays; a level that rises step by step moves it."""
    detector = fed([2.0] * 20)
    before = detector.state()
    assert all(detector.judge(20 + i, 500.0) for i in range(200))
    assert not any(detector.judge(300 + i, x) for i, x in enumerate([math.nan, math.inf, -math.inf]))
    assert detector.state() == before
    level, spikes = 2.0, 0
    for step in range(400, 900):
        level *= 1.02
        spikes += detector.judge(step, level)
    assert spikes == 0 and level > 20_000


def test_the_window_forgets() -> None:
    """A loss that fell to a hundredth is judged by where it is now, not by where it began."""
    detector = fed([100.0] * 64 + [1.0] * 64)
    assert detector.threshold() == 10.0
    assert len(detector.state()) == 64


def test_off_by_default() -> None:
    detector = fed([1.0] * 100, factor=None)
    assert not detector.judge(100, 1e30)


@pytest.mark.parametrize("offset", [0.0, -0.5, -5.0])
def test_losses_around_and_below_zero(offset: float) -> None:
    """factor x median would call every one of them a spike (or none, for a negative median)."""
    draw = random.Random(7)
    detector = SpikeDetector(10, 64)
    assert not any(detector.judge(step, offset + draw.gauss(0, 0.1)) for step in range(2000))
    assert detector.judge(2000, 1000.0)


def test_a_loss_of_exactly_zero_gives_no_verdict() -> None:
    detector = fed([0.0] * 64)
    assert not detector.judge(64, 0.01)


def test_a_healthy_noisy_loss_has_no_spikes() -> None:
    """A loss that falls from 10 to 3 with heavy noise: none in 5,000 steps with factor 3."""
    draw = random.Random(3)
    detector = SpikeDetector(3, 64)
    losses = [3 + 7 * math.exp(-step / 300) * draw.lognormvariate(0, 0.2) for step in range(5000)]
    assert not any(detector.judge(step, loss) for step, loss in enumerate(losses))


def test_restored_it_judges_as_if_never_stopped() -> None:
    """Through JSON, at any step; also back to an earlier step, as a rollback does."""
    draw = random.Random(11)
    losses = [draw.lognormvariate(1, 0.3) * (1000 if draw.random() < 0.05 else 1) for _ in range(300)]
    whole = SpikeDetector(10, 32)
    verdicts = [whole.judge(step, loss) for step, loss in enumerate(losses)]
    assert 3 < sum(verdicts) < 40
    for stop in (1, 7, 8, 31, 32, 33, 150):
        state = json.loads(json.dumps(fed(losses[:stop], 10, 32).state()))
        resumed = SpikeDetector(10, 32)
        resumed.restore(state)
        assert [resumed.judge(stop + i, loss) for i, loss in enumerate(losses[stop:])] == verdicts[stop:]
        whole.restore(state)
        assert [whole.judge(stop + i, loss) for i, loss in enumerate(losses[stop:])] == verdicts[stop:]


def test_steps_must_increase_unless_restored() -> None:
    """Going back without restoring would count the same losses twice."""
    detector = fed([1.0] * 20)
    for step in (19, 3):
        with pytest.raises(ValueError, match="restore"):
            detector.judge(step, 1.0)
    assert len(detector.state()) == 20
    detector.restore([1.0] * 3)
    assert not detector.judge(3, 1.0)


def test_a_larger_state_is_cut_to_the_window() -> None:
    """The window may be made smaller between two starts: the newest losses stay."""
    detector = SpikeDetector(10, 4)
    detector.restore([float(x) for x in range(10)])
    assert detector.state() == [6.0, 7.0, 8.0, 9.0]


@pytest.mark.parametrize(("factor", "window"), [(1.0, 64), (0.5, 64), (-3, 64), (math.nan, 64), (10, 0)])
def test_senseless_settings_are_refused(factor: float, window: int) -> None:
    with pytest.raises(ValueError, match="seen"):
        SpikeDetector(factor, window)
