"""Contrastive representation distillation, CRD (Tian et al., 2020, section 3.1).

Student and teacher have learned projections to a common space, of length 1. A critic tells pairs of one image from N pairs
of different images, drawn from a set of M:

    h(t, s) = e^(t.s / tau) / (e^(t.s / tau) + N / M),    loss = -E[log h(pair)] - N E[log(1 - h(other pair))]

`crd_in_batch` takes the other images of the batch. `crd_bank` takes N of all M training images from memory, as published;
what it needs is kept and checkpointed by the caller:

- `student_bank`, `teacher_bank` [M, D] float32, row n for training image n; at the start random rows of length 1.
- `index` int64 [B, 1 + N]: the image's own row, then N rows drawn uniformly of all M, with replacement, as a function of
  (seed, step, sample).
- `log_z`, two scalars: 0 is the paper's formula. The published code divides e^(t.s / tau) by a constant that it estimates
  once, in the first step: `crd_log_normaliser` over the global batch for each side, kept from then on.
- After the step, unless it was refused, rows of all processes' images become `crd_update(...)`. A bank that moves only
  between steps makes the loss of an image independent of the micro-batch that it is in.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.losses.numerics import at_least, full_precision, same_shape, unit


@full_precision
def crd_in_batch(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    """The loss above with N = B - 1 and M = B: the other images of the batch. student, teacher: [B, D], of length 1."""
    same_shape(student, teacher)
    batch = student.shape[0]
    at_least(batch, 2, "CRD within the batch")
    odds = student @ teacher.t() / temperature - math.log((batch - 1) / batch)  # [B, B]: log h / (1 - h)
    pairs = torch.eye(batch, dtype=torch.bool, device=odds.device)
    return -F.logsigmoid(torch.where(pairs, odds, -odds)).sum() / batch


def _scores(x: Tensor, bank: Tensor, index: Tensor, temperature: float) -> Tensor:
    """x . row / tau for the rows of each image: [B, D], [M, D], [B, 1+N] -> [B, 1+N]. No gradient for the bank."""
    return (bank.detach()[index] @ x[:, :, None]).squeeze(-1) / temperature


@full_precision
def crd_bank(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    index: Tensor,
    temperature: float = 0.07,
    log_z: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
) -> Tensor:
    """The loss above twice, as published: the student against the teacher's bank, the teacher against the student's.

    student, teacher: [B, D], of length 1; banks [M, D]; index [B, 1 + N]; log_z: of the first and of the second.
    """
    same_shape(student, teacher)
    rows, negatives = teacher_bank.shape[0], index.shape[1] - 1
    if negatives < 1:
        raise ValueError("CRD from a bank needs an index [B, 1 + N] with at least one other image")
    total = student.new_zeros(())
    for x, bank, z in ((student, teacher_bank, log_z[0]), (teacher, student_bank, log_z[1])):
        odds = _scores(x, bank, index, temperature) - z - math.log(negatives / rows)  # [B, 1+N]: log h / (1 - h)
        total = total - F.logsigmoid(torch.cat((odds[:, :1], -odds[:, 1:]), 1)).sum() / x.shape[0]
    return total


@full_precision
def crd_log_normaliser(x: Tensor, bank: Tensor, index: Tensor, temperature: float = 0.07) -> Tensor:
    """log(M * mean of e^(x.row / tau)) over the batch and its rows (Wu et al., 2018): a scalar.

    Over several processes or micro-batches of equal size: the log of the mean of the exponentials.
    """
    scores = _scores(x.detach(), bank, index, temperature)
    return torch.logsumexp(scores.flatten(), 0) + math.log(bank.shape[0] / scores.numel())


@full_precision
def crd_update(rows: Tensor, x: Tensor, momentum: float = 0.5) -> Tensor:
    """New rows of a bank: momentum * row + (1 - momentum) * x, of length 1. rows, x: [B, D], of the same images."""
    same_shape(x, rows)
    return unit(torch.lerp(x.detach(), rows, momentum))
