"""The teacher's moving average: parameters averaged, buffers copied, nothing moved when a step was refused."""

import copy

import pytest
import torch
from torch import nn

from selfsup.ema import ema_update


def networks(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).to(dtype)
    teacher = copy.deepcopy(student)
    for p in student.parameters():
        p.data.normal_()
    student.train()
    student(torch.randn(8, 5, dtype=dtype))  # moves running statistics and num_batches_tracked
    return teacher, student


@pytest.mark.parametrize("flag", [False, True])
def test_exact(flag: bool) -> None:
    """After one update and after twenty, against the formula in float64; batch norm's buffers are the student's."""
    teacher, student = networks(torch.float64)
    expected = {k: v.clone() for k, v in teacher.named_parameters()}
    for _ in range(20):
        ema_update(teacher, student, 0.9, torch.ones(()) if flag else None)
        expected = {k: 0.9 * v + 0.1 * student.get_parameter(k) for k, v in expected.items()}
    for k, v in teacher.named_parameters():
        torch.testing.assert_close(v, expected[k], rtol=1e-13, atol=0)
    for k, b in teacher.named_buffers():
        assert torch.equal(b, student.get_buffer(k)), k
    assert teacher.get_buffer("1.num_batches_tracked") == 1


def test_refused_step_leaves_the_teacher_bit_for_bit() -> None:
    teacher, student = networks()
    with torch.no_grad():
        next(teacher.parameters())[0, 0] = 1e-42  # a denormal: any arithmetic with flushing would show
    before = {k: v.clone() for k, v in teacher.named_parameters()}
    ema_update(teacher, student, 0.9, torch.zeros(()))
    for k, v in teacher.named_parameters():
        assert torch.equal(v.view(torch.int32), before[k].view(torch.int32)), k


def test_momentum_of_one_and_zero() -> None:
    teacher, student = networks()
    before = copy.deepcopy(teacher.state_dict())
    ema_update(teacher, student, 1.0, torch.ones(()))
    assert all(torch.equal(p, before[k]) for k, p in teacher.named_parameters())
    ema_update(teacher, student, 0.0, torch.ones(()))
    assert all(torch.equal(p, student.get_parameter(k)) for k, p in teacher.named_parameters())


def test_nothing_is_shared() -> None:
    """Buffers and parameters are copied by value: later steps of the student do not show in the teacher."""
    teacher, student = networks()
    ema_update(teacher, student, 0.0)
    own = {t.data_ptr() for t in student.state_dict().values()}
    assert all(t.data_ptr() not in own for t in teacher.state_dict().values())
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        for t in student.state_dict().values():
            t.add_(1)
    assert all(torch.equal(t, before[k]) for k, t in teacher.state_dict().items())


def test_mixed_types() -> None:
    """Parameters of two types, each averaged in its own."""
    teacher, student = networks()
    teacher[2].double(), student[2].double()
    expected = {k: 0.5 * (v + student.get_parameter(k)).detach() for k, v in teacher.named_parameters()}
    ema_update(teacher, student, 0.5, torch.ones(()))
    for k, v in teacher.named_parameters():
        assert v.dtype == expected[k].dtype
        torch.testing.assert_close(v, expected[k])


def test_different_networks_are_refused() -> None:
    teacher, student = networks()
    with pytest.raises(ValueError, match="parameters"):
        ema_update(teacher, nn.Linear(5, 4), 0.9)
    del student


def test_no_gradient_is_recorded() -> None:
    teacher, student = networks()
    ema_update(teacher, student, 0.9)
    assert all(p.grad_fn is None for p in teacher.parameters())
