"""Contrastive representation distillation, CRD (Tian et al., 2020; its published code names equation 18).

Student and teacher have learned projections to a common space, of length 1. A critic tells pairs of one image from N pairs
of different images, drawn from a set of M:

    h(t, s) = e^(t.s / tau) / (e^(t.s / tau) + N / M),    loss = -E[log h(pair)] - N E[log(1 - h(other pair))]

`crd_in_batch` takes the other images of the batch. `crd_bank` takes N of all M training images from memory, as published;
what it needs is kept and checkpointed by the caller (`methods.crd_memory`):

- `student_bank`, `teacher_bank` [M, D] float32, row n for training image n; at the start random rows of length 1.
- `index` int64 [B, 1 + N]: the image's own row, then N rows drawn uniformly of all M, with replacement, as a function of
  (seed, step, sample).
- `log_z`: 0 is the paper's formula. The published code divides e^(t.s / tau) by M times its mean in the first step, kept from
  then on. All rows are random there, so the mean has an expectation, the same for every image: `crd_log_normaliser`.
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
    log_z: float = 0.0,
) -> Tensor:
    """The loss above twice, as published: the student against the teacher's bank, the teacher against the student's.

    student, teacher: [B, D], of length 1; banks [M, D]; index [B, 1 + N].
    """
    same_shape(student, teacher)
    rows, negatives = teacher_bank.shape[0], index.shape[1] - 1
    if negatives < 1:
        raise ValueError("CRD from a bank needs an index [B, 1 + N] with at least one other image")
    total = student.new_zeros(())
    for x, bank in ((student, teacher_bank), (teacher, student_bank)):
        odds = _scores(x, bank, index, temperature) - log_z - math.log(negatives / rows)  # [B, 1+N]: log h / (1 - h)
        total = total - F.logsigmoid(torch.cat((odds[:, :1], -odds[:, 1:]), 1)).sum() / x.shape[0]
    return total


def crd_log_normaliser(rows: int, dim: int, temperature: float = 0.07) -> float:
    """log(M E[e^(x.row / tau)]) for any x of length 1 and rows that are uniform on the sphere of R^D; M: rows, D: dim.

    The expectation is the hypergeometric 0F1(D / 2; k^2 / 4) with k = 1 / tau (Mardia & Jupp, 2000, "Directional Statistics",
    chapter 9: what normalises the von Mises-Fisher distribution), the sum over j of (k^2 / 4)^j / (j! (D / 2)_j).
    """
    terms, j = [0.0], 0
    largest = 0.0
    while terms[-1] > largest - 40:  # logarithms, which rise and then fall
        j += 1
        terms.append(terms[-1] - 2 * math.log(2 * temperature) - math.log(j * (dim / 2 + j - 1)))
        largest = max(largest, terms[-1])
    return math.log(rows) + largest + math.log(math.fsum(math.exp(term - largest) for term in terms))


@full_precision
def crd_update(rows: Tensor, x: Tensor, momentum: float = 0.5) -> Tensor:
    """New rows of a bank: momentum * row + (1 - momentum) * x, of length 1. rows, x: [B, D], of the same images."""
    same_shape(x, rows)
    return unit(torch.lerp(x.detach(), rows, momentum))
