"""Distillation from features: loops over the formulas, timm's task, and interpolation against torch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.task import FeatureDistillationTask
from torch import nn

from selfsup.losses.hints import (
    attention_map,
    attention_transfer,
    cls_patch_cosine,
    feature_regression,
    hint_loss,
    to_grid,
)
from tests.losses.checks import check, check_large, draw, value_and_gradients

B, C, H, W = 3, 4, 2, 3
SHAPE = (B, C, H, W)


def columns(x: torch.Tensor) -> list[list[torch.Tensor]]:
    """The channels of every position of every image."""
    if x.ndim == 4:
        return [[x[i, c, y, j] for c in range(C)] for i, y, j in itertools.product(range(len(x)), range(H), range(W))]
    return [list(v) for v in x.flatten(0, -2)]


def length(v: list[torch.Tensor]) -> torch.Tensor:
    return sum(a * a for a in v).sqrt()


def mean_over(z: torch.Tensor, r: torch.Tensor, term) -> torch.Tensor:
    pairs = [pair for u, v in zip(columns(z), columns(r), strict=True) for pair in zip(u, v, strict=True)]
    return sum(term(a - b) for a, b in pairs) / len(pairs)


def huber(beta: float):
    return lambda d: d * d / (2 * beta) if d.abs() < beta else d.abs() - beta / 2


def cosine(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    u, v = columns(z), columns(r)
    cosines = [
        sum(x * y for x, y in zip(a, b, strict=True)) / (length(a) * length(b)) for a, b in zip(u, v, strict=True)
    ]
    return 1 - sum(cosines) / len(cosines)


def test_hint() -> None:
    check(hint_loss, lambda z, r: mean_over(z, r, lambda d: d * d), *draw(SHAPE, SHAPE))
    check(hint_loss, lambda z, r: mean_over(z, r, lambda d: d * d), *draw((1, C), (1, C)))
    check_large(hint_loss, *draw(SHAPE, SHAPE))


def attention(z: torch.Tensor, r: torch.Tensor, squared: bool) -> torch.Tensor:
    total = z.new_zeros(())
    for i in range(len(z)):
        maps = []
        for x in (z, r):
            sums = [sum(x[i, c, y, j] ** 2 for c in range(x.shape[1])) for y in range(H) for j in range(W)]
            maps.append([s / length(sums) for s in sums])
        squares = sum((a - b) ** 2 for a, b in zip(*maps, strict=True))
        total = total + (squares / (H * W) if squared else squares.sqrt() / 2)
    return total / len(z)


@pytest.mark.parametrize("squared", [True, False])
def test_attention(squared: bool) -> None:
    """The teacher has other channels."""

    def loss(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return attention_transfer(z, r, squared)

    inputs = draw(SHAPE, (B, 7, H, W))
    check(loss, lambda z, r: attention(z, r, squared), *inputs)
    check_large(loss, *inputs)
    z, r = inputs
    for student in (torch.zeros_like(z), z):  # a dead layer; equal maps
        value, gradients = value_and_gradients(loss, (student, r if student is not z else z))
        assert value.isfinite() and all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(attention_map(z).norm(dim=1), torch.ones(B, dtype=torch.float64))
    with pytest.raises(ValueError, match="different grids"):
        loss(z, r.transpose(2, 3))


def regression(z: torch.Tensor, r: torch.Tensor, distance: str, normalise: str, beta: float) -> torch.Tensor:
    def per_position(x: torch.Tensor, change) -> torch.Tensor:
        last = x.movedim(1, -1) if x.ndim == 4 else x
        changed = torch.stack([torch.stack(change(v)) for v in columns(x)]).view(last.shape)
        return changed.movedim(-1, 1) if x.ndim == 4 else changed

    def whitened(v: list[torch.Tensor]) -> list[torch.Tensor]:
        mean = sum(v) / len(v)
        return [(a - mean) / (sum((b - mean) ** 2 for b in v) / len(v) + 1e-5).sqrt() for a in v]

    if normalise == "length":
        z, r = (per_position(x, lambda v: [a / length(v) for a in v]) for x in (z, r))
    if normalise == "whiten":
        r = per_position(r, whitened)
    if distance == "cosine":
        return cosine(z, r)
    return mean_over(z, r, huber(beta) if distance == "smooth_l1" else lambda d: d * d)


@pytest.mark.parametrize("distance", ["mse", "smooth_l1", "cosine"])
@pytest.mark.parametrize("normalise", ["none", "length", "whiten"])
@pytest.mark.parametrize("shape", [SHAPE, (B, 5, C), (B, C)], ids=["map", "tokens", "vector"])
def test_regression(distance: str, normalise: str, shape: tuple[int, ...]) -> None:
    def loss(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return feature_regression(z, r, distance, normalise, 0.7)

    inputs = draw(shape, shape)
    check(loss, lambda z, r: regression(z, r, distance, normalise, 0.7), *inputs)
    check_large(loss, *inputs)
    value, gradients = value_and_gradients(loss, (torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1])))
    assert value.isfinite() and all(g.isfinite().all() and g.abs().max() <= 1e3 for g in gradients)


def test_regression_refuses() -> None:
    a = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="distance='l1'"):
        feature_regression(a, a, "l1")
    with pytest.raises(ValueError, match="normalise='batch'"):
        feature_regression(a, a, "mse", "batch")
    for loss in (hint_loss, feature_regression):
        with pytest.raises(ValueError, match="different shapes"):
            loss(a, torch.zeros(2, 1))


def test_cls_and_patches() -> None:
    def loss(*inputs: torch.Tensor) -> torch.Tensor:
        return cls_patch_cosine(*inputs, 0.5, 2.0)

    inputs = draw((B, C), SHAPE, (B, C), SHAPE)
    check(loss, lambda zc, zp, rc, rp: 0.5 * cosine(zc, rc) + 2 * cosine(zp, rp), *inputs)
    check_large(loss, *inputs)
    torch.testing.assert_close(
        cls_patch_cosine(*inputs),
        feature_regression(*inputs[::2], "cosine") + feature_regression(*inputs[1::2], "cosine"),
    )


@pytest.mark.parametrize("old", [(16, 16), (7, 7), (5, 9), (1, 1)])
@pytest.mark.parametrize("new", [(14, 14), (7, 7), (4, 4), (16, 3), (1, 1)])
def test_grid_equals_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    """In value and gradient; a constant stays what it is."""
    (x,) = draw((2, 3, *old))
    (a, (ga,)), (b, (gb,)) = (
        value_and_gradients(lambda x, f=f: (f(x) * torch.linspace(-1, 1, new[0] * new[1]).view(new)).sum(), (x,))
        for f in (
            lambda x: to_grid(x, new),
            lambda x: F.interpolate(x, new, mode="bilinear", align_corners=False, antialias=True),
        )
    )
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ga, gb, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        to_grid(torch.full_like(x, 3.5), new), torch.full((2, 3, *new), 3.5, dtype=torch.float64)
    )
    single = to_grid(x.float(), new)
    assert single.dtype == torch.float32 and single.shape == (2, 3, *new)
    torch.testing.assert_close(single.double(), to_grid(x, new), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(to_grid(x.float(), new), single)


def test_same_grid_is_left_alone() -> None:
    (x,) = draw(SHAPE)
    assert torch.equal(to_grid(x, (H, W)), x)
    assert to_grid(x.half(), (H, W)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"not \[2, 9, 4\]"):
        to_grid(torch.zeros(2, 9, 4), (3, 3))


class Given(nn.Module):
    """A network of timm's kind that says what it was given."""

    pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}  # noqa: RUF012
    num_classes, in_chans, num_features = 2, 1, C

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.features

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return x if pre_logits else x[:, :2]


def test_hint_equals_timms_task() -> None:
    z, r = (x.float() for x in draw((B, C), (B, C)))

    def theirs(x: torch.Tensor) -> torch.Tensor:
        task = FeatureDistillationTask(
            Given(x), Given(r), criterion=nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False
        )
        return task(torch.zeros(B, 1, 2, 2), torch.tensor([0, 1, 0]))["kd_loss"]

    (value, (gradient,)), (expected, (reference,)) = (
        value_and_gradients(f, (z,)) for f in (lambda x: hint_loss(x, r), theirs)
    )
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, reference, rtol=1e-6, atol=1e-9)
