"""MSN's loss against lightly's and against the paper's equations in loops; the mean prediction over two processes."""

import math

import pytest
import torch
from lightly.loss import MSNLoss

from selfsup.losses.msn import log_predictions, msn_loss, msn_targets
from tests.losses.checks import check, draw, value_and_gradients

V, B, D, K = 3, 4, 5, 6
TAU, T = 0.3, 0.5


def ours(
    z: torch.Tensor, target: torch.Tensor, q: torch.Tensor, sinkhorn: int = 0, weight: float = 0.7
) -> torch.Tensor:
    """Anchors [V, B, D], target view [B, D], prototypes [K, D]."""
    targets = msn_targets(log_predictions(target, q, TAU), T, sinkhorn)
    parts = msn_loss(log_predictions(z, q, TAU), targets)
    return parts.cross_entropy + weight * parts.mean_entropy


def prediction(z: torch.Tensor, q: torch.Tensor) -> list[torch.Tensor]:
    scores = [((z @ c) / (z @ z).sqrt() / (c @ c).sqrt() / TAU).exp() for c in q]
    return [s / sum(scores) for s in scores]


def paper(z: torch.Tensor, target: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 2, one number at a time."""
    losses, mean = [], [torch.zeros((), dtype=z.dtype)] * K
    for b in range(B):
        sharp = [p.detach() ** (1 / T) for p in prediction(target[b], q)]
        sharp = [p / sum(sharp) for p in sharp]
        for v in range(V):
            p = prediction(z[v, b], q)
            losses.append(-sum(t * x.log() for t, x in zip(sharp, p, strict=True)))
            mean = [m + x / (V * B) for m, x in zip(mean, p, strict=True)]
    return sum(losses) / len(losses) + 0.7 * (math.log(K) + sum(m * m.log() for m in mean))


def test_is_the_paper() -> None:
    z, target, q = draw((V, B, D), (B, D), (K, D))
    value, gradients = value_and_gradients(ours, (z, target, q))
    expected, references = value_and_gradients(paper, (z, target, q))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients, references, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert (gradients[1] == 0).all()  # the target view gets none
    check(ours, paper, z, target, q)


@pytest.mark.parametrize("sinkhorn", [0, 3])
def test_is_lightlys(sinkhorn: int) -> None:
    z, target, q = draw((V, B, D), (B, D), (K, D), seed=1)
    theirs = MSNLoss(temperature=TAU, sinkhorn_iterations=sinkhorn, regularization_weight=0.7)
    value, gradients = value_and_gradients(lambda z, q: ours(z, target, q, sinkhorn), (z, q))
    expected, references = value_and_gradients(lambda z, q: theirs(z.flatten(0, 1), target, q, T), (z, q))
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    for a, b in zip(gradients, references, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_sure_anchors_stay_finite() -> None:
    """An anchor opposite to its target at a low temperature: 2 / tau a row, where lightly's float32 has infinity."""
    q = torch.eye(2)
    z, target = torch.tensor([[[1.0, -1.0]]], requires_grad=True), torch.tensor([[-1.0, 1.0]])
    loss = msn_loss(log_predictions(z, q, 0.01), msn_targets(log_predictions(target, q, 0.01), 0.25))
    loss.cross_entropy.backward()
    assert loss.cross_entropy.item() == pytest.approx(2**0.5 / 0.01, rel=1e-4) and z.grad.isfinite().all()
    assert not MSNLoss(temperature=0.01, sinkhorn_iterations=0)(z[0].detach(), target, q).isfinite()


def test_regulariser() -> None:
    """0 where prototypes are used alike, ln K where one takes all; `mean_over` decides over what the mean is taken."""
    one_hot = torch.eye(4).clamp(min=1e-12).log()[:, None]  # [4, 1, 4]
    targets = torch.full((1, 4), 0.25)
    assert msn_loss(one_hot, targets).mean_entropy.item() == pytest.approx(0, abs=1e-6)
    assert msn_loss(one_hot[:1], targets).mean_entropy.item() == pytest.approx(math.log(4), rel=1e-5)
    over_all = msn_loss(one_hot[:1], targets, lambda mean: (mean + one_hot[1:].exp().sum(dim=(0, 1))) / 4)
    assert over_all.mean_entropy.item() == pytest.approx(0, abs=1e-6)
