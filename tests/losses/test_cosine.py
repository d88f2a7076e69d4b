"""Cosines of predictions and targets: all pairs one by one, and lightly's loss for two views."""

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity

from selfsup.losses.cosine import predicted_cosine
from tests.losses.checks import check, check_large, draw

VIEWS, BATCH, DIM = 4, 3, 5


def loops(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    cosines = []
    for s in range(len(predictions)):
        for t in range(len(targets)):
            for p, z in zip(predictions[s], targets[t].detach()):
                if s != t:
                    cosines.append(sum(p * z) / (sum(p * p) * sum(z * z)).sqrt())
    return torch.stack(cosines).mean()


@pytest.mark.parametrize(("views", "targets"), [(VIEWS, 2), (2, 2), (3, 1), (3, 3)])
def test_pairs_written_out(views: int, targets: int) -> None:
    check(predicted_cosine, loops, *draw((views, BATCH, DIM), (targets, BATCH, DIM)))


def test_equals_lightly() -> None:
    """Two views: SimSiam's symmetric loss, and BYOL's in equation 2 is 2 plus twice it, each way."""
    p, z = (x.float().requires_grad_() for x in draw((2, 8, 16), (2, 8, 16)))
    q = p.detach().clone().requires_grad_()
    theirs = NegativeCosineSimilarity()
    expected = 0.5 * (theirs(q[0], z[1].detach()) + theirs(q[1], z[0].detach()))
    expected.backward()
    loss = -predicted_cosine(p, z)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)
    assert z.grad is None


def test_large_and_zero_vectors() -> None:
    check_large(predicted_cosine, *draw((VIEWS, BATCH, DIM), (2, BATCH, DIM)))
    p = torch.zeros(2, BATCH, DIM, requires_grad=True)
    predicted_cosine(p, torch.ones(2, BATCH, DIM)).backward()
    assert p.grad is not None and p.grad.isfinite().all()


def test_too_few_views() -> None:
    for views, targets in ((1, 1), (2, 3), (2, 0)):
        with pytest.raises(ValueError, match="too few"):
            predicted_cosine(torch.ones(views, 2, 4), torch.ones(targets, 2, 4))
