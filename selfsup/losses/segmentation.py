"""Losses on masks: cross-entropy, focal and Dice over the pixels that have a label.

logits [B, K, H, W] in any floating type, masks int64 [B, H, W]; a pixel whose mask is IGNORE counts nowhere. A batch without
any labelled pixel has loss 0, with a gradient of 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.losses.numerics import full_precision

IGNORE = -1


@full_precision
def pixel_cross_entropy(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of -log p of the true class over the labelled pixels; weights [K]: the mean weighted by the true class's weight."""
    each = F.cross_entropy(logits, masks, weight=weights, ignore_index=IGNORE, reduction="none")  # [B, H, W]
    return each.sum() / _total(masks, weights).clamp_min(1e-12)


@full_precision
def focal(logits: Tensor, masks: Tensor, gamma: float = 2.0, weights: Tensor | None = None) -> Tensor:
    """-(1 - p)^gamma log p of the true class (Lin et al., 2017, equation 4, with softmax), averaged as by cross-entropy."""
    known = masks != IGNORE
    logp = torch.log_softmax(logits, 1).gather(1, masks.clamp_min(0)[:, None]).squeeze(1)  # [B, H, W]
    each = -((1 - logp.exp()).clamp_min(0) ** gamma) * logp * known
    if weights is not None:
        each = each * weights[masks.clamp_min(0)]
    return each.sum() / _total(masks, weights).clamp_min(1e-12)


@full_precision
def soft_dice(logits: Tensor, masks: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 - mean over classes of 2 sum p q / (sum p^2 + sum q^2), sums over the pixels of the batch (Milletari et al., 2016,
    section 3).

    The mean is over the classes that the batch holds, weighted by weights [K]; a class that is not there would pull its
    probability down everywhere for a term that cannot get better than 0.
    """
    known = (masks != IGNORE)[:, None]
    p = torch.softmax(logits, 1) * known  # [B, K, H, W]
    q = F.one_hot(masks.clamp_min(0), logits.shape[1]).permute(0, 3, 1, 2).to(p.dtype) * known
    overlap, size = (p * q).sum((0, 2, 3)), (p * p + q).sum((0, 2, 3))  # [K]; q is 0 or 1
    there = (q.sum((0, 2, 3)) > 0).to(p.dtype)
    share = there if weights is None else there * weights
    each = 1 - 2 * overlap / size.clamp_min(1e-12)
    return (share * each).sum() / share.sum().clamp_min(1e-12)


def _total(masks: Tensor, weights: Tensor | None) -> Tensor:
    known = masks != IGNORE
    return known.sum().float() if weights is None else (weights[masks.clamp_min(0)] * known).sum()
