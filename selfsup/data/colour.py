"""Grey levels and hue of images in 8-bit levels (held as float32), and the colour of light.

Of whole levels everything is as PIL computes it; `fine` levels have fractions (of 16-bit images), and nothing is rounded.
"""

import numpy as np
import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as PIL's "L"


def luma(x: Tensor, fine: bool = False) -> Tensor:
    """[N,3,S,S] -> [N,1,S,S], whole levels unless `fine`."""
    red, green, blue = _LUMA
    out = (x[:, 0:1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:3], alpha=blue)
    return out if fine else out.add_(0.5).floor_()


def turn_hue_fine(x: Tensor, turn: Tensor) -> Tensor:
    """As `turn_hue` of levels with fractions, in closed form: a channel is value * (1 - saturation * ramp of the hue)."""
    value, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    span = value - low
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    part = span.clamp(min=1e-6)
    sixths = torch.where(
        value == red,
        (green - blue) / part,
        torch.where(value == green, 2 + (blue - red) / part, 4 + (red - green) / part),
    )
    sixths = torch.remainder(sixths + 6 * turn, 6)
    ramps = [
        ((torch.remainder(sixths - centre, 6) - 3).abs() - 1).clamp(0, 1) for centre in (0, 2, 4)
    ]  # 1: at full value
    return value - span * (1 - torch.cat(ramps, dim=1))


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of [N,3,S,S] by `turn` [N,1,1,1], through HSV in 256 levels as torchvision does with PIL images.

    No sector of the colour wheel is told from another: on the half from red over green to cyan the hue is, in sixths of
    a turn, 3 - (2 max - min + red - green - blue) / (max - min), and the other half is its mirror image.
    """
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    value, low = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(value, blue, out=value)
    torch.minimum(low, blue, out=low)
    span = value - low
    from_cyan = (red - green).sub_(blue).add_(value, alpha=2).sub_(low)
    from_cyan.div_(span.clamp(min=1))  # 0..3
    torch.copysign(from_cyan, torch.sub(green, blue, out=low), out=from_cyan)
    hue = from_cyan.mul_(-255 / 6).add_(127.5).floor_()  # 0..255
    hue.add_(torch.trunc(turn * 255))  # -127..382, then modulo 256
    hue.sub_(torch.floor(torch.mul(hue, 1 / 256, out=low), out=low), alpha=256)
    # the saturation has 256 levels too; times the value it is how far the least of the three lies below it
    depth = span.mul_(255).div_(value.clamp(min=1)).floor_().mul_(value).mul_(1 / 255)
    sixths = hue.mul_(6 / 255)
    ramps = torch.cat([sixths - 3, sixths - 2, sixths - 4], dim=1).abs_()  # [N,3,S,S]
    ramps[:, :1].neg_().add_(2)
    ramps[:, 1:].sub_(1)
    return torch.addcmul(value, depth, ramps.clamp_(0, 1), value=-1).round_()


# Eigenvalues, and eigenvectors as columns, of the covariance of ImageNet's RGB values in [0, 1]: those of fb.resnet.torch,
# which everybody uses.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


def light(u: np.ndarray, std: float) -> np.ndarray:
    """PCA colour noise: uniform u [B,4] in [0, 1) -> levels to add to red, green and blue [B,3].

    Krizhevsky et al., 2012, section 4.1: [p1, p2, p3] [a1 l1, a2 l2, a3 l3]^T with eigenvectors p and eigenvalues l of
    the covariance of RGB values, and a drawn from N(0, std^2). Normal numbers by Box and Muller, 1958.
    """
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, :2])), 2 * np.pi * u[:, 2:]  # [B,2]
    normal = np.concatenate([radius * np.cos(angle), radius[:, :1] * np.sin(angle[:, :1])], axis=1)  # [B,3]
    return 255 * (std * normal * _EIGENVALUES) @ _EIGENVECTORS.T
