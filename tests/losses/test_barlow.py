"""Barlow Twins' terms: loops over pairs and dimensions in float64, and lightly's loss for two views."""

import pytest
import torch
from lightly.loss import BarlowTwinsLoss

from selfsup.losses.barlow import barlow_terms
from tests.losses.checks import check, check_large, draw

WEIGHT = 0.01


def loss(z: torch.Tensor, targets: int) -> torch.Tensor:
    on, off = barlow_terms(z, targets)
    return on + WEIGHT * off


def loops(z: torch.Tensor, targets: int) -> torch.Tensor:
    views, batch, dim = z.shape
    unit = [[(x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5).sqrt() for x in z[v].t()] for v in range(views)]
    pairs = []
    for t in range(targets):
        for s in range(views):
            if s == t:
                continue
            total = z.new_zeros(())
            for i in range(dim):
                for j in range(dim):
                    c = sum(unit[t][i] * unit[s][j]) / batch
                    total = total + ((1 - c) ** 2 if i == j else WEIGHT * c**2)
            pairs.append(total)
    return torch.stack(pairs).mean()


@pytest.mark.parametrize(("views", "targets"), [(2, 2), (4, 2), (3, 1), (3, 3)])
def test_written_out(views: int, targets: int) -> None:
    (z,) = draw((views, 5, 4))
    check(lambda x: loss(x, targets), lambda x: loops(x, targets), z)


def test_equals_lightly() -> None:
    (z,) = draw((2, 32, 48))
    ours, theirs = (z.float().requires_grad_() for _ in range(2))
    expected = BarlowTwinsLoss(lambda_param=WEIGHT)(theirs[0], theirs[1])
    expected.backward()
    value = loss(ours, 2)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max()


def test_large_and_constant() -> None:
    check_large(lambda x: loss(x, 2), *draw((3, 6, 4)))
    z = torch.ones(2, 8, 4, requires_grad=True)
    on, off = barlow_terms(z, 2)
    assert on == 4 and off == 0  # a collapse correlates with nothing
    (on + off).backward()
    assert z.grad is not None and z.grad.isfinite().all()


def test_too_few() -> None:
    with pytest.raises(ValueError, match="too few"):
        barlow_terms(torch.zeros(1, 4, 3), 1)
    with pytest.raises(ValueError, match="at least 2 images"):
        barlow_terms(torch.zeros(2, 1, 3), 2)
