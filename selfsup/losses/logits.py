"""Distillation from a teacher's logits. All take logits [B, K] of both; gradients are stopped by the caller, not here."""

import torch
from torch import Tensor

from selfsup.losses.classification import one_hot, smooth, soft_cross_entropy
from selfsup.losses.numerics import at_least, full_precision, same_shape


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) a row, from logarithms [B, K] -> [B]; 0 log 0 is 0."""
    return torch.where(log_q == -torch.inf, 0, log_q.exp() * (log_q - log_p)).sum(-1)  # what is not a number stays so


@full_precision
def soft_distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(r / T) || softmax(z / T)), mean over the batch; r the teacher's logits, z the student's.

    Hinton et al., 2015, "Distilling the Knowledge in a Neural Network", section 2: the factor T^2 keeps the size of the
    gradient. The soft loss of DeiT (Touvron et al., 2021, "soft distillation") and of timm's distillation tasks.
    """
    same_shape(student, teacher)
    log_q, log_p = (torch.log_softmax(x / temperature, -1) for x in (teacher, student))
    return temperature**2 * _kl(log_q, log_p).mean()


@full_precision
def hard_distillation(student: Tensor, teacher: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the student with the teacher's decision argmax r (Touvron et al., 2021, "hard-label distillation").

    With `smoothing` the decision is smoothed by eps / K, as the paper allows there; the first of equal logits wins.
    """
    same_shape(student, teacher)
    decision = one_hot(teacher.argmax(-1), teacher.shape[-1]).to(student.dtype)  # [B, K]
    return soft_cross_entropy(student, smooth(decision, smoothing))


@full_precision
def decoupled_distillation(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """DKD: T^2 (alpha TCKD + beta NCKD), mean over the batch (Zhao et al., 2022). labels: int64 [B].

    TCKD is the KL divergence of the two-way distributions (true class, all others), NCKD that of the distributions over
    the others alone. With alpha = 1 and beta = the teacher's mass of the others it is `soft_distillation`. T^2 is in
    the published code. Defaults are its defaults, for CIFAR-100, where beta is between 2 and 8 and the weight grows over
    20 epochs; for ImageNet T is 1 and beta 0.5 or 2, by the pair of networks.
    """
    same_shape(student, teacher)
    others = torch.arange(student.shape[-1] - 1, device=student.device)
    others = others + (others >= labels[:, None])  # [B, K-1]: all classes but the true one
    two, rest = [], []
    for x in (teacher, student):
        log_p = torch.log_softmax(x / temperature, -1)
        log_others = log_p.gather(1, others)  # [B, K-1]
        mass = torch.logsumexp(log_others, 1, keepdim=True)  # [B, 1]: log(1 - p of the true class)
        two.append(torch.cat((log_p.gather(1, labels[:, None]), mass), 1))  # [B, 2]
        rest.append(torch.log_softmax(x.gather(1, others) / temperature, -1))  # [B, K-1]
    return temperature**2 * (alpha * _kl(*two) + beta * _kl(*rest)).mean()


@full_precision
def dist_loss(
    student: Tensor,
    teacher: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-8,
) -> Tensor:
    """DIST: T^2 (beta L_inter + gamma L_intra) (Huang et al., 2022, "Knowledge Distillation from A Stronger Teacher").

    L_inter is 1 - Pearson's correlation of the student's and the teacher's probabilities over the classes of an image,
    mean over the images; L_intra the same over the images of a class, mean over the classes. T^2 and `eps`, added to
    the product of the norms, are in the published code: eps damps classes that are absent from the batch. The gradient
    is unbounded near a student that says the same of all classes: do not start from a head of zeros without clipping.
    """
    same_shape(student, teacher)
    at_least(student.shape[0], 2, "DIST, which correlates a class over the images,")
    p, q = (torch.softmax(x / temperature, -1) for x in (student, teacher))
    inter = 1 - _correlation(p, q, eps).mean()
    intra = 1 - _correlation(p.t(), q.t(), eps).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _correlation(a: Tensor, b: Tensor, eps: float) -> Tensor:
    """Pearson's, row by row: [N, M], [N, M] -> [N]."""
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1) + eps)


@full_precision
def keep_top(teacher: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """What `topk_distillation` needs of logits [B, K]: (indices [B, k], values [B, k], rest [B]), to be stored.

    Values are logits less the largest one, in descending order, so that half precision is fine where it matters; rest is
    the log of the sum of exp(r / T) over the other classes, less the same. It holds for this temperature alone.
    """
    top, indices = teacher.topk(k, dim=-1)
    largest = top[:, :1]
    if k == teacher.shape[-1]:
        return indices, top - largest, torch.full_like(top[:, 0], -torch.inf)
    others = teacher.scatter(1, indices, -torch.inf) - largest
    return indices, top - largest, torch.logsumexp(others / temperature, -1)


@full_precision
def topk_distillation(
    student: Tensor, indices: Tensor, values: Tensor, rest: Tensor | None, temperature: float = 1.0
) -> Tensor:
    """`soft_distillation` from the teacher's k largest logits; student: [B, K], the others as `keep_top` gives them.

    All other classes are one: the divergence is between distributions over k + 1 events. It asks nothing about what was
    not stored, is never larger than the full divergence, and equals it for k = K. Without `rest` (None) the teacher's
    mass of the others is taken to be 0 and the student is pushed to leave them none.
    """
    if indices.shape != values.shape or indices.shape[0] != student.shape[0]:
        raise ValueError(
            f"top-k: student {list(student.shape)}, indices {list(indices.shape)} and values {list(values.shape)} do not fit"
        )
    log_p = torch.log_softmax(student / temperature, -1)
    kept, log_q = log_p.gather(1, indices), values / temperature  # [B, k]
    if rest is not None and indices.shape[1] < student.shape[1]:
        others = torch.logsumexp(log_p.scatter(1, indices, -torch.inf), 1, keepdim=True)
        kept, log_q = torch.cat((kept, others), 1), torch.cat((log_q, rest[:, None]), 1)  # [B, k+1]
    return temperature**2 * _kl(torch.log_softmax(log_q, -1), kept).mean()
