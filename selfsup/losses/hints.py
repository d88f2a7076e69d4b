"""Distillation from features, position by position. Maps are [B, D, h, w]; vectors and tokens have D last.

Both sides have the same shape when they come here: the caller projects the student's channels and, where the grids
differ, brings one of them to the other by `to_grid`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.losses.numerics import full_precision, same_shape, unit

Distance = Literal["mse", "smooth_l1", "cosine"]
Normalisation = Literal["none", "length", "whiten"]


def _channels_last(x: Tensor) -> Tensor:
    """[B, D, h, w] -> [B, h, w, D]; anything else has them last already."""
    return x.movedim(1, -1) if x.ndim == 4 else x


@full_precision
def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the projected student layer (Romero et al., 2015, "FitNets").

    The paper has half the sum of squares; the mean, which does not grow with the layer, is what all published codes and
    timm's FeatureDistillationTask use.
    """
    same_shape(student, teacher)
    return (student - teacher).square().mean()


@full_precision
def attention_map(x: Tensor) -> Tensor:
    """Sum over the channels of squares, of length 1: [B, C, h, w] -> [B, h*w] (Zagoruyko & Komodakis, 2017, F_sum^2)."""
    return unit(x.square().sum(1).flatten(1))


@full_precision
def attention_transfer(student: Tensor, teacher: Tensor, squared: bool = True) -> Tensor:
    """Difference of the normalised attention maps (Zagoruyko & Komodakis, 2017, p = 2); [B, C, h, w] each.

    The channels may differ in number, the grids not. As in the published code: the squares of the difference, mean over
    images and positions (its beta is 1000). With squared=False as printed: half of the length of the difference, mean over
    the images; its gradient does not fade as the maps become alike.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            f"attention transfer: student {list(student.shape)} and teacher {list(teacher.shape)} have different grids"
        )
    difference = attention_map(student) - attention_map(teacher)  # [B, h*w]
    if squared:
        return difference.square().mean()
    return torch.linalg.vector_norm(difference, dim=1).mean() / 2


@full_precision
def feature_regression(
    student: Tensor,
    teacher: Tensor,
    distance: Distance = "smooth_l1",
    normalise: Normalisation = "none",
    beta: float = 1.0,
) -> Tensor:
    """Mean distance of the features; both [B, D, h, w], or [..., D].

    distance: "mse"; "smooth_l1" with its `beta`; "cosine", 1 - cosine similarity. normalise, before it: "length" brings
    both to length 1 at each position; "whiten" takes mean and standard deviation over the channels out of the teacher's
    alone, so that no single channel rules (Wei et al., 2022, "Contrastive Learning Rivals Masked Image Modeling in
    Fine-tuning via Feature Distillation", with smooth-L1 and beta = 2).
    """
    same_shape(student, teacher)
    z, r = _channels_last(student), _channels_last(teacher)
    if normalise == "length":
        z, r = unit(z), unit(r)
    elif normalise == "whiten":
        r = F.layer_norm(r, r.shape[-1:])
    elif normalise != "none":
        raise ValueError(f"feature regression: normalise={normalise!r} is none of 'none', 'length', 'whiten'")
    if distance == "mse":
        return (z - r).square().mean()
    if distance == "smooth_l1":
        return F.smooth_l1_loss(z, r, beta=beta)
    if distance == "cosine":
        return 1 - (unit(z) * unit(r)).sum(-1).mean()
    raise ValueError(f"feature regression: distance={distance!r} is none of 'mse', 'smooth_l1', 'cosine'")


@full_precision
def cls_patch_cosine(
    student_cls: Tensor,
    student_patches: Tensor,
    teacher_cls: Tensor,
    teacher_patches: Tensor,
    cls_weight: float = 1.0,
    patch_weight: float = 1.0,
) -> Tensor:
    """cls_weight (1 - cos) of the CLS tokens [B, D] + patch_weight (1 - cos) of the patches [B, D, h, w], means of each.

    For teachers trained without labels, whose directions carry the meaning; cosine on both is the summary and the larger
    part of the spatial loss of AM-RADIO (Ranzinger et al., 2024, "Agglomerative Vision Foundation Model").
    """
    return cls_weight * feature_regression(student_cls, teacher_cls, "cosine") + patch_weight * feature_regression(
        student_patches, teacher_patches, "cosine"
    )


@full_precision
def to_grid(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, D, h, w] -> [B, D, *size] by bilinear interpolation that averages over what it leaves out (antialias).

    F.interpolate(mode="bilinear", antialias=True) as two products of matrices: the gradient of F.interpolate is not
    deterministic on CUDA.
    """
    if x.ndim != 4:
        raise ValueError(f"to_grid takes maps [B, D, h, w], not {list(x.shape)}")
    rows, columns = (_resizing(a, b, x) for a, b in zip(x.shape[2:], size, strict=True))
    return x if tuple(x.shape[2:]) == tuple(size) else rows @ x @ columns.t()


def _resizing(old: int, new: int, like: Tensor) -> Tensor:
    """Weights [new, old]: a triangle around each new position, as wide as the larger of the two pixels, of sum 1."""
    scale = old / new
    centers = (torch.arange(new, device=like.device, dtype=like.dtype) + 0.5) * scale
    positions = torch.arange(old, device=like.device, dtype=like.dtype) + 0.5
    weights = (1 - (positions - centers[:, None]).abs() / max(scale, 1.0)).clamp_min(0)  # [new, old]
    return weights / weights.sum(1, keepdim=True)
