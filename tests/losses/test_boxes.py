"""Losses of detectors against their formulas in plain numbers, one box at a time."""

import math

import pytest
import torch

from selfsup.losses import boxes as loss

KINDS = ["iou", "giou", "diou", "ciou"]


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Random ones that overlap more or less, one pair apart, one inside the other, one equal."""
    g = torch.Generator().manual_seed(0)
    corner, side = torch.rand(12, 2, generator=g) * 10, torch.rand(12, 2, generator=g) * 8 + 1
    a = torch.cat([corner, corner + side], 1)
    b = a + torch.randn(12, 4, generator=g)
    b = torch.cat([torch.minimum(b[:, :2], b[:, 2:] - 0.5), b[:, 2:]], 1)
    more = [([0, 0, 2, 1], [5, 7, 9, 8]), ([0, 0, 10, 10], [2, 3, 4, 8]), ([1, 2, 3, 5], [1, 2, 3, 5])]
    a = torch.cat([a, torch.tensor([m[0] for m in more]).float()])
    return a.double(), torch.cat([b, torch.tensor([m[1] for m in more]).float()]).double()


def formula(kind: str, a: list[float], b: list[float], alpha: float | None = None) -> float:
    """From the papers; alpha: of CIoU, where it is held fixed."""
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    iou = w * h / union
    wide, high = max(a[2], b[2]) - min(a[0], b[0]), max(a[3], b[3]) - min(a[1], b[1])
    apart = ((a[0] + a[2] - b[0] - b[2]) ** 2 + (a[1] + a[3] - b[1] - b[3]) ** 2) / 4
    diou = 1 - iou + apart / (wide**2 + high**2)
    if kind == "ciou":
        v = 4 / math.pi**2 * (math.atan((b[2] - b[0]) / (b[3] - b[1])) - math.atan((a[2] - a[0]) / (a[3] - a[1]))) ** 2
        return diou + v * (v / (1 - iou + v + 1e-12) if alpha is None else alpha)
    return {"iou": 1 - iou, "giou": 1 - iou + (wide * high - union) / (wide * high), "diou": diou}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_overlap_by_hand(kind: str, pairs):
    found = loss.OVERLAP[kind](*pairs)
    wanted = [formula(kind, a, b) for a, b in zip(pairs[0].tolist(), pairs[1].tolist())]
    assert found.tolist() == pytest.approx(wanted, abs=2e-6)
    assert found[-1].item() < 1e-6 < found[0].item()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_gradients_of_overlap(kind: str, pairs):
    a, b = pairs[0][:12].clone().requires_grad_(), pairs[1][:12]
    loss.OVERLAP[kind](a, b).sum().backward()
    rows, step = a.detach().tolist(), 1e-6
    for i, row in enumerate(rows):
        for k in range(4):
            up, down = ([*row[:k], row[k] + d, *row[k + 1 :]] for d in (step, -step))
            slope = (formula(kind, up, b[i].tolist()) - formula(kind, down, b[i].tolist())) / (2 * step)
            assert a.grad[i, k].item() == pytest.approx(slope, abs=1e-5)


def test_boxes_apart_have_a_gradient_but_for_iou():
    for kind in KINDS:
        a = torch.tensor([[0.0, 0, 2, 1]], requires_grad=True)
        loss.OVERLAP[kind](a, torch.tensor([[5.0, 7, 9, 8]])).sum().backward()
        assert (a.grad.abs().sum() > 0) == (kind != "iou")


def test_empty_boxes_are_finite():
    for kind in KINDS:
        a = torch.zeros(2, 4, requires_grad=True)
        value = loss.OVERLAP[kind](a, torch.tensor([[0.0, 0, 1, 1], [3, 3, 4, 5]])).sum()
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(a.grad).all()
        assert loss.OVERLAP[kind](torch.zeros(0, 4), torch.zeros(0, 4)).sum().item() == 0


def test_smooth_l1_by_hand():
    a, b = torch.tensor([[0.0, 1, 2, -3]]), torch.tensor([[0.5, 1.02, 0, 0]])
    each = [0.5 - 0.05, 0.02**2 / 0.2, 2 - 0.05, 3 - 0.05]
    assert loss.smooth_l1(a, b, 0.1).tolist() == pytest.approx([sum(each)], rel=1e-5)
    assert loss.smooth_l1(a, b, 0.0).item() == pytest.approx(0.5 + 0.02 + 2 + 3)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (None, 0.0), (0.7, 1.5)])
def test_focal_by_hand(alpha: float | None, gamma: float):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 3, generator=g, dtype=torch.float64) * 3
    targets = (torch.rand(6, 3, generator=g) < 0.3).double()
    total = 0.0
    for x, y in zip(logits.reshape(-1).tolist(), targets.reshape(-1).tolist()):
        p = 1 / (1 + math.exp(-x))
        pt, weight = (p, alpha) if y else (1 - p, None if alpha is None else 1 - alpha)
        total += -(1.0 if weight is None else weight) * (1 - pt) ** gamma * math.log(pt)
    assert loss.sigmoid_focal(logits, targets, alpha, gamma).item() == pytest.approx(total, rel=1e-9)
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    rows = [row.softmax(0)[k].item() for row, k in zip(logits, labels)]
    wanted = sum(-((1 - p) ** gamma) * math.log(p) for p in rows) / 6
    assert loss.softmax_focal(logits, labels, gamma).item() == pytest.approx(wanted, rel=1e-9)
    assert loss.softmax_focal(logits[:0], labels[:0], gamma).item() == 0


def test_varifocal_by_hand():
    logits, quality = torch.tensor([[1.0, -2.0, 0.3]], dtype=torch.float64), torch.tensor([[0.8, 0.0, 0.0]]).double()
    p = [1 / (1 + math.exp(-x)) for x in logits[0].tolist()]
    wanted = -0.8 * (0.8 * math.log(p[0]) + 0.2 * math.log(1 - p[0]))
    wanted += sum(-0.75 * q**2 * math.log(1 - q) for q in p[1:])
    assert loss.varifocal(logits, quality).item() == pytest.approx(wanted, rel=1e-6)


def test_half_precision_is_computed_in_single(pairs):
    a, b = (p.to(torch.bfloat16) for p in pairs)
    for kind in KINDS:
        assert loss.OVERLAP[kind](a, b).dtype == torch.float32
    assert loss.sigmoid_focal(a, torch.zeros_like(a)).dtype == torch.float32
