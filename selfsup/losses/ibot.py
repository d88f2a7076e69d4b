"""The loss of masked patches (Zhou et al., 2022, "iBOT: Image BERT Pre-Training with Online Tokenizer", equation 2)."""

import torch
from torch import Tensor

from selfsup.losses.numerics import at_least_float32, same_shape


def patch_loss(student: Tensor, teacher: Tensor, weights: Tensor, images: int, temperature: float) -> Tensor:
    """Cross-entropy H(teacher, student) of masked patches: their mean in each image, then the mean over the images.

    student: logits [M, K] of the masked patches of all images; teacher: probabilities [M, K]; weights: [M], one by the number
    of masked patches of each one's image; images: their number, those without masked patches too, which count as zero
    (as in the published code, and DINOv2's). So every image of a global batch weighs the same, wherever it is computed.
    """
    same_shape(student, teacher)
    z = at_least_float32(student) / temperature  # [M, K]
    loss = torch.logsumexp(z, dim=-1) - (teacher * z).sum(-1)  # [M]; each row of `teacher` sums to 1
    return (loss * weights.to(loss.dtype)).sum() / images
