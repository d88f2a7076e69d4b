"""VICReg's three terms (Bardes et al., 2022, section 4.1), of any number of views.

For two views they are those of the published code (and of lightly's VICRegLoss), which differ from the paper's text in their
factors: the invariance is a mean over the dimensions too, and the variance of the two views is averaged, not added. More
views are treated as in VICRegL (Bardes et al., 2022, "VICRegL: Self-Supervised Learning of Local Visual Features", published
code): the invariance is of every view with each of the first ones, variance and covariance are of each view.
"""

import torch
from torch import Tensor

from selfsup.losses.numerics import at_least, full_precision


@full_precision
def vicreg_terms(z: Tensor, targets: int, eps: float = 1e-4) -> tuple[Tensor, Tensor, Tensor]:
    """(invariance, variance, covariance) of embeddings z [V, B, D], without their weights; B images of the whole batch.

    invariance: mean squared difference of views t < targets and s != t. variance: mean of max(0, 1 - sqrt(Var + eps)) over
    dimensions and views (equations 1, 2). covariance: squared off-diagonal of the covariance matrix over D (equations 3, 4),
    a mean over the views times 2, that is the paper's sum for two views. Var and the matrix divide by B - 1.
    """
    views, batch, dim = z.shape
    if views < 2 or not 0 < targets <= views:
        raise ValueError(f"different views are compared: {views} views and {targets} targets are too few")
    at_least(batch, 2, "VICReg")
    pairs = targets * (views - 1)
    invariance = torch.stack([(z - z[t]).square().sum() for t in range(targets)]).sum() / (pairs * batch * dim)

    centred = z - z.mean(dim=1, keepdim=True)  # [V, B, D]
    std = (centred.square().sum(dim=1) / (batch - 1) + eps).sqrt()  # [V, D]
    variance = torch.relu(1 - std).mean()

    covariance = z.new_zeros(())
    for x in centred:
        matrix = x.t() @ x / (batch - 1)  # [D, D]
        covariance = covariance + matrix.fill_diagonal_(0).square().sum() / dim
    return invariance, variance, 2 * covariance / views
