"""The loss of self-distillation between the exits of one network ("Be Your Own Teacher", Zhang et al., 2019)."""

from collections.abc import Sequence

from torch import Tensor

from selfsup.losses.classification import soft_cross_entropy
from selfsup.losses.logits import soft_distillation
from selfsup.losses.numerics import at_least_float32, same_shape


def byot_loss(
    logits: Sequence[Tensor],
    features: Sequence[Tensor],
    targets: Tensor,
    *,
    alpha: float,
    temperature: float,
    feature_weight: float,
) -> dict[str, Tensor]:
    """{"loss", "label", "kl", "feature"}: the paper's three kinds of losses, each a mean over the images.

    logits: [B, K] an exit, the deepest last. features: [B, D] an exit, what its classifier saw. targets: what the labels
    say, probabilities [B, K], smoothed or mixed as the caller likes. For exits i below the deepest, C:

        loss = CE(q^C, y) + sum_i (1 - alpha) CE(q^i, y) + alpha T^2 KL(q^C_T || q^i_T) + feature_weight |F_i - F_C|^2

    The deepest learns from labels alone: it is a constant in the other terms. T^2 keeps the gradients of the softened
    distributions at the size of the others (Hinton et al., 2015, section 2.1). "label", "kl" and "feature" are the
    sums of the three kinds of terms, before their weights.
    """
    *shallow, deepest = logits
    *hints, deepest_feature = [at_least_float32(f) for f in features]
    teacher, target = deepest.detach(), deepest_feature.detach()
    own = soft_cross_entropy(deepest, targets)
    label, kl, feature = own.new_zeros(()), own.new_zeros(()), own.new_zeros(())
    for z, f in zip(shallow, hints, strict=True):
        same_shape(f, target)
        label = label + soft_cross_entropy(z, targets)
        kl = kl + soft_distillation(z, teacher, temperature)
        feature = feature + (f - target).square().sum(dim=-1).mean()
    loss = own + (1 - alpha) * label + alpha * kl + feature_weight * feature
    return {"loss": loss, "label": own + label, "kl": kl, "feature": feature}
