"""Relations between images: loops over pairs and triplets, as the papers write them."""

import itertools

import pytest
import torch

from selfsup.losses.relations import rkd_angle, rkd_distance, similarity_preserving
from tests.losses.checks import check, check_large, draw, value_and_gradients

LOSSES = (rkd_distance, rkd_angle, similarity_preserving)
SHAPES = ((5, 2, 3), (5, 4))  # of student and teacher


def huber(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    d = (a - b).abs()
    return d * d / 2 if d <= 1 else d - 0.5


def distances(x: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
    found = {(i, j): sum((x[i] - x[j]).flatten() ** 2).sqrt() for i, j in itertools.permutations(range(len(x)), 2)}
    mu = sum(found.values()) / len(found)
    return {pair: d / mu for pair, d in found.items()}


def distance_in_loops(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    ours, theirs = distances(z), distances(r)
    return sum(huber(theirs[pair], ours[pair]) for pair in ours) / len(ours)


def angle(x: torch.Tensor, i: int, j: int, k: int) -> torch.Tensor:
    a, b = (x[i] - x[j]).flatten(), (x[k] - x[j]).flatten()
    return sum(a / sum(a * a).sqrt() * (b / sum(b * b).sqrt()))


def angle_in_loops(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    triplets = list(itertools.permutations(range(len(z)), 3))
    return sum(huber(angle(r, *t), angle(z, *t)) for t in triplets) / len(triplets)


def similarity_in_loops(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    b, total = len(z), z.new_zeros(())
    for i in range(b):
        rows = []
        for x in (z, r):
            products = [sum(x[i].flatten() * x[j].flatten()) for j in range(b)]
            norm = sum(p * p for p in products).sqrt()
            rows.append([p / norm for p in products])
        total = total + sum((s - t) ** 2 for s, t in zip(*rows, strict=True))
    return total / b**2


@pytest.mark.parametrize(
    ("loss", "oracle"), list(zip(LOSSES, (distance_in_loops, angle_in_loops, similarity_in_loops), strict=True))
)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equals_loops(loss, oracle, scale: float) -> None:
    z, r = draw(*SHAPES)
    check(loss, oracle, scale * z, r)
    check_large(loss, z, r)


def test_both_branches_of_huber() -> None:
    """A distance that is off by more than 1 of the mean."""
    z, r = draw((4, 3), (4, 3))
    z[0] += 30
    assert any((distances(z)[p] - distances(r)[p]).abs() > 1 for p in distances(z))
    check(rkd_distance, distance_in_loops, z, r)


@pytest.mark.parametrize("loss", LOSSES)
def test_invariances(loss) -> None:
    """All ignore the scale and rotations; distances and angles also a shift."""
    z, r = draw((6, 5), (6, 5))
    (m,) = draw((5, 5), seed=1)
    turned = 3 * z @ torch.linalg.qr(m).Q
    torch.testing.assert_close(loss(turned, r), loss(z, r), rtol=1e-10, atol=0)
    torch.testing.assert_close(loss(turned, z), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-20)
    if loss is not similarity_preserving:
        torch.testing.assert_close(loss(z + 7, r), loss(z, r), rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["zeros", "one image twice", "alike"])
def test_degenerate_students(loss, kind: str) -> None:
    z, r = (x.float() for x in draw((5, 4), (5, 4)))
    if kind == "zeros":
        z = torch.zeros_like(z)
    elif kind == "alike":
        z = z[:1].expand_as(z)
    else:
        z[1] = z[0]
    value, (gradient, _) = value_and_gradients(loss, (z, r))
    assert value.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 100


def test_small_batches() -> None:
    z, r = draw((3, 4), (3, 4))
    assert rkd_distance(z[:2], r[:2]) == 0  # one distance is its own mean
    with pytest.raises(ValueError, match="RKD's distance needs at least 2 images in a batch, not 1"):
        rkd_distance(z[:1], r[:1])
    with pytest.raises(ValueError, match="RKD's angle needs at least 3 images"):
        rkd_angle(z[:2], r[:2])
    check(rkd_angle, angle_in_loops, z, r)
    assert similarity_preserving(z[:1], r[:1]) == 0
    for loss in LOSSES:
        with pytest.raises(ValueError, match="3 images of the student, 2 of the teacher"):
            loss(z, r[:2])
