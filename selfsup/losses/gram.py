"""Gram anchoring (Siméoni et al., 2025, "DINOv3", section 4.2, equation 2), written from the paper."""

import torch
from torch import Tensor

from selfsup.losses.numerics import full_precision, unit


@full_precision
def gram_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared difference of the cosines between all pairs of an image's patches: [B, P, D] and [B, P, E].

    The paper's |X_S X_S^T - X_G X_G^T|_F^2, with rows of length 1, divided by the P^2 pairs, so that a weight means the same
    at every resolution; then the mean over images. Features may turn, all together, at no cost: D and E may differ.
    """
    if student.shape[:2] != anchor.shape[:2]:
        raise ValueError(f"student {list(student.shape)} and anchor {list(anchor.shape)} have not the same patches")
    student, anchor = unit(student), unit(anchor)
    difference = student @ student.transpose(1, 2) - anchor @ anchor.transpose(1, 2)  # [B, P, P]
    return torch.square(difference).mean()
