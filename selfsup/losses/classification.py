"""Losses on labels: cross-entropy with soft targets, label smoothing in both forms, and the sigmoid form."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.losses.numerics import full_precision, same_shape

Smoothing = Literal["all", "others"]
"""Who gets the mass that label smoothing takes away: all K classes, or the K - 1 others."""


def one_hot(labels: Tensor, classes: int, smoothing: float = 0.0, form: Smoothing = "all") -> Tensor:
    """labels int64 [B] -> probabilities float32 [B, classes], smoothed as by `smooth`. -1 (no label): a row of zeros."""
    hot = labels[:, None] == torch.arange(classes, device=labels.device)  # [B, K]
    return smooth(hot.float(), smoothing, form)


@full_precision
def smooth(targets: Tensor, smoothing: float, form: Smoothing = "all") -> Tensor:
    """Label smoothing by eps of probabilities [B, K], one-hot or mixed (it is linear in them).

    "all": (1 - eps) q + eps / K (Szegedy et al., 2016, "Rethinking the Inception Architecture", section 7), which is
    torch's and timm's: the true class has 1 - eps + eps / K. "others": 1 - eps for the true class and eps / (K - 1) for
    every other (He et al., 2019, "Bag of Tricks for Image Classification", section 5.2). "others" with eps is "all"
    with eps K / (K - 1). A row's sum stays what it is, so a row of zeros stays zero.
    """
    if smoothing == 0:
        return targets
    classes, mass = targets.shape[-1], targets.sum(-1, keepdim=True)
    if form == "all":
        return (1 - smoothing) * targets + smoothing / classes * mass
    if form == "others":
        return (1 - smoothing) * targets + smoothing / (classes - 1) * (mass - targets)
    raise ValueError(f"label smoothing: form {form!r} is neither 'all' (eps/K) nor 'others' (eps/(K-1))")


@full_precision
def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_k q_k log softmax(z)_k, mean over the batch. logits, targets (probabilities): [B, K].

    Images whose row of targets is zero add nothing to the sum, and are counted in the mean.
    """
    same_shape(logits, targets)
    return -(targets * torch.log_softmax(logits, -1)).sum(-1).mean()


@full_precision
def binary_cross_entropy(
    logits: Tensor, targets: Tensor, *, sum_classes: bool = False, threshold: float | None = None
) -> Tensor:
    """Every class on its own: -q log sigmoid(z) - (1 - q) log(1 - sigmoid(z)). logits, targets: [B, K].

    Mean over the batch, and mean over the classes or, with `sum_classes`, their sum (K times as large). With `threshold`,
    targets above it become 1 and the others 0. As in "ResNet strikes back" (Wightman et al., 2021, section 2), and as
    timm's BinaryCrossEntropy; the targets are smoothed by the caller.
    """
    same_shape(logits, targets)
    if threshold is not None:
        targets = (targets > threshold).to(logits.dtype)
    per_class = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")  # [B, K]
    return per_class.sum(-1).mean() if sum_classes else per_class.mean()
