"""What holds for every loss: an oracle in float64, gradients, float32, half precision, autocast, large inputs."""

from collections.abc import Callable

import torch

Loss = Callable[..., torch.Tensor]


def draw(*shapes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Normal float64 tensors."""
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)


def value_and_gradients(loss: Loss, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The loss and its gradient for every floating input; zeros for one that it does not depend on."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    free = [x for x in leaves if x.requires_grad]
    value = loss(*leaves)
    return value, torch.autograd.grad(value, free, materialize_grads=True)


def check(loss: Loss, oracle: Loss, *inputs: torch.Tensor, rounding: float = 0) -> None:
    """`loss` is `oracle`, in value and gradients, for these float64 inputs.

    rounding: what the value (not the gradients) may be off in float32 where it is a small difference of larger numbers.
    """
    assert all(x.dtype == torch.float64 or not x.is_floating_point() for x in inputs)
    value, gradients = value_and_gradients(loss, inputs)
    expected, references = value_and_gradients(oracle, inputs)
    assert value.dtype == torch.float64 and value.shape == () and expected.item() != 0
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients, references, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    first = inputs[0].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, *inputs[1:]), first)

    single = cast(inputs, torch.float32)
    value, gradients = value_and_gradients(loss, single)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=rounding)
    for a, b in zip(gradients, references, strict=True):
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()

    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(*single), value)

    half = cast(inputs, torch.bfloat16)
    assert torch.equal(loss(*half), loss(*cast(half, torch.float32)))


def check_large(loss: Loss, *inputs: torch.Tensor) -> None:
    """Inputs of about 1e4 give a finite loss and finite gradients in float32."""
    value, gradients = value_and_gradients(
        loss, cast([x * 1e4 if x.is_floating_point() else x for x in inputs], torch.float32)
    )
    assert value.isfinite() and all(g.isfinite().all() for g in gradients)


def cast(inputs, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(x.detach().to(dtype) if x.is_floating_point() else x for x in inputs)
