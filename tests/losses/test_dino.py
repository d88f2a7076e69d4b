"""DINO's loss against lightly's and against float64."""

import pytest
import torch
from lightly.loss import DINOLoss

from selfsup.losses.dino import dino_loss, entropy, teacher_health, teacher_probabilities

VIEWS, BATCH = 6, 8


def draw(k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(VIEWS, BATCH, k, generator=g).requires_grad_()
    return student, torch.randn(2, BATCH, k, generator=g)


@pytest.mark.parametrize("k", [16, 512, 4096])
def test_equals_lightly_over_several_steps(k: int) -> None:
    """Loss, gradient and centre in float32, while centre and temperature move."""
    theirs = DINOLoss(output_dim=k, student_temp=0.1, center_momentum=0.9)
    center = torch.zeros(k)
    for step, temperature in enumerate((0.04, 0.045, 0.05, 0.06, 0.07)):
        student, teacher = draw(k, step)
        other = student.detach().clone().requires_grad_()
        expected = theirs(list(teacher), list(other), teacher_temp=torch.tensor(temperature))
        expected.backward()

        loss = dino_loss(student, teacher_probabilities(teacher, center, temperature), 0.1)
        loss.backward()
        center = torch.lerp(teacher.mean(dim=(0, 1)), center, 0.9)

        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        assert (student.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max()
        torch.testing.assert_close(center, theirs.center.flatten(), rtol=1e-5, atol=1e-7)


def test_large_k_equals_float64() -> None:
    """At the published K = 65,536 the float32 loss and gradient are those of float64."""
    student, teacher = draw(65536, 0)
    wide = student.detach().double().requires_grad_()
    zero = torch.zeros(65536)
    loss = dino_loss(student, teacher_probabilities(teacher, zero, 0.04), 0.1)
    exact = dino_loss(wide, teacher_probabilities(teacher.double(), zero.double(), 0.04), 0.1)
    loss.backward()
    exact.backward()
    assert exact.dtype == torch.float64
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert (student.grad.double() - wide.grad).abs().max() <= 1e-5 * wide.grad.abs().max()


def test_pairs_written_out() -> None:
    """Every pair of different views, in float64, one by one."""
    student, teacher = (x.double() for x in draw(32, 3))
    q = teacher_probabilities(teacher, torch.ones(32, dtype=torch.float64), 0.05)
    pairs = [
        -(q[t] * torch.log_softmax(student[s] / 0.1, -1)).sum(-1).mean()
        for t in range(2)
        for s in range(VIEWS)
        if s != t
    ]
    torch.testing.assert_close(dino_loss(student, q, 0.1), torch.stack(pairs).mean(), rtol=1e-12, atol=0)


def test_one_teacher_view() -> None:
    student, teacher = (x.double() for x in draw(32, 4))
    q = teacher_probabilities(teacher[:1], torch.zeros(32, dtype=torch.float64), 0.05)
    pairs = [-(q[0] * torch.log_softmax(student[s] / 0.1, -1)).sum(-1).mean() for s in range(1, VIEWS)]
    torch.testing.assert_close(dino_loss(student, q, 0.1), torch.stack(pairs).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("views", "targets"), [(1, 1), (2, 2), (VIEWS, 2), (VIEWS, 1)])
def test_same_views(views: int, targets: int) -> None:
    """A frozen teacher's distribution of the very same view counts too; one view is enough."""
    student, teacher = (x.double() for x in draw(32, 5))
    z = student[:views].detach().requires_grad_()
    q = teacher_probabilities(teacher[:targets], torch.zeros(32, dtype=torch.float64), 0.05)
    loss = dino_loss(z, q, 0.1, same_view=True)
    pairs = [-(q[t] * torch.log_softmax(z[s] / 0.1, -1)).sum(-1).mean() for t in range(targets) for s in range(views)]
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (loss, expected)), rtol=1e-10, atol=1e-14)


def test_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    student = torch.randn(3, 2, 5, generator=g, dtype=torch.float64, requires_grad=True)
    q = torch.softmax(torch.randn(2, 2, 5, generator=g, dtype=torch.float64), -1)
    assert torch.autograd.gradcheck(lambda z: dino_loss(z, q, 0.5), student)


def test_half_precision_logits_are_summed_in_float32() -> None:
    student, teacher = draw(512, 1)
    q = teacher_probabilities(teacher.bfloat16(), torch.zeros(512), 0.04)
    assert q.dtype == torch.float32
    assert dino_loss(student.bfloat16(), q, 0.1).dtype == torch.float32


def test_too_few_views() -> None:
    with pytest.raises(ValueError, match="different views"):
        dino_loss(torch.zeros(1, 2, 4), torch.full((1, 2, 4), 0.25), 0.1)
    with pytest.raises(ValueError, match="2 teacher views are too few"):
        dino_loss(torch.zeros(1, 2, 4), torch.full((2, 2, 4), 0.25), 0.1, same_view=True)


def test_health_names_both_collapses() -> None:
    """Uniform: entropy 1, information 0. Constant: entropy 0, information 0. One prototype an image: ln B."""
    uniform = torch.full((2, 8, 64), 1 / 64)
    ratio, information = teacher_health(uniform)
    assert ratio == pytest.approx(1, abs=1e-5) and information == pytest.approx(0, abs=1e-5)
    constant = torch.zeros(2, 8, 64)
    constant[..., 3] = 1
    ratio, information = teacher_health(constant)
    assert ratio == 0 and information == 0
    each = torch.eye(8, 64).expand(2, 8, 64)
    ratio, information = teacher_health(each)
    assert ratio == 0 and information == pytest.approx(torch.log(torch.tensor(8.0)).item())
    assert entropy(uniform).shape == (2, 8)
