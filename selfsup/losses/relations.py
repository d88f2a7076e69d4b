"""Distillation of relations between the images of a batch; features [B, ...] of any shape, which may differ.

They compare images of one (micro-)batch: with accumulation or several processes other pairs are compared than in one
large batch, as with batch normalisation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.losses.numerics import at_least, full_precision, unit


def _rows(student: Tensor, teacher: Tensor, least: int, what: str) -> tuple[Tensor, Tensor]:
    """Both as [B, D]."""
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(f"{what}: {student.shape[0]} images of the student, {teacher.shape[0]} of the teacher")
    at_least(student.shape[0], least, what)
    return student.flatten(1), teacher.flatten(1)


@full_precision
def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D: Huber loss of the distances over their mean, mean over pairs i != j (Park et al., 2019, "distance-wise").

    The paper sums over the pairs, the published code divides by B^2, diagonal included: that is (B - 1) / B of this.
    """
    ours, theirs = (_relative_distances(x) for x in _rows(student, teacher, 2, "RKD's distance"))
    batch = ours.shape[0]
    return F.smooth_l1_loss(ours, theirs, reduction="sum") / (batch * (batch - 1))  # the diagonal is 0 in both


def _relative_distances(x: Tensor) -> Tensor:
    """[B, D] -> [B, B], of mean 1 over i != j (all 0 if all images are alike)."""
    batch = x.shape[0]
    # not by |a|^2 + |b|^2 - 2 ab, which loses the small ones
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (batch * (batch - 1))
    return distances / torch.where(mean > 0, mean, 1)


@full_precision
def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A: Huber loss of cos of the angle at j in (i, j, k), mean over triplets (Park et al., 2019, "angle-wise").

    Over the B (B - 1) (B - 2) triplets of different images; the published code divides by B^3. Holds B^2 D numbers.
    """
    ours, theirs = (_angles(x) for x in _rows(student, teacher, 3, "RKD's angle"))
    batch = ours.shape[0]
    # i = j and k = j give 0 in both
    same = torch.eye(batch, dtype=torch.bool, device=ours.device)  # i = k: the angle is 0 in both, up to rounding
    losses = F.smooth_l1_loss(ours, theirs, reduction="none").masked_fill(same, 0)
    return losses.sum() / (batch * (batch - 1) * (batch - 2))


def _angles(x: Tensor) -> Tensor:
    """[B, D] -> cosines [j, i, k] of the angle at j between the images i and k."""
    edges = unit(x[None] - x[:, None])  # [j, i, D]: from j to i
    return edges @ edges.transpose(1, 2)


@full_precision
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """SP: |G_T - G_S|^2 / B^2 with G the products Q Q^T of all images' activations Q [B, D], its rows of length 1.

    Tung & Mori, 2019, "Similarity-Preserving Knowledge Distillation". Of one image it is 0.
    """
    ours, theirs = (unit(q @ q.t()) for q in _rows(student, teacher, 1, "SP"))  # [B, B]
    return (theirs - ours).square().mean()
