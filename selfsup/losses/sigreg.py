"""SIGReg: are embeddings isotropic Gaussian? (Balestriero & LeCun, 2025, "LeJEPA", sections 4.2.3 and 5.1, algorithm 1).

The embeddings are projected on random directions, and each projection is tested against N(0, 1) by the statistic of Epps &
Pulley (1983), the distance of characteristic functions:

    T = N * integral of |phi_N(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt,    phi_N(t) = mean of exp(i t x_n)

by the trapezoidal rule on [-t_max, t_max]. The integrand is even, so only t >= 0 is computed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from selfsup.losses.numerics import full_precision


def same(x: Tensor) -> Tensor:
    """What `reduce` is in one process."""
    return x


@full_precision
def sigreg(
    z: Tensor,
    directions: Tensor,
    images: int,
    *,
    points: int = 17,
    t_max: float = 5.0,
    reduce: Callable[[Tensor], Tensor] = same,
) -> Tensor:
    """T, a mean over the directions and the views; each view is a sample of its own (algorithm 2).

    z: [V, B, D]. directions: [D, M], columns of length 1. images: N, of the whole batch. points: knots on [-t_max, t_max], an
    odd number. reduce: the mean of a tensor over all ranks, with gradient, so that phi is that of the whole batch.
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points={points}: the rule needs an odd number of knots, 3 or more, so that 0 is one")
    half = points // 2
    t = torch.linspace(0, t_max, half + 1, device=z.device, dtype=z.dtype)  # [T]
    gauss = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * t_max / half)  # of both t and -t; 0 has no partner, the ends count half
    weights[0] = weights[-1] = t_max / half
    parts = []
    for view in z @ directions:  # [B, M]: view by view, for the memory
        angle = view[:, :, None] * t  # [B, M, T]
        parts.append(torch.stack((angle.cos().mean(0), angle.sin().mean(0))))  # [2, M, T]
    real, imaginary = reduce(torch.stack(parts, dim=1))  # [V, M, T] each
    distance = (real - gauss).square() + imaginary.square()
    return images * (distance @ (weights * gauss)).mean()


@full_precision
def view_invariance(z: Tensor, targets: int) -> Tensor:
    """Mean squared difference of each view and the mean of the first `targets` views (section 5.1). z: [V, B, D]."""
    views = z.shape[0]
    if views < 2 or not 0 < targets <= views:
        raise ValueError(f"different views are compared: {views} views and {targets} targets are too few")
    return (z - z[:targets].mean(0)).square().mean()
