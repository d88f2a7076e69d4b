"""KoLeo: features of a batch keep their distance (Sablayrolles et al., 2019, "Spreading vectors for similarity search").

Ours instead of lightly's KoLeoLoss, which is equal in value but multiplies in autocast's half precision, where the nearest
neighbour is often another one, and adds its epsilon to every coordinate of the difference.
"""

import torch
from torch import Tensor

from selfsup.losses.numerics import at_least, full_precision, unit


@full_precision
def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean(log(distance to the nearest other one + eps)) of l2-normalised features [B, D]."""
    at_least(len(features), 2, "KoLeo")
    x = unit(features)  # [B, D]
    with torch.no_grad():
        nearest = (x @ x.t()).fill_diagonal_(-2).argmax(dim=1)  # [B]
    squares = (x - x[nearest]).square().sum(1)
    # the square root's slope is infinite at 0: of two equal features neither gets a gradient
    distance = torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)
    return -(distance + eps).log().mean()
