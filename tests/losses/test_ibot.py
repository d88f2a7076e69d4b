"""The loss of masked patches and KoLeo: in plain loops, against lightly's, and their gradients."""

import math

import pytest
import torch
from lightly.loss import IBOTPatchLoss, KoLeoLoss

from selfsup.losses.ibot import patch_loss
from selfsup.losses.koleo import koleo_loss


def test_patch_loss() -> None:
    """Three images with two, no and three masked patches."""
    counts, weights = (2, 0, 3), torch.tensor([1 / 2] * 2 + [1 / 3] * 3, dtype=torch.float64)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64).softmax(-1)
    loss = patch_loss(student, teacher, weights, 3, 0.1)
    total, row = 0.0, 0
    for count in counts:
        terms = []
        for _ in range(count):
            z = [v / 0.1 for v in student[row].tolist()]
            lse = max(z) + math.log(sum(math.exp(v - max(z)) for v in z))
            terms.append(-sum(q * (v - lse) for q, v in zip(teacher[row].tolist(), z)))
            row += 1
        total += sum(terms) / max(1, count)
    assert loss.item() == pytest.approx(total / 3, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s: patch_loss(s, teacher, weights, 3, 0.1), (student,))
    none = patch_loss(student[:0], teacher[:0], weights[:0], 3, 0.1)
    assert none.item() == 0 and torch.autograd.grad(none, student)[0].abs().max() == 0


def test_patch_loss_is_lightlys() -> None:
    """Value and gradient, with a centre of zero."""
    mask = torch.rand(4, 3, 3) < 0.5
    mask[0] = False
    number = int(mask.sum())
    logits, ours, theirs = (torch.randn(number, 16) for _ in range(3))
    theirs = ours.clone().requires_grad_()
    ours.requires_grad_()
    peer = IBOTPatchLoss(output_dim=16, teacher_temp=0.07, student_temp=0.1)
    expected = peer(teacher_out=logits, student_out=theirs, mask=mask)
    counts = mask.flatten(1).sum(1)
    weights = torch.cat([torch.full((int(n),), 1 / int(n)) for n in counts if n])
    loss = patch_loss(ours, (logits / 0.07).softmax(-1), weights, 4, 0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_koleo_is_lightlys() -> None:
    ours = torch.randn(16, 8, dtype=torch.float64).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    loss, expected = koleo_loss(ours), KoLeoLoss()(theirs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    assert torch.autograd.gradcheck(koleo_loss, (ours,))


def test_koleo_of_equal_images() -> None:
    """Two of three are the same: the loss is large, and gradients are finite."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = koleo_loss(x)
    loss.backward()
    assert loss.item() == pytest.approx((2 * -math.log(1e-8) - math.log(2**0.5)) / 3, rel=1e-5)
    assert torch.isfinite(x.grad).all()
    with pytest.raises(ValueError, match="at least 2 images"):
        koleo_loss(x[:1])
