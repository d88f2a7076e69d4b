"""DINO's loss (Caron et al., 2021, "Emerging Properties in Self-Supervised Vision Transformers", section 3.1, algorithm 1)."""

import math

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def teacher_probabilities(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """softmax((logits - center) / temperature): centred, then sharpened. logits [2, B, K], center [K] -> [2, B, K]."""
    return torch.softmax((at_least_float32(logits) - center) / temperature, dim=-1)


def count_pairs(views: int, targets: int) -> int:
    """Pairs of a teacher's view and another view of the student; the teacher's views are the first `targets`."""
    if views < 2 or targets > views:
        raise ValueError(f"DINO compares different views: {views} student and {targets} teacher views are too few")
    return targets * (views - 1)


def dino_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy H(teacher view t, student view s) over the images and all pairs with s != t.

    student: logits [V, B, K], the teacher's T views first, in the same order; teacher: probabilities [T, B, K];
    temperature: the student's. With q_s the sum of the teacher's distributions that view s is compared with, and
    n_s their number, the pairs of one student view are n_s * lse(z_s) - <q_s, z_s>: one pass over the K
    prototypes a view instead of one a pair.
    """
    views, batch, _ = student.shape
    targets = teacher.shape[0]
    pairs = count_pairs(views, targets)
    z = at_least_float32(student) / temperature  # [V, B, K]
    lse = torch.logsumexp(z, dim=-1)  # [V, B]
    total = teacher.sum(0)  # [B, K]
    own = total - teacher  # [T, B, K]: a teacher's view is not compared with itself
    dots = (own * z[:targets]).sum() + (total * z[targets:]).sum()
    partition = (targets - 1) * lse[:targets].sum() + targets * lse[targets:].sum()
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
