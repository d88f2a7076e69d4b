"""Losses on masks against loops over pixels, and against torch's."""

import pytest
import torch
import torch.nn.functional as F

from selfsup.losses.segmentation import IGNORE, focal, pixel_cross_entropy, soft_dice


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, generator=g, dtype=torch.float64)
    masks = torch.randint(-1, 3, (2, 5, 6), generator=g)  # class 3 is not there
    return logits, masks, torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)


def pixels(logits, masks):
    for b in range(2):
        for y in range(5):
            for x in range(6):
                if masks[b, y, x] != IGNORE:
                    yield logits[b, :, y, x].softmax(0), int(masks[b, y, x])


@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_and_focal_by_hand(case, weighted: bool):
    logits, masks, w = case
    w = w if weighted else None
    scale = [1.0 if w is None else w[t].item() for _, t in pixels(logits, masks)]
    ce = sum(-s * p[t].log() for s, (p, t) in zip(scale, pixels(logits, masks))) / sum(scale)
    fl = sum(-s * (1 - p[t]) ** 1.5 * p[t].log() for s, (p, t) in zip(scale, pixels(logits, masks))) / sum(scale)
    assert pixel_cross_entropy(logits, masks, w).item() == pytest.approx(ce.item(), rel=1e-9)
    assert pixel_cross_entropy(logits, masks, w).item() == pytest.approx(
        F.cross_entropy(logits, masks, w, ignore_index=IGNORE).item(), rel=1e-9
    )
    assert focal(logits, masks, 1.5, w).item() == pytest.approx(fl.item(), rel=1e-9)
    assert focal(logits, masks, 0.0, w).item() == pytest.approx(ce.item(), rel=1e-9)


def test_dice_by_hand(case):
    logits, masks, w = case
    rows = list(pixels(logits, masks))
    each = []
    for k in range(3):
        overlap = sum(p[k].item() for p, t in rows if t == k)
        each.append(1 - 2 * overlap / (sum(p[k].item() ** 2 for p, _ in rows) + sum(t == k for _, t in rows)))
    assert soft_dice(logits, masks).item() == pytest.approx(sum(each) / 3, rel=1e-9)
    weighted = sum(a * b for a, b in zip(each, w.tolist())) / w[:3].sum().item()
    assert soft_dice(logits, masks, w).item() == pytest.approx(weighted, rel=1e-9)


def test_perfect_and_unlabelled(case):
    logits, masks, _ = case
    sure = 50.0 * F.one_hot(masks.clamp_min(0), 4).permute(0, 3, 1, 2).double()
    for loss in (pixel_cross_entropy, focal, soft_dice):
        assert loss(sure, masks).item() < 1e-9 < loss(logits, masks).item()
        x = logits.clone().requires_grad_()
        nothing = loss(x, torch.full_like(masks, IGNORE))
        nothing.backward()
        assert nothing.item() == 0 and x.grad.abs().max() == 0
        assert loss(logits.to(torch.bfloat16), masks).dtype == torch.float32
