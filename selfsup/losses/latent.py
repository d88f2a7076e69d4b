"""Prediction of a teacher's patch features (Assran et al., 2023, I-JEPA, section 3, "Loss"; the published code's train.py)."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from selfsup.losses.numerics import full_precision, same_shape

LatentForm = Literal["smooth_l1", "l2"]


@full_precision
def layer_normed(targets: Tensor, eps: float = 1e-5) -> Tensor:
    """Each feature vector [..., D] with mean 0 and variance 1, no gain and no bias: what a predictor has to give."""
    return F.layer_norm(targets, targets.shape[-1:], eps=eps)


@full_precision
def latent_loss(predicted: Tensor, targets: Tensor, form: LatentForm = "smooth_l1") -> Tensor:
    """Mean over patches and dimensions of a distance; [..., D] both.

    smooth_l1: d^2 / 2 below 1 and |d| - 1/2 above, as in the published code; l2: d^2, the paper's equation up to a factor.
    """
    same_shape(predicted, targets)
    return F.smooth_l1_loss(predicted, targets) if form == "smooth_l1" else F.mse_loss(predicted, targets)
