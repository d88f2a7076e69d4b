"""Heads for semantic segmentation: from maps of a backbone to logits, whose size is that of the finest map they used.

linear      batch norm and a 1x1 convolution on the last map: DINOv2's linear protocol (Oquab et al., 2024, section 7.4)
multilayer  the same on the last four maps of one net, resampled to the finest and concatenated: its "+ms" protocol's features
mlp         SegFormer's all-MLP decoder on strides 4, 8, 16 and 32 (Xie et al., 2021, section 3.2)
upernet     UPerNet (Xiao et al., 2018) on the same four; the decoder is segmentation-models-pytorch's
unetr       that of UNETR (Hatamizadeh et al., 2022, section 3.1) in two dimensions: maps of a ViT after each quarter of it,
            the deepest doubled again and again by deconvolutions, at each size joined with an earlier one, at last with the image
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.backbones.pyramid import Pyramid, pyramid_layers, resample
from selfsup.backbones.stages import map_shapes
from selfsup.errors import UserError

WIDTHS = {"mlp": 256, "upernet": 256, "unetr": 64}


class Trunk(nn.Module):
    """The maps that a head reads: forward(images [B, C, H, W]) -> list of [B, D, h, w], the order and `channels` fixed."""

    def __init__(self, backbone: Backbone, head: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.pyramid: Pyramid | None = None
        self.layers = trunk_layers(backbone, head)
        if head in ("mlp", "upernet"):
            self.pyramid = Pyramid(backbone)
            self.layers = list(self.pyramid.layers)
            self.channels = list(self.pyramid.channels)
        else:
            self.channels = [shape[0] for shape in map_shapes(backbone, self.layers)[1]]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.pyramid(images) if self.pyramid is not None else self.backbone.feature_maps(images, self.layers)


def trunk_layers(backbone: Backbone, head: str) -> list[int]:
    """Which layers a head reads. Raises UserError where the net does not have them."""
    depth = len(getattr(backbone.model, "feature_info", None) or [])
    if not depth:
        raise UserError(f"head={head}: {backbone.name} does not give intermediate layers")
    if head == "linear":
        return [depth - 1]
    if head == "multilayer":  # without the stems of stride 2 that some nets count: maps would be four times as large
        info: Any = backbone.model.feature_info
        fit = [i for i in range(depth) if info[i]["reduction"] >= 4]
        return fit[-4:] or [depth - 1]
    if head in ("mlp", "upernet"):
        return pyramid_layers(backbone)
    if not _plain_vit(backbone):
        raise UserError(f"head=unetr is for ViTs, and {backbone.name} is none; use head=upernet or head=mlp")
    if depth < 4:
        raise UserError(
            f"head=unetr joins maps of four depths, and {backbone.name} has {depth} blocks; use head=upernet"
        )
    return [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]


def _plain_vit(backbone: Backbone) -> bool:
    info: Any = backbone.model.feature_info
    return hasattr(backbone.model, "num_prefix_tokens") and len({row["reduction"] for row in info}) == 1


def create_head(
    name: str,
    channels: Sequence[int],
    classes: int,
    *,
    stride: int,
    in_chans: int,
    width: int | None,
    dropout: float | None,
) -> nn.Module:
    """The head by name for maps of `channels`; head(maps, images) -> logits [B, classes, h, w]."""
    width = width or WIDTHS.get(name, 0)
    drop = dropout if dropout is not None else 0.1 if name in WIDTHS else 0.0
    if name in ("linear", "multilayer"):
        return LinearHead(channels, classes, drop)
    if name == "mlp":
        return MLPHead(channels, classes, width, drop)
    if name == "upernet":
        return UPerHead(channels, classes, width, drop)
    return UNETRHead(channels, classes, width, drop, stride, in_chans)


class LinearHead(nn.Module):
    """Batch norm and a 1x1 convolution on the maps, resampled to the finest one and concatenated."""

    def __init__(self, channels: Sequence[int], classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(sum(channels))
        self.drop = nn.Dropout2d(dropout)
        self.out = nn.Conv2d(sum(channels), classes, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        size = max((tuple(m.shape[-2:]) for m in maps), key=math.prod)
        return self.out(self.drop(self.norm(torch.cat([resample(m, size) for m in maps], dim=1))))  # type: ignore[arg-type]


class MLPHead(nn.Module):
    """Each level by a linear layer to `width`, up to the finest, concatenated, fused by one more layer."""

    def __init__(self, channels: Sequence[int], classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = nn.Sequential(
            nn.Conv2d(width * len(channels), width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        self.drop = nn.Dropout2d(dropout)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        size = maps[0].shape[-2:]
        same = [
            F.interpolate(level(m), size=size, mode="bilinear", align_corners=False)
            for level, m in zip(self.levels, maps)
        ]
        return self.out(self.drop(self.fuse(torch.cat(same[::-1], dim=1))))  # coarse first, as in the authors' code


class UPerHead(nn.Module):
    """segmentation-models-pytorch's UPerNetDecoder and a 1x1 convolution."""

    def __init__(self, channels: Sequence[int], classes: int, width: int, dropout: float) -> None:
        super().__init__()
        try:
            from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
        except ImportError:
            raise UserError(
                "head=upernet needs segmentation-models-pytorch >= 0.5: pip install 'selfsup[segment]'; head=mlp needs nothing"
            ) from None
        # its encoders also give strides 1 and 2, which this decoder does not look at
        self.decoder = UPerNetDecoder([1, 1, *channels], encoder_depth=len(channels) + 1, decoder_channels=width)
        self.drop = nn.Dropout2d(dropout)
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        return self.out(self.drop(self.decoder([images, images, *maps])))


class UNETRHead(nn.Module):
    """Doubles the deepest map until it has the image's size; skips are brought to their size by deconvolutions of their own."""

    def __init__(
        self, channels: Sequence[int], classes: int, width: int, dropout: float, stride: int, in_chans: int
    ) -> None:
        super().__init__()
        doublings = max(1, round(math.log2(stride)))
        widths = [max(width // 2, width * 2 ** (doublings - 1 - i)) for i in range(doublings)]
        widths = [min(w, 8 * width) for w in widths]
        self.ups, self.joins, self.skips = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        before = channels[-1]
        earlier = list(channels[:-1])[::-1]  # three quarters, a half, a quarter
        for i, now in enumerate(widths):
            self.ups.append(nn.ConvTranspose2d(before, now, 2, stride=2))
            if i == doublings - 1:
                self.skips.append(_block(in_chans, now))  # the image itself
                joined = 2 * now
            elif i < len(earlier):
                steps: list[nn.Module] = []
                come = earlier[i]
                for _ in range(i + 1):
                    steps += [nn.ConvTranspose2d(come, now, 2, stride=2), _block(now, now)]
                    come = now
                self.skips.append(nn.Sequential(*steps))
                joined = 2 * now
            else:
                self.skips.append(nn.Identity())
                joined = now
            self.joins.append(_block(joined, now))
            before = now
        self.drop = nn.Dropout2d(dropout)
        self.out = nn.Conv2d(before, classes, 1)

    def forward(self, maps: Sequence[Tensor], images: Tensor) -> Tensor:
        x, earlier, last = maps[-1], list(maps[:-1])[::-1], len(self.ups) - 1
        for i, (up, skip, join) in enumerate(zip(self.ups, self.skips, self.joins)):
            x = up(x)
            if i == last:
                x = resample(x, tuple(images.shape[-2:]))  # type: ignore[arg-type]  # a stride of 14 or so
                x = torch.cat([x, skip(images)], dim=1)
            elif i < len(earlier):
                x = torch.cat([x, skip(earlier[i])], dim=1)
            x = join(x)
        return self.out(self.drop(x))


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    )
