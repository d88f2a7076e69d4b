"""torchvision's detectors on a backbone: its pyramid, a learnt feature pyramid network on it, and the heads.

The trunk's maps of strides 4 to 32 (`selfsup.backbones.pyramid`) are joined by an FPN (Lin et al., 2017, "Feature Pyramid
Networks"); levels of larger strides are made from its last. New layers have group norm, so that a small batch is enough; batch
norms of a trunk that is fine-tuned keep their statistics.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.poolers import initLevelMapper

from selfsup.backbones import Backbone
from selfsup.backbones.pyramid import Pyramid

from .detect_heads import OwnFCOS, OwnFCOSHead, OwnRetinaHead, OwnRetinaNet, OwnRoIHeads, group_norm
from .detect_settings import DetectSettings


class Levels(nn.Module):
    """Images [B, C, H, W] -> {"0": [B, width, h, w], ...}, the finest first; what torchvision calls a backbone."""

    def __init__(self, backbone: Backbone, settings: DetectSettings) -> None:
        super().__init__()
        assert settings.strides is not None
        self.pyramid = Pyramid(backbone, settings.strides)
        self.frozen, self.bf16 = settings.trunk == "frozen", settings.precision == "bf16"
        self.out_channels = settings.width
        more: Any = (
            LastLevelMaxPool() if settings.detector == "fasterrcnn" else LastLevelP6P7(settings.width, settings.width)
        )
        self.fpn = FeaturePyramidNetwork(list(self.pyramid.channels), settings.width, more, norm_layer=group_norm)
        last = settings.strides[-1]
        self.strides = (
            *settings.strides,
            *((last * 2,) if settings.detector == "fasterrcnn" else (last * 2, last * 4)),
        )
        backbone.requires_grad_(not self.frozen)

    def train(self, mode: bool = True) -> "Levels":
        """A frozen trunk stays in eval mode, and so do batch norms of one that is trained."""
        super().train(mode)
        for module in self.pyramid.modules():
            if self.frozen or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = False
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        learns = torch.is_grad_enabled() and not self.frozen
        half = torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.bf16)
        with torch.set_grad_enabled(learns), half:
            maps = self.pyramid(images)
        return self.fpn(OrderedDict((str(i), m.float()) for i, m in enumerate(maps)))


class Anchors(AnchorGenerator):
    """torchvision's with strides that are given; its own are guessed from sizes, which is wrong where they do not divide."""

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int]) -> None:
        super().__init__(tuple(tuple(s) for s in sizes), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        like = feature_maps[0]
        self.set_cell_anchors(like.dtype, like.device)
        grids: Any = [m.shape[-2:] for m in feature_maps]
        steps: Any = [(stride, stride) for stride in self.strides]
        return [torch.cat(self.grid_anchors(grids, steps))] * len(image_list.image_sizes)


class Prepared(GeneralizedRCNNTransform):
    """Normalises, and fills images of their own sizes up to squares of `side` below and to the right with the mean.

    torchvision fills up to the largest image of a batch. What lies there changes the statistics of norms over a map, and so what
    is found: with one square for all, in training and at test, an image's result does not depend on its neighbours.
    """

    def __init__(self, backbone: Backbone, side: int) -> None:
        super().__init__(1, 1, list(backbone.mean), list(backbone.std))
        self.side = side

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        out = images[0].new_zeros(len(images), len(images[0]), self.side, self.side)
        for row, image in zip(out, images):
            row[:, : image.shape[1], : image.shape[2]] = image
        return out


def multiple_of(backbone: Backbone) -> int:
    """What sides of images are filled up to: the patch of a ViT; 32, or a larger stride, elsewhere."""
    reductions = {int(row["reduction"]) for row in getattr(backbone.model, "feature_info", None) or []}
    return backbone.stride if len(reductions) == 1 else max(32, backbone.stride)


def create_detector(backbone: Backbone, classes: int, side: int, settings: DetectSettings) -> nn.Module:
    """The detector of complete settings; training: images, targets -> losses; eval: images -> boxes, labels, scores.

    side: of the squares that images are filled up to. Labels are 0 to K - 1, of fasterrcnn 1 to K (0 is background).
    """
    assert settings.anchor is not None
    levels = Levels(backbone, settings)
    transform = Prepared(backbone, side)
    base = [settings.anchor * stride for stride in levels.strides]
    if settings.detector == "fasterrcnn":
        return _faster(levels, base, classes, transform, settings)
    limits: dict[str, Any] = {
        "score_thresh": settings.threshold, "nms_thresh": settings.nms, "detections_per_img": settings.detections,
    }  # fmt: skip
    if settings.detector == "fcos":
        anchors = Anchors([[s] for s in levels.strides], (1.0,), levels.strides)
        head = OwnFCOSHead(settings.width, classes, settings)
        model: Any = OwnFCOS(levels, classes, anchor_generator=anchors, head=head, **limits)
    else:
        anchors = Anchors([[s * 2 ** (k / 3) for k in range(3)] for s in base], (0.5, 1.0, 2.0), levels.strides)
        retina = OwnRetinaHead(settings.width, anchors.num_anchors_per_location()[0], classes, settings)
        model = OwnRetinaNet(levels, classes, anchor_generator=anchors, head=retina, **limits)
    model.transform, model.settings = transform, settings
    return model


def _faster(
    levels: Levels, base: Sequence[float], classes: int, transform: Prepared, settings: DetectSettings
) -> nn.Module:
    assert settings.strides is not None and settings.anchor is not None
    names = [str(i) for i in range(len(settings.strides))]
    # the size of an object that is pooled from stride 16: 224 for anchors of 8 strides
    pool = MultiScaleRoIAlign(names, 7, 2, canonical_scale=max(1, round(224 * settings.anchor / 8)))
    pool.scales = [1 / stride for stride in settings.strides]  # else it guesses, from sizes before the filling up
    lowest, highest = (s.bit_length() - 1 for s in (settings.strides[0], settings.strides[-1]))
    pool.map_levels = initLevelMapper(lowest, highest, canonical_scale=pool.canonical_scale, canonical_level=4)
    model = FasterRCNN(
        levels, classes + 1, rpn_anchor_generator=Anchors([[s] for s in base], (0.5, 1.0, 2.0), levels.strides),
        box_roi_pool=pool, box_score_thresh=settings.threshold, box_nms_thresh=settings.nms,
        box_detections_per_img=settings.detections,
    )  # fmt: skip
    model.roi_heads = OwnRoIHeads.of(model.roi_heads, settings.loss)
    model.transform = transform
    return model
