"""MSN's loss (Assran et al., 2022, "Masked Siamese Networks for Label-Efficient Learning", section 3, equations 1 and 2).

lightly's MSNLoss raises probabilities to powers, which vanish in float32 where the anchor is sure and the target is not,
and takes the mean prediction over one process alone; here all is in logarithms, and the mean is what `mean_over` makes it.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfsup.losses.numerics import full_precision, unit
from selfsup.losses.sinkhorn import sinkhorn_knopp


class MSNParts(NamedTuple):
    """Scalars."""

    cross_entropy: Tensor
    mean_entropy: Tensor
    """ln K - H(mean prediction): 0 if all prototypes are used alike."""
    entropy: Tensor
    """Mean entropy of a prediction."""


def _alone(x: Tensor) -> Tensor:
    return x


@full_precision
def log_predictions(embeddings: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """ln softmax(z . q / temperature) of unit vectors: [..., D] and [K, D] -> [..., K] (section 3, tau)."""
    return torch.log_softmax(unit(embeddings) @ unit(prototypes).t() / temperature, dim=-1)


@torch.no_grad()
def msn_targets(
    log_p: Tensor, sharpening: float, sinkhorn: int = 0, reduce: Callable[[Tensor, str], Any] | None = None
) -> Tensor:
    """Targets [B, K] from a target view's log-predictions [B, K]: p^(1/T) / sum p^(1/T), 0 < T < 1 (section 3).

    sinkhorn: iterations that then spread the batch over all prototypes, as in the published code; `reduce` as in
    `sinkhorn_knopp`.
    """
    sharpened = torch.log_softmax(log_p / sharpening, dim=-1)
    if not sinkhorn:
        return sharpened.exp()
    return sinkhorn_knopp(sharpened, 1.0, sinkhorn, *([reduce] if reduce else []))


def msn_loss(log_p: Tensor, targets: Tensor, mean_over: Callable[[Tensor], Tensor] = _alone) -> MSNParts:
    """Of anchors' log-predictions [V, B, K] and targets [B, K]; the loss is cross_entropy + lambda * mean_entropy.

    mean_over: takes the mean prediction [K] of a process to the mean over all, with its gradient.
    """
    cross_entropy = -(targets * log_p).sum(-1).mean()
    p = log_p.exp()
    mean = mean_over(p.mean(dim=(0, 1)))  # [K]
    mean_entropy = math.log(mean.shape[0]) - torch.special.entr(mean).sum()
    return MSNParts(cross_entropy, mean_entropy, -(p * log_p).sum(-1).mean())
