"""CAPI's losses (Darcet et al., 2025, "Cluster and Predict Latents Patches for Improved Masked Image Modeling", section 3)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selfsup.losses.numerics import full_precision
from selfsup.losses.sinkhorn import sinkhorn_knopp


@torch.no_grad()
def assignments(
    scores: Tensor,
    temperature: float,
    iterations: int = 3,
    positionwise: bool = True,
    reduce: Callable[[Tensor, str], Any] | None = None,
) -> Tensor:
    """Of patches to clusters, balanced over the batch: [B, P, K] -> [B, P, K], every row sums to 1 (section 3.2).

    positionwise: clusters are balanced among the patches of each position by itself, so that none can stand for a position
    (the paper's positional collapse); else among all patches at once. reduce: as in `sinkhorn_knopp`.
    """
    rows = scores if positionwise else scores.flatten(0, 1)  # [B, P, K] or [B*P, K]
    more = () if reduce is None else (reduce,)
    return sinkhorn_knopp(rows, temperature, iterations, *more).view(scores.shape)


@full_precision
def cluster_cross_entropy(scores: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Mean over all rows of -sum_k targets_k ln softmax(scores / temperature)_k; [..., K] both.

    Of a student's scores of hidden patches: what it predicts. Of the scores from which the targets were made: what moves
    the clusters.
    """
    return -(targets * torch.log_softmax(scores / temperature, dim=-1)).sum(-1).mean()
