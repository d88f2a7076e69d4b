"""Pixels of hidden patches against what was predicted of them: MAE (He et al., 2022, section 3), SimMIM (Xie et al., 2022)."""

from typing import Literal

from torch import Tensor

from selfsup.losses.numerics import at_least_float32, same_shape

Distance = Literal["l2", "l1"]


def patchify(images: Tensor, size: int | tuple[int, ...]) -> Tensor:
    """[N, C, H, W] -> [N, h*w, size*size*C]: patches row by row, their pixels row by row, channels last.

    Volumes [N, C, D, H, W] -> [N, d*h*w, pd*ph*pw*C], slice by slice; size: (pd, ph, pw).
    """
    if images.ndim == 5:
        pd, ph, pw = (size,) * 3 if isinstance(size, int) else size
        x = images.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pd))  # [N, C, d, pd, h, ph, w, pw]
        return x.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)
    size = size if isinstance(size, int) else size[0]
    x = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [N, C, h, p, w, q]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, grid: tuple[int, int], size: int) -> Tensor:
    """The inverse of `patchify`: [N, h*w, size*size*C] -> [N, C, h*size, w*size]."""
    x = patches.unflatten(2, (size, size, -1)).unflatten(1, grid)  # [N, h, w, p, q, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch [..., P] by its own mean and standard deviation (MAE, section 3, "Reconstruction target")."""
    x = at_least_float32(patches)
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()


def reconstruction_loss(prediction: Tensor, target: Tensor, distance: Distance = "l2") -> Tensor:
    """Mean squared or absolute difference of hidden patches [..., P] alone."""
    same_shape(prediction, target)
    difference = at_least_float32(prediction) - at_least_float32(target)
    return difference.square().mean() if distance == "l2" else difference.abs().mean()
