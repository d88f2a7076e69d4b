"""VICReg's terms: loops over images, dimensions and pairs in float64, and lightly's loss for two views."""

import pytest
import torch
from lightly.loss import VICRegLoss

from selfsup.losses.vicreg import vicreg_terms
from tests.losses.checks import check, check_large, draw

WEIGHTS = (25.0, 25.0, 1.0)
SHAPES = [(2, 2), (4, 2), (3, 1)]


def loss(z: torch.Tensor, targets: int) -> torch.Tensor:
    return sum(w * term for w, term in zip(WEIGHTS, vicreg_terms(z, targets)))


def loops(z: torch.Tensor, targets: int) -> torch.Tensor:
    views, batch, dim = z.shape
    pairs = [((z[s] - z[t]) ** 2).mean() for t in range(targets) for s in range(views) if s != t]
    hinges, squares = [], []
    for v in range(views):
        mean = [sum(z[v, :, j]) / batch for j in range(dim)]
        for j in range(dim):
            for k in range(dim):
                c = sum((z[v, n, j] - mean[j]) * (z[v, n, k] - mean[k]) for n in range(batch)) / (batch - 1)
                if j == k:
                    hinges.append(torch.relu(1 - (c + 1e-4).sqrt()))
                else:
                    squares.append(c**2 / dim)
    invariance = torch.stack(pairs).mean()
    return 25 * invariance + 25 * torch.stack(hinges).mean() + 2 * sum(squares) / views


@pytest.mark.parametrize(("views", "targets"), SHAPES)
def test_written_out(views: int, targets: int) -> None:
    (z,) = draw((views, 5, 4))
    check(lambda x: loss(x, targets), lambda x: loops(x, targets), 0.7 * z)


def test_equals_lightly() -> None:
    (z,) = draw((2, 32, 64))
    ours, theirs = (z.float().mul(0.8).requires_grad_() for _ in range(2))
    expected = VICRegLoss()(theirs[0], theirs[1])
    expected.backward()
    value = loss(ours, 2)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max()


def test_collapse_is_seen() -> None:
    """Constant embeddings: nothing but the variance, at its largest; its gradient is finite."""
    z = torch.ones(2, 8, 4, dtype=torch.float64, requires_grad=True)
    invariance, variance, covariance = vicreg_terms(z, 2)
    assert invariance == 0 and covariance == 0 and variance.item() == pytest.approx(1 - 0.01)
    variance.backward()
    assert z.grad is not None and z.grad.isfinite().all()


def test_large() -> None:
    check_large(lambda x: loss(x, 2), *draw((3, 6, 4)))


def test_too_few() -> None:
    with pytest.raises(ValueError, match="too few"):
        vicreg_terms(torch.zeros(1, 4, 3), 1)
    with pytest.raises(ValueError, match="at least 2 images"):
        vicreg_terms(torch.zeros(2, 1, 3), 2)
