"""The precision of losses, and directions of vectors that may be zero."""

import pytest
import torch

from selfsup.losses.numerics import at_least, full_precision, same_shape, unit


@full_precision
def product(a: torch.Tensor, b: torch.Tensor, *, rows: torch.Tensor | None = None) -> torch.Tensor:
    return a @ b if rows is None else (a @ b)[rows]


def test_full_precision() -> None:
    a, b = torch.randn(4, 5), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        assert torch.equal(product(a, b), product(a, b=b))
        assert product(a, b).dtype == torch.float32
    assert torch.equal(product(a.half(), b=b.half()), a.half().float() @ b.half().float())
    assert product(a.double(), b.double()).dtype == torch.float64
    assert product(a, b, rows=torch.tensor([1, 1])).shape == (2, 6)  # integers stay integers


def test_unit() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    assert torch.equal(unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64))
    unit(x).sum().backward()
    assert torch.equal(x.grad[1], torch.ones(2, dtype=torch.float64))
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit, y)
    assert torch.autograd.gradcheck(lambda t: unit(t, dim=0), y)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"student \[2, 3\] and teacher \[2, 1\]"):
        same_shape(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="at least 3 images"):
        at_least(2, 3, "it")
