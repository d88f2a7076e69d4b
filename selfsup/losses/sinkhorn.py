"""Sinkhorn-Knopp: soft assignments of a batch to prototypes that use every prototype equally."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfsup.losses.numerics import at_least_float32


def _alone(tensor: Tensor, op: str) -> Tensor:
    return tensor


@torch.no_grad()
def sinkhorn_knopp(
    scores: Tensor, temperature: float, iterations: int = 3, reduce: Callable[[Tensor, str], Any] = _alone
) -> Tensor:
    """Assignments Q = Diag(u) exp(scores / temperature) Diag(v) of a batch: [B, K] -> [B, K], every row sums to 1.

    Caron et al., 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", section 3.1, equation
    3 (Cuturi, 2013). Each iteration makes the sums over the images alike for all prototypes, then those over the prototypes 1
    for each image; the former hold in the limit, the latter exactly. With iterations=0 it is the softmax.

    With [B, ..., K] the images are balanced for each index in between by itself.

    reduce: called as reduce(tensor, "sum" or "max"), does so in place over all ranks (`dist.all_reduce_`), each of which has
    rows of the batch, as many as it has (none, too). All in float32 at least.

    The first operation divides columns by their sums, so that the largest score of a column, over all ranks, may be taken
    off first. After it each column has an entry of at least 1 / (B K), and each row one of at least 1 / K: no sum that
    is divided by can vanish or overflow, whatever the scores, so that only this first iteration needs logarithms.
    """
    z = at_least_float32(scores) / temperature  # [B, K]
    if iterations < 1:
        return torch.softmax(z, dim=-1)
    top = z.amax(0) if len(z) else z.new_full(z.shape[1:], -torch.inf)  # [K]
    reduce(top, "max")
    z = z - top
    columns = z.exp().sum(0)  # [K]
    reduce(columns, "sum")
    q = torch.softmax(z.sub_(columns.log_()), dim=-1)
    for _ in range(iterations - 1):
        columns = q.sum(0)
        reduce(columns, "sum")
        q /= columns
        q /= q.sum(-1, keepdim=True)
    return q
