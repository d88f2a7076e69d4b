"""Float32 at least, also under autocast; directions of vectors that may be zero."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its floating tensors raised to float32 at least, and without autocast, which would round products."""

    @functools.wraps(function)
    def raised(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        call: Callable[..., R] = function
        with torch.autocast(device, enabled=False):
            return call(*map(_raise, args), **{name: _raise(value) for name, value in kwargs.items()})

    return raised


def _raise(value: Any) -> Any:
    return at_least_float32(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """x / |x|; a zero vector stays zero and gets a gradient as if its length were 1 (F.normalize's: 1e12 times that)."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse what would be broadcast in silence."""
    if student.shape != teacher.shape:
        raise ValueError(f"student {list(student.shape)} and teacher {list(teacher.shape)} are of different shapes")


def at_least(images: int, least: int, what: str) -> None:
    """Refuse batches in which a relation between images does not exist."""
    if images < least:
        raise ValueError(f"{what} needs at least {least} images in a batch, not {images}")
