"""CRD: loops over the critic as the paper writes it, and the memory's rules."""

import math

import pytest
import torch

from selfsup.losses.contrastive import crd_bank, crd_in_batch, crd_log_normaliser, crd_update
from selfsup.losses.numerics import unit
from tests.losses.checks import check, check_large, draw, value_and_gradients

B, D, M, N, TAU = 4, 3, 9, 5, 0.3
INDEX = torch.tensor([[2, 0, 1, 1, 8, 3], [5, 5, 6, 0, 2, 2], [0, 1, 2, 3, 4, 5], [8, 7, 0, 7, 7, 1]])  # own row first


def critic(score: torch.Tensor, ratio: float, z: float = 1.0) -> torch.Tensor:
    return score.exp() / z / (score.exp() / z + ratio)


def in_batch_loops(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    total = s.new_zeros(())
    for i in range(len(s)):
        for j in range(len(s)):
            h = critic(sum(s[i] * t[j]) / TAU, (len(s) - 1) / len(s))
            total = total - (h.log() if i == j else (1 - h).log())
    return total / len(s)


def test_in_batch() -> None:
    inputs = tuple(unit(x) for x in draw((B, D), (B, D)))
    check(lambda s, t: crd_in_batch(s, t, TAU), in_batch_loops, *inputs)
    check_large(lambda s, t: crd_in_batch(s, t, TAU), *inputs)
    with pytest.raises(ValueError, match="at least 2 images"):
        crd_in_batch(*(x[:1] for x in inputs))
    with pytest.raises(ValueError, match="different shapes"):
        crd_in_batch(inputs[0], inputs[1][:2])


def bank_loops(s, t, s_bank, t_bank, index, z=1.0) -> torch.Tensor:
    total = 0 * (s_bank.sum() + t_bank.sum())
    for x, bank in ((s, t_bank.detach()), (t, s_bank.detach())):
        for i in range(len(x)):
            for position, row in enumerate(index[i].tolist()):
                h = critic(sum(x[i] * bank[row]) / TAU, N / M, z)
                total = total - (h.log() if position == 0 else (1 - h).log()) / len(x)
    return total


@pytest.mark.parametrize("z", [1.0, 20.0, 0.4])
def test_bank(z: float) -> None:
    """In float32 too; the banks get no gradient."""
    inputs = (*(unit(x) for x in draw((B, D), (B, D), (M, D), (M, D))), INDEX)
    log_z = math.log(z)
    check(lambda *x: crd_bank(*x, TAU, log_z), lambda *x: bank_loops(*x, z), *inputs)
    check_large(lambda *x: crd_bank(*x, TAU, log_z), *inputs)
    one = (inputs[0][:1], inputs[1][:1], *inputs[2:4], INDEX[:1])
    torch.testing.assert_close(crd_bank(*one, TAU), bank_loops(*one), rtol=1e-12, atol=0)


def test_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    """Micro-batches of equal size: nothing depends on who else is in the batch."""
    s, t, s_bank, t_bank = (unit(x) for x in draw((B, D), (B, D), (M, D), (M, D)))
    whole = crd_bank(s, t, s_bank, t_bank, INDEX)
    parts = [crd_bank(s[i], t[i], s_bank, t_bank, INDEX[i]) for i in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, sum(parts) / 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5, 20.0])
def test_normaliser(temperature: float) -> None:
    """In one and three dimensions the expectation is cosh k and sinh(k) / k with k = 1 / tau."""
    k = 1 / temperature
    log_sinh, log_cosh = (k + math.log((1 + sign * math.exp(-2 * k)) / 2) for sign in (-1, 1))
    assert crd_log_normaliser(7, 1, temperature) == pytest.approx(math.log(7) + log_cosh, rel=1e-10)
    assert crd_log_normaliser(7, 3, temperature) == pytest.approx(
        math.log(7) + log_sinh - math.log(k), rel=1e-10, abs=1e-10
    )


def test_normaliser_is_what_the_first_step_would_estimate() -> None:
    """The published estimate: M times the mean of e^score over the batch and its rows, which are random."""
    rows, dim = 20_000, 128
    g = torch.Generator().manual_seed(0)
    x, bank = (unit(torch.randn(n, dim, generator=g, dtype=torch.float64)) for n in (64, rows))
    index = torch.randint(rows, (64, 2000), generator=g)
    scores = (bank[index] @ x[:, :, None]).squeeze(-1) / 0.07
    assert crd_log_normaliser(rows, dim, 0.07) == pytest.approx(math.log(rows * scores.exp().mean().item()), abs=0.03)


def test_update() -> None:
    rows, x = (unit(v) for v in draw((B, D), (B, D)))
    found = crd_update(rows, x.requires_grad_(), 0.7)
    assert not found.requires_grad
    for i in range(B):
        v = 0.7 * rows[i] + 0.3 * x[i].detach()
        torch.testing.assert_close(found[i], v / v.norm(), rtol=1e-12, atol=0)
    opposite = crd_update(rows, -rows, 0.5)
    assert torch.equal(opposite, torch.zeros_like(rows))  # and not NaN


def test_gradient_moves_pairs_together() -> None:
    s, t = (unit(x) for x in draw((B, D), (B, D)))
    _, (gradient, _) = value_and_gradients(lambda s, t: crd_in_batch(s, t, TAU), (s, t))
    assert crd_in_batch(s - 1e-3 * gradient, t, TAU) < crd_in_batch(s, t, TAU)


def test_no_negatives() -> None:
    s, bank = (unit(x) for x in draw((B, D), (M, D)))
    with pytest.raises(ValueError, match="at least one other"):
        crd_bank(s, s, bank, bank, INDEX[:, :1])
