"""DINO's loss (Caron et al., 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3.1, algorithm 1)."""

import math

import torch
from torch import Tensor

from selfsup.losses.numerics import at_least_float32


def teacher_probabilities(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """softmax((logits - center) / temperature): centred, then sharpened. logits [2, B, K], center [K] -> [2, B, K]."""
    return torch.softmax((at_least_float32(logits) - center) / temperature, dim=-1)


def count_pairs(views: int, targets: int, same_view: bool = False) -> int:
    """Pairs of a teacher's view and another view of the student, or any; the teacher's views are the first `targets`."""
    if same_view and 0 < targets <= views:
        return targets * views
    if views < 2 or targets > views:
        raise ValueError(f"DINO compares different views: {views} student and {targets} teacher views are too few")
    return targets * (views - 1)


def dino_loss(student: Tensor, teacher: Tensor, temperature: float, same_view: bool = False) -> Tensor:
    """Mean cross-entropy H(teacher view t, student view s) over the images and all pairs with s != t.

    With `same_view` the pairs s = t count too: of a frozen teacher nothing can collapse, and one view is enough.

    student: logits [V, B, K], the teacher's T views first, in the same order; teacher: probabilities [T, B, K];
    temperature: the student's. With q_s the sum of the teacher's distributions that view s is compared with, and
    n_s their number, the pairs of one student view are n_s * lse(z_s) - <q_s, z_s>: one pass over the K
    prototypes a view instead of one a pair.
    """
    views, batch, _ = student.shape
    targets = teacher.shape[0]
    pairs = count_pairs(views, targets, same_view)
    z = at_least_float32(student) / temperature  # [V, B, K]
    lse = torch.logsumexp(z, dim=-1)  # [V, B]
    total = teacher.sum(0)  # [B, K]
    # [T, B, K]: a teacher's view is not compared with itself
    own, others = (total.expand_as(teacher), targets) if same_view else (total - teacher, targets - 1)
    dots = (own * z[:targets]).sum() + (total * z[targets:]).sum()
    partition = others * lse[:targets].sum() + targets * lse[targets:].sum()
    return (partition - dots) / (pairs * batch)


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy in nats over the last dimension."""
    return torch.special.entr(probabilities).sum(-1)


def teacher_health(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """(mean entropy / ln K, mutual information of image and prototype in nats) of [T, B, K]; both scalars.

    The information is H(mean over the batch) - mean H: it is 0 exactly when the output no longer depends on the
    image, whether it is uniform or constant.
    """
    mean_entropy = entropy(probabilities).mean()
    marginal = entropy(probabilities.mean(dim=(0, 1)))
    return mean_entropy / math.log(probabilities.shape[-1]), marginal - mean_entropy
