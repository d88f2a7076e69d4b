"""Deformable 3x3 convolutions in timm's ResNets (Dai et al., 2017; Zhu et al., 2019, "Deformable ConvNets v2", section 3.2).

    backbone=resnet50 backbone.deformable=[3,4]                  # layer3 and layer4; in each block the 3x3 convolution
    backbone.deformable_modulated=false                          # offsets alone: the first version

Each of the nine taps is read at a place that is moved by an offset, and weighed; a 3x3 convolution of zeros at first tells both.
A weight is 2 sigmoid(0) = 1 at first, not the paper's 1/2: so a net begins as the same one without, pretrained or not.
Of a block with two 3x3 convolutions (ResNet-18 and -34) the second is replaced. The sampling runs in float32 at least, as
torchvision's kernels need it. Its backward pass on CUDA has no deterministic kernel: deterministic=true is not for it there.
timm has no such layer: an exported folder is loaded by `selfsup.load_backbone` alone.
"""

from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torchvision.ops import DeformConv2d, deform_conv2d

from selfsup.errors import UserError
from selfsup.wording import one_line


class Deformable(DeformConv2d):
    """A convolution whose taps move; `weight` and `bias` are those of the convolution it replaces."""

    def __init__(self, conv: nn.Conv2d, modulated: bool) -> None:
        shape: dict[str, Any] = {
            "kernel_size": conv.kernel_size,
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
        }
        super().__init__(conv.in_channels, conv.out_channels, groups=conv.groups, bias=conv.bias is not None, **shape)
        self.weight, self.bias = conv.weight, conv.bias
        self.taps = conv.kernel_size[0] * conv.kernel_size[1]
        self.modulated = modulated
        self.offset = nn.Conv2d(conv.in_channels, self.taps * (3 if modulated else 2), **shape)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, h, w]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        told = self.offset(x).to(wide)  # [B, 2 * 9 or 3 * 9, h, w]
        offset = told[:, : 2 * self.taps]  # [B, 18, h, w]: y and x of each tap
        mask = 2 * told[:, 2 * self.taps :].sigmoid() if self.modulated else None  # [B, 9, h, w]
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(wide)
            out = deform_conv2d(
                x.to(wide), offset, self.weight.to(wide), bias, self.stride, self.padding, self.dilation, mask
            )
        return out.to(x.dtype)


def offsets(model: nn.Module) -> list[str]:
    """Keys of the weights that tell offsets; with zeros there a net computes what it does without."""
    layers = [name for name, module in model.named_modules() if isinstance(module, Deformable)]
    return [f"{layer}.offset.{kind}" for layer in layers for kind in ("weight", "bias")]


def deform(model: nn.Module, name: str, stages: Any, modulated: Any = True) -> list[int]:
    """Replace the 3x3 convolutions of a ResNet's stages, in place; the stages, ascending. UserError naming the key."""
    if not isinstance(model, ResNet):
        raise UserError(
            f"backbone.deformable: for timm's ResNets, and {name} is a {type(model).__name__}; leave it out, or use resnet50"
        )
    given = [stages] if isinstance(stages, int) else stages
    if not isinstance(given, (list, tuple)) or not given or any(s not in (1, 2, 3, 4) or s is True for s in given):
        raise UserError(
            f"backbone.deformable={one_line(stages)}: give the stages whose 3x3 convolutions deform, of 1 to 4, as in [3, 4]"
        )
    if not isinstance(modulated, bool):
        raise UserError(f"backbone.deformable_modulated={one_line(modulated)}: give true or false")
    chosen = sorted(set(given))
    for stage in chosen:
        for block in getattr(model, f"layer{stage}"):
            if not isinstance(block, (BasicBlock, Bottleneck)) or block.conv2.kernel_size != (3, 3):
                raise UserError(f"backbone.deformable: the blocks of {name} have no 3x3 convolution that could deform")
            block.conv2 = Deformable(block.conv2, modulated)
    return chosen
