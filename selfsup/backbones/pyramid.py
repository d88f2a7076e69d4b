"""Feature maps of strides 4, 8, 16 and 32 from any backbone: what heads for segmentation and detection are made for.

    pyramid = selfsup.load_backbone(TARGET, pyramid=True)
    maps = pyramid(images)            # [B, D4, H/4, W/4], [B, D8, H/8, W/8], [B, D16, ...], [B, D32, ...]
    pyramid.channels, pyramid.strides

A net with stages gives its own: of each stride its last layer. A ViT has one stride; as in ViTDet's simple pyramid (Li et al.,
2022, "Exploring Plain Vision Transformer Backbones for Object Detection", section 3) every level is made from its last map alone.
There the levels are made by learnt deconvolutions and a pooling; here by nothing that is learnt, so that a frozen backbone is
loaded and used without training: bilinear interpolation upwards, the mean over the cells that fall together downwards. A head
that is trained on top can learn what a deconvolution would. The same fills strides that a net with stages lacks, from the layer
whose stride is nearest. Sizes are ceil(H / stride), also for patches of 14.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.backbones.backbone import Backbone
from selfsup.backbones.stages import map_shapes
from selfsup.errors import UserError

STRIDES = (4, 8, 16, 32)


class Pyramid(nn.Module):
    """`backbone` with maps of `strides` as its output; `channels` of each; `layers`: the one that each is made from."""

    def __init__(self, backbone: Backbone, strides: Sequence[int] = STRIDES) -> None:
        super().__init__()
        self.backbone = backbone
        self.strides = tuple(strides)
        self.layers = pyramid_layers(backbone, strides)
        used = sorted(set(self.layers))
        widths = {layer: shape[0] for layer, shape in zip(used, map_shapes(backbone, used)[1])}
        self.channels = tuple(widths[layer] for layer in self.layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """[B, C, H, W], normalised -> a map [B, D, ceil(H / stride), ceil(W / stride)] a stride, the finest first."""
        used = sorted(set(self.layers))
        found = dict(zip(used, self.backbone.feature_maps(images, used)))
        height, width = images.shape[-2:]
        sizes = [(-(-height // stride), -(-width // stride)) for stride in self.strides]
        return [resample(found[layer], size) for layer, size in zip(self.layers, sizes)]


def pyramid_layers(backbone: Backbone, strides: Sequence[int] = STRIDES) -> list[int]:
    """For each stride the last layer that has it, else the last with the nearest one (of two, the finer)."""
    info = getattr(backbone.model, "feature_info", None) or []
    reductions = [float(row["reduction"]) for row in info]
    if not reductions:
        raise UserError(f"{backbone.name} does not give intermediate layers; a pyramid needs them")

    def distance(have: float, want: int) -> tuple[float, float]:
        return abs(math.log2(have / want)), have

    return [min(range(len(reductions)), key=lambda i: (*distance(reductions[i], want), -i)) for want in strides]


def resample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, D, h, w] -> [B, D, *size]: each axis up bilinearly or down by averaging cells."""
    if x.shape[-2:] == size:
        return x
    down = (min(size[0], x.shape[-2]), min(size[1], x.shape[-1]))
    if down != x.shape[-2:]:
        x = F.adaptive_avg_pool2d(x, down)
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
