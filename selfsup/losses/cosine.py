"""Cosine between what a network predicts and another view's projection: BYOL and SimSiam."""

from torch import Tensor

from selfsup.losses.numerics import full_precision, unit


@full_precision
def predicted_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean cosine of prediction s and target t over the images and all pairs of different views, s != t.

    predictions [V, B, D], the targets' views first; targets [T, B, D], no gradient for them. With u and w of length 1,
    and w. the sum of all w_t, the pairs' sum is <u_s, w.> over all s, less <u_t, w_t>.
    """
    views, batch, _ = predictions.shape
    count = targets.shape[0]
    if views < 2 or not 0 < count <= views:
        raise ValueError(f"different views are compared: {views} predictions and {count} targets are too few")
    u, w = unit(predictions), unit(targets.detach())
    total = (u * w.sum(0)).sum() - (u[:count] * w).sum()
    return total / (count * (views - 1) * batch)
