"""The loss of self-distillation between the exits of one network ("Be Your Own Teacher", Zhang et al., 2019)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def byot_loss(
    logits: Sequence[Tensor],
    features: Sequence[Tensor],
    labels: Tensor,
    *,
    alpha: float,
    temperature: float,
    feature_weight: float,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """{"loss", "label", "kl", "feature"}: equations 5 to 8 of the paper, each a mean over the images.

    logits: [B, K] an exit, the deepest last. features: [B, D] an exit, what its classifier saw. labels: int64 [B], or
    probabilities [B, K]. For exits i below the deepest, C:

        loss = CE(q^C, y) + sum_i (1 - alpha) CE(q^i, y) + alpha T^2 KL(q^C_T || q^i_T) + feature_weight |F_i - F_C|^2

    The deepest learns from labels alone: it is a constant in the other terms. T^2 keeps the gradients of the softened
    distributions at the size of the others (Hinton et al., 2015, section 2.1). "label", "kl" and "feature" are the
    sums of the three kinds of terms, before their weights. label_smoothing: eps / K on every class, 1 - eps more on the
    right one.
    """
    *shallow, deepest = [_at_least_float32(z) for z in logits]
    *hints, target = [_at_least_float32(f) for f in features]
    teacher, target = (deepest.detach() / temperature).log_softmax(dim=-1), target.detach()
    own = F.cross_entropy(deepest, labels, label_smoothing=label_smoothing)
    label, kl, feature = own.new_zeros(()), own.new_zeros(()), own.new_zeros(())
    for z, f in zip(shallow, hints, strict=True):
        label = label + F.cross_entropy(z, labels, label_smoothing=label_smoothing)
        student = (z / temperature).log_softmax(dim=-1)
        kl = kl + temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        feature = feature + (f - target).square().sum(dim=-1).mean()
    loss = own + (1 - alpha) * label + alpha * kl + feature_weight * feature
    return {"loss": loss, "label": own + label, "kl": kl, "feature": feature}


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
