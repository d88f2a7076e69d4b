"""Figures of a segmentation against torchmetrics, and the boundary IoU against masks that are eroded one by one."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchmetrics.functional.classification import multiclass_jaccard_index
from torchmetrics.functional.segmentation import dice_score

from selfsup.eval.segment_data import IGNORE
from selfsup.eval.segment_figures import Counts, boundary_pixels, count, figures, inner_boundary, interval, per_class

K = 4


def blobs(seed: int, size: tuple[int, int] = (40, 50), ignored: bool = True) -> torch.Tensor:
    """Ids 0 to 3 in smooth regions; some pixels ignored."""
    rng = np.random.default_rng(seed)
    fields = np.stack([ndimage.gaussian_filter(rng.normal(size=size), 4) for _ in range(K)])
    ids = fields.argmax(0)
    if ignored:
        ids[ndimage.gaussian_filter(rng.normal(size=size), 3) > 0.12] = IGNORE
    return torch.from_numpy(ids)


@pytest.fixture(scope="module")
def images():
    return [(blobs(i + 100, ignored=False), blobs(i)) for i in range(6)]


def test_miou_and_dice_equal_torchmetrics(images):
    counts = Counts.stacked([count(p, t, K, 0.02) for p, t in images])
    predicted, truth = (torch.stack(x) for x in zip(*images))
    expected = multiclass_jaccard_index(predicted, truth, K, average="macro", ignore_index=IGNORE)
    found = figures(counts)
    assert found["miou"] == pytest.approx(expected.item(), abs=1e-6)
    each = multiclass_jaccard_index(predicted, truth, K, average="none", ignore_index=IGNORE)
    rows = per_class(counts, list("abcd"))
    assert [r["iou"] for r in rows] == pytest.approx(each.tolist(), abs=1e-6)
    known = truth != IGNORE
    p, t = predicted[known][None], truth[known][None]
    dice = dice_score(p, t, num_classes=K, average="macro", input_format="index")
    assert found["mdice"] == pytest.approx(dice.mean().item(), abs=1e-5)
    assert found["pixel_accuracy"] == pytest.approx((p == t).double().mean().item())


def test_boundary_iou_by_hand(images):
    """Cheng et al., 2021: for each class, erode truth and prediction, compare what was taken away."""
    distance = boundary_pixels(40, 50, 0.04)
    assert distance == 3 and boundary_pixels(10, 10, 0.001) == 1
    both, union = np.zeros(K), np.zeros(K)
    for predicted, truth in images:
        known = (truth != IGNORE).numpy()
        for k in range(K):
            edges = []
            for ids in (truth.numpy(), np.where(known, predicted.numpy(), IGNORE)):
                mask = np.pad(ids == k, 1)
                inside = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=distance)[1:-1, 1:-1]
                edges.append((ids == k) & ~inside)
            both[k] += (edges[0] & edges[1]).sum()
            union[k] += (edges[0] | edges[1]).sum()
    counts = Counts.stacked([count(p, t, K, 0.04) for p, t in images])
    assert [r["boundary_iou"] for r in per_class(counts, list("abcd"))] == pytest.approx((both / union).tolist())
    assert figures(counts)["boundary_miou"] == pytest.approx((both / union).mean())


def test_a_square_and_its_boundary():
    ids = torch.zeros(9, 9, dtype=torch.long)
    ids[2:7, 2:7] = 1
    edge = inner_boundary(ids, 1)
    assert edge[2:7, 2:7].sum() == 16 and not edge[3:6, 3:6].any() and edge[0].all() and edge[1, 1:8].all()


def test_absent_classes_count_nowhere():
    truth = torch.zeros(8, 8, dtype=torch.long)
    truth[:, 4:] = 2
    counts = Counts.stacked([count(truth, truth, 5, 0.02)])
    rows = per_class(counts, list("abcde"))
    assert [r["iou"] for r in rows] == [1.0, None, 1.0, None, None] and figures(counts)["miou"] == 1.0
    wrong = truth.clone()
    wrong[0, 0] = 4  # predicted where it is not: IoU 0
    assert per_class(Counts.stacked([count(wrong, truth, 5, 0.02)]), list("abcde"))[4]["iou"] == 0.0


def test_bootstrap_interval(images):
    counts = Counts.stacked([count(p, t, K, 0.02) for p, t in images])
    better = Counts.stacked(
        [count(torch.where(blobs(i + 7) > 1, t.clamp_min(0), p), t, K, 0.02) for i, (p, t) in enumerate(images)]
    )
    low, high = interval(counts)
    assert low < figures(counts)["miou"] < high and interval(counts) == [low, high] and high - low < 0.3
    gain = figures(better)["miou"] - figures(counts)["miou"]
    low, high = interval(better, 0, counts)
    assert 0 < low < gain < high
    assert interval(counts, 0, counts) == [0.0, 0.0]
