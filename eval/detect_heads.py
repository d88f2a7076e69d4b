"""torchvision's heads with other losses of boxes and classes, and with scores that say how well a box fits.

A detection's class score p says what it is, not how good its box is; ranking by p alone loses precision at high IoU. Hence
`confidence`:

score       p alone
centerness  p^a c^(1-a): a branch learns how central a place is in its object (FCOS: Tian et al., 2019, section 3.2)
iou         p^a q^(1-a): a branch beside the box learns, by cross-entropy, the IoU that its box has with the object ("IoU-aware
            single-stage object detector", Wu, Li & Wang, 2020, section 3; FCOS's journal version, 2020, takes the same)
varifocal   p itself learns to be that IoU, by the varifocal loss (Zhang et al., 2021, section 3.2, on the boxes of the one head)

Classes are told by the sigmoid focal loss (Lin et al., 2017), divided, as the box loss is, by the number of places with an object
in the batch. In Faster R-CNN the second stage takes the box loss of `loss`, the proposals keep torchvision's smooth_l1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder, Matcher
from torchvision.models.detection.fcos import FCOS, FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads

from selfsup.losses.boxes import OVERLAP, paired_iou, sigmoid_focal, smooth_l1, softmax_focal, varifocal

from .detect_settings import DetectLoss, DetectSettings

Target = dict[str, Tensor]
"""boxes float32 [N, 4], labels int64 [N]."""


def box_loss(
    offsets: Tensor, anchors: Tensor, boxes: Tensor, coder: BoxCoder | BoxLinearCoder, loss: DetectLoss
) -> tuple[Tensor, Tensor]:
    """(loss of each row [N], predicted boxes [N, 4]). offsets: encoded against anchors; boxes: where they should be."""
    linear = isinstance(coder, BoxLinearCoder)
    predicted = coder.decode(offsets, anchors) if linear else coder.decode_single(offsets, anchors)
    assert loss.box is not None
    if loss.box == "smooth_l1":
        wanted = coder.encode(anchors, boxes) if linear else coder.encode_single(boxes, anchors)
        return smooth_l1(offsets, wanted, loss.beta), predicted
    return OVERLAP[loss.box](predicted, boxes), predicted


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """[N], from 0 at an edge of its box to 1 in the middle (Tian et al., 2019, equation 3)."""
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = centres - boxes[:, :2], boxes[:, 2:] - centres  # [N, 2] each
    ratio = torch.minimum(before, after) / torch.maximum(before, after).clamp_min(1e-6)
    return ratio.clamp_min(0).prod(1).sqrt()


def dense_losses(
    targets: list[Target], outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor], coder: Any,
    settings: DetectSettings, quality: str | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Losses of a head that answers at every place.

    outputs: cls_logits [B, A, K], bbox_regression [B, A, 4], and by the name that `quality` says [B, A, 1].
    matched: of each place the number of its object, -1 for background, -2 for what is neither.
    """
    loss, confidence = settings.loss, settings.confidence
    logits = outputs["cls_logits"].flatten(0, 1)  # [B*A, K]
    match = torch.cat(matched)
    rows = torch.where(match >= 0)[0]
    number = len(rows)
    boxes = torch.cat([t["boxes"][m[m >= 0]] for t, m in zip(targets, matched)])
    labels = torch.cat([t["labels"][m[m >= 0]] for t, m in zip(targets, matched)])
    places = torch.cat(anchors)[rows]
    each, predicted = box_loss(outputs["bbox_regression"].flatten(0, 1)[rows], places, boxes, coder, loss)
    out = {"box": loss.weight * each.sum() / max(1, number)}
    overlap = paired_iou(predicted.detach(), boxes)
    wanted = torch.zeros_like(logits)
    wanted[rows, labels] = overlap if confidence == "varifocal" else 1.0
    known = match != Matcher.BETWEEN_THRESHOLDS
    if confidence == "varifocal":
        total = varifocal(logits[known], wanted[known])
    else:
        assert loss.gamma is not None
        total = sigmoid_focal(logits[known], wanted[known], loss.alpha, loss.gamma)
    out["class"] = total / max(1, number)
    if quality is not None and confidence in ("centerness", "iou"):
        truth = overlap if confidence == "iou" else centerness(places, boxes)
        said = outputs[quality].flatten()[rows]
        out["quality"] = F.binary_cross_entropy_with_logits(said, truth, reduction="sum") / max(1, number)
    return out


def scores(logits: Tensor, quality: Tensor | None, settings: DetectSettings) -> Tensor:
    """[..., K]: what detections are ranked by. quality: logits [..., 1]."""
    p = torch.sigmoid(logits)
    if quality is None or settings.confidence not in ("centerness", "iou"):
        return p
    power = settings.confidence_power
    return p**power * torch.sigmoid(quality) ** (1 - power)


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, but of 8 channels at least: a map of 1 x 1 has nothing else to take a variance over."""
    return nn.GroupNorm(min(32, channels // 8), channels)


class OwnFCOSHead(FCOSHead):
    """torchvision's, with `dense_losses`. Box sides start at 4 strides, not at 0, where its ReLU has no gradient."""

    def __init__(self, width: int, classes: int, settings: DetectSettings) -> None:
        super().__init__(width, 1, classes)
        self.settings = settings
        self.classification_head = FCOSClassificationHead(width, 1, classes, norm_layer=group_norm)
        self.regression_head = FCOSRegressionHead(width, 1, norm_layer=group_norm)
        nn.init.constant_(self.regression_head.bbox_reg.bias, 4.0)

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        return dense_losses(targets, head_outputs, anchors, matched_idxs, self.box_coder, self.settings, "bbox_ctrness")


class OwnFCOS(FCOS):
    """torchvision's, ranked by `scores`."""

    settings: DetectSettings

    def postprocess_detections(self, head_outputs, anchors, image_shapes):
        found = [scores(c, q, self.settings) for c, q in zip(head_outputs["cls_logits"], head_outputs["bbox_ctrness"])]
        # it takes sqrt(sigmoid(class) * sigmoid(centerness))
        given = {"cls_logits": [torch.logit(s * s, eps=1e-7) for s in found]}
        given["bbox_ctrness"] = [torch.full_like(q, 50.0) for q in head_outputs["bbox_ctrness"]]
        return super().postprocess_detections(head_outputs | given, anchors, image_shapes)


class OwnRetinaHead(RetinaNetHead):
    """torchvision's, with `dense_losses`; with confidence=iou a branch `quality` on the layers that the boxes come from."""

    def __init__(self, width: int, anchors: int, classes: int, settings: DetectSettings) -> None:
        super().__init__(width, anchors, classes, norm_layer=group_norm)
        self.settings = settings
        self.quality: nn.Conv2d | None = None
        if settings.confidence == "iou":
            self.quality = nn.Conv2d(width, anchors, 3, padding=1)
            nn.init.normal_(self.quality.weight, std=0.01)
            nn.init.zeros_(self.quality.bias)  # type: ignore[arg-type]

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        head = self.regression_head
        layers = [head.conv(features) for features in x]
        out = {"cls_logits": self.classification_head(x)}
        out["bbox_regression"] = torch.cat([_rows(head.bbox_reg(m), 4) for m in layers], 1)
        if self.quality is not None:
            out["quality"] = torch.cat([_rows(self.quality(m), 1) for m in layers], 1)
        return out

    def compute_loss(self, targets, head_outputs, anchors, matched_idxs):
        coder, quality = self.regression_head.box_coder, None if self.quality is None else "quality"
        return dense_losses(targets, head_outputs, anchors, matched_idxs, coder, self.settings, quality)


def _rows(x: Tensor, each: int) -> Tensor:
    """[B, A * each, h, w] -> [B, h * w * A, each], in the order of the anchors."""
    b, _, h, w = x.shape
    return x.view(b, -1, each, h, w).permute(0, 3, 4, 1, 2).reshape(b, -1, each)


class OwnRetinaNet(RetinaNet):
    """torchvision's, ranked by `scores`."""

    settings: DetectSettings

    def postprocess_detections(self, head_outputs, anchors, image_shapes):
        logits = head_outputs["cls_logits"]
        qualities = head_outputs.get("quality", [None] * len(logits))
        found = [torch.logit(scores(c, q, self.settings), eps=1e-7) for c, q in zip(logits, qualities)]
        return super().postprocess_detections(head_outputs | {"cls_logits": found}, anchors, image_shapes)


class OwnRoIHeads(RoIHeads):
    """torchvision's second stage for boxes alone, with the losses of `loss`; made from one of its own by `of`."""

    loss: DetectLoss

    @classmethod
    def of(cls, heads: RoIHeads, loss: DetectLoss) -> "OwnRoIHeads":
        """The same modules and thresholds."""
        out = cls.__new__(cls)
        nn.Module.__init__(out)
        out.__dict__.update(heads.__dict__)
        out.loss = loss
        return out

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, _ = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, offsets = self.box_predictor(pooled)  # [N, K + 1], [N, 4 (K + 1)]
        kinds = torch.cat(labels)
        rows = torch.where(kinds > 0)[0]
        boxes = torch.cat([t["boxes"][m[k > 0]] for t, m, k in zip(targets, matched, labels)])
        own = offsets.view(len(kinds), -1, 4)[rows, kinds[rows]]
        each, _ = box_loss(own, torch.cat(proposals)[rows], boxes, self.box_coder, self.loss)
        assert self.loss.gamma is not None
        return [], {
            "class": softmax_focal(logits, kinds, self.loss.gamma),
            "box": self.loss.weight * each.sum() / max(1, len(kinds)),
        }
