"""Gram anchoring against the paper's equation in loops."""

import pytest
import torch

from selfsup.losses.gram import gram_loss
from tests.losses.checks import check, check_large, draw

B, P, D, E = 2, 4, 3, 5


def oracle(student: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    total = 0
    for x, y in zip(student, anchor, strict=True):
        x, y = ([v / (v @ v).sqrt() for v in rows] for rows in (x, y))
        total = total + sum((x[i] @ x[j] - y[i] @ y[j]) ** 2 for i in range(P) for j in range(P))
    return total / (B * P * P)


def test_is_the_paper() -> None:
    student, anchor = draw((B, P, D), (B, P, E))
    check(gram_loss, oracle, student, anchor)
    check_large(gram_loss, student, anchor)
    with pytest.raises(ValueError, match="same patches"):
        gram_loss(student, anchor[:, :3])


def test_features_may_turn() -> None:
    """Equal up to a rotation and to the lengths of vectors: no loss, and no gradient."""
    (student,) = draw((B, P, D))
    turn, _ = torch.linalg.qr(draw((D, D), seed=1)[0])
    student.requires_grad_()
    loss = gram_loss(student, 3 * student.detach() @ turn)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-25) and student.grad.abs().max() < 1e-12
