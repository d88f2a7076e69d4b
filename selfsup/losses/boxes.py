"""Losses of detectors: how far boxes are from where they should be, and how wrong the classes are. Each is one number a row.

Boxes are [N, 4] as x1, y1, x2, y2 with x1 < x2 and y1 < y2, in any unit.

smooth_l1  of encoded offsets, not of boxes (Girshick, 2015, equation 3): it depends on what a box is encoded against
iou        1 - IoU (Yu et al., 2016, "UnitBox", take -log IoU; the linear form is the one that others are compared with)
giou       1 - IoU + (C - U) / C, C the area of the smallest box around both (Rezatofighi et al., 2019, algorithm 1)
diou       1 - IoU + distance of the centres over the diagonal of that box, squared (Zheng et al., 2020, equation 7)
ciou       diou and a term for the sides' ratio (Zheng et al., 2020, equations 8 to 11)

The last three are torchvision's. Its 1e-7 in the divisions is a part of them.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss, sigmoid_focal_loss

from selfsup.losses.numerics import full_precision


@full_precision
def paired_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """[N]: the IoU of row i of both; 0 where neither has an area."""
    low = torch.maximum(boxes[:, :2], others[:, :2])
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    both = (high - low).clamp_min(0).prod(1)
    areas = [(b[:, 2:] - b[:, :2]).clamp_min(0).prod(1) for b in (boxes, others)]
    return both / (areas[0] + areas[1] - both).clamp_min(1e-7)


@full_precision
def iou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """[N]: 1 - IoU. Where the boxes do not touch it is 1, and its gradient 0."""
    return 1 - paired_iou(boxes, others)


@full_precision
def giou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """[N], from 0 to 2."""
    return generalized_box_iou_loss(boxes, others)


@full_precision
def diou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """[N], from 0 to 2."""
    return distance_box_iou_loss(boxes, others)


@full_precision
def ciou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """[N], from 0. A predicted box without a side is taken for one of 1e-4, since 0 / 0 is no ratio."""
    low, high = boxes[:, :2], boxes[:, 2:]
    return complete_box_iou_loss(torch.cat([low, torch.maximum(high, low + 1e-4)], 1), others)


OVERLAP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "iou": iou_loss,
    "giou": giou_loss,
    "diou": diou_loss,
    "ciou": ciou_loss,
}
"""The losses that look at boxes themselves."""


@full_precision
def smooth_l1(offsets: Tensor, targets: Tensor, beta: float) -> Tensor:
    """[N, 4], [N, 4] -> [N]: the sum over the four; beta 0 is l1."""
    return F.smooth_l1_loss(offsets, targets, beta=beta, reduction="none").sum(1)


@full_precision
def sigmoid_focal(logits: Tensor, targets: Tensor, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """Sum over all of the focal loss of independent classes (Lin et al., 2017, equation 5). targets: 0 or 1, like logits.

    alpha: the weight of positives, 1 - alpha that of negatives; None: both 1. gamma 0 without alpha is cross-entropy.
    """
    return sigmoid_focal_loss(logits, targets, -1.0 if alpha is None else alpha, gamma, reduction="sum")


@full_precision
def softmax_focal(logits: Tensor, labels: Tensor, gamma: float = 0.0) -> Tensor:
    """Mean over rows of -(1 - p)^gamma log p of the true class; gamma 0 is cross-entropy. logits [N, K], labels int64 [N]."""
    logp = torch.log_softmax(logits, 1).gather(1, labels[:, None]).squeeze(1)
    return -((1 - logp.exp()).clamp_min(0) ** gamma * logp).sum() / max(1, len(labels))


@full_precision
def varifocal(logits: Tensor, quality: Tensor, alpha: float = 0.75, gamma: float = 2.0) -> Tensor:
    """Sum over all of the varifocal loss (Zhang et al., 2021, equation 2): the score itself learns to be the IoU.

    quality: like logits; 0 for what is not there, else the IoU of the predicted box with its object. Positives weigh as much as
    their IoU, negatives alpha * p^gamma.
    """
    p = torch.sigmoid(logits).detach()
    weight = torch.where(quality > 0, quality, alpha * p**gamma)
    return (weight * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")).sum()
