"""Barlow Twins' two terms (Zbontar et al., 2021, section 2.1, equations 1 and 2), of any number of views.

Not lightly's BarlowTwinsLoss: over several ranks that normalises each rank's images by themselves, where the published code
synchronises the statistics; under autocast its matrix is in half precision; and each pair of views would be normalised anew.
"""

import torch
from torch import Tensor

from selfsup.losses.numerics import at_least, full_precision


@full_precision
def barlow_terms(z: Tensor, targets: int, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(sum of (1 - C_ii)^2, sum of C_ij^2 over i != j) of embeddings z [V, B, D]; B images of the whole batch.

    C is the cross-correlation of two views over the batch, each dimension normalised as by a batch norm without weights. The
    terms are means over the pairs of a view t < targets and a view s != t. (C of s and t is the transpose: computed once.)
    """
    views, batch, _ = z.shape
    if views < 2 or not 0 < targets <= views:
        raise ValueError(f"different views are compared: {views} views and {targets} targets are too few")
    at_least(batch, 2, "Barlow Twins")
    centred = z - z.mean(dim=1, keepdim=True)  # [V, B, D]
    unit = centred * torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)
    on = off = z.new_zeros(())
    for t in range(targets):
        for s in range(t + 1, views):
            times = 2 if s < targets else 1  # as (t, s) and (s, t)
            c = unit[t].t() @ unit[s] / batch  # [D, D]
            on = on + times * (c.diagonal() - 1).square().sum()
            off = off + times * c.fill_diagonal_(0).square().sum()
    pairs = targets * (views - 1)
    return on / pairs, off / pairs
