"""Sinkhorn-Knopp against the paper's loops; over two ranks; with scores that would overflow."""

import math
from pathlib import Path

import pytest
import torch

from selfsup.losses.sinkhorn import sinkhorn_knopp
from tests.losses.checks import draw
from tests.test_dist import start

B, K = 12, 5


def loops(scores: torch.Tensor, temperature: float, iterations: int) -> torch.Tensor:
    """Entry by entry, as the paper's polytope has it: columns of Q sum to 1 / K, rows to 1 / B; times B at the end."""
    size, prototypes = scores.shape
    q = [[math.exp(scores[b, k].item() / temperature) for k in range(prototypes)] for b in range(size)]
    total = sum(sum(row) for row in q)
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        for k in range(prototypes):
            column = sum(q[b][k] for b in range(size))
            for b in range(size):
                q[b][k] /= column * prototypes
        for b in range(size):
            row = sum(q[b])
            q[b] = [x / (row * size) for x in q[b]]
    return torch.tensor(q, dtype=torch.float64) * size


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_equals_the_loops(iterations: int) -> None:
    (scores,) = draw((B, K))
    found = sinkhorn_knopp(scores, 0.3, iterations)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, loops(scores, 0.3, iterations), rtol=1e-11, atol=0)
    torch.testing.assert_close(found.sum(1), torch.ones(B, dtype=torch.float64))
    single = sinkhorn_knopp(scores.float(), 0.3, iterations)
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=1e-7)
    assert sinkhorn_knopp(scores.bfloat16(), 0.3, iterations).dtype == torch.float32


def test_equals_lightly() -> None:
    from lightly.loss.swav_loss import sinkhorn

    scores = draw((B, K))[0].float()
    expected = sinkhorn(scores, iterations=3, epsilon=0.3)
    torch.testing.assert_close(sinkhorn_knopp(scores, 0.3, 3), expected, rtol=1e-5, atol=1e-7)


def test_prototypes_are_used_alike_in_the_limit() -> None:
    (scores,) = draw((B, K))
    q = sinkhorn_knopp(scores, 0.3, 500)
    torch.testing.assert_close(q.sum(0), torch.full((K,), B / K, dtype=torch.float64))
    uneven = scores + torch.tensor([9.0, 0, 0, 0, -9.0], dtype=torch.float64)  # one prototype would get every image
    torch.testing.assert_close(sinkhorn_knopp(uneven, 0.3, 500), q)


def test_no_iteration_is_the_softmax_and_scores_are_left_alone() -> None:
    (scores,) = draw((B, K))
    before = scores.clone()
    assert torch.equal(sinkhorn_knopp(scores.requires_grad_(), 0.3, 0), torch.softmax(before / 0.3, -1))
    assert not sinkhorn_knopp(scores, 0.3, 2).requires_grad
    assert torch.equal(scores, before)


@pytest.mark.parametrize("size", [1e3, 1e6])
def test_large_scores(size: float) -> None:
    """exp(1e6 / 0.05) is not a float; images and prototypes that are far from all others get their share too."""
    scores = (draw((B, K))[0] * size).float()
    scores[3] -= 100 * size
    scores[:, 2] += 100 * size
    for iterations in (1, 3, 50):
        q = sinkhorn_knopp(scores, 0.05, iterations)
        assert q.isfinite().all()
        torch.testing.assert_close(q.sum(1), torch.ones(B))


RANKS = """
from selfsup.losses.sinkhorn import sinkhorn_knopp
g = torch.Generator().manual_seed(0)
scores = torch.randn(12, 5, generator=g, dtype=torch.float64) * 20
mine = [scores[:5], scores[5:]][rank]  # not the same number on each
short, long = (sinkhorn_knopp(mine, 0.3, n, dist.all_reduce_) for n in (3, 4000))
empty = sinkhorn_knopp(scores[:rank * 12], 0.3, 3, dist.all_reduce_)  # all of them on rank 1
report(short=short.tolist(), long=long.tolist(), empty=empty.tolist())
"""


def test_two_ranks(tmp_path: Path) -> None:
    """What one process computes of the whole batch; rows and, over both ranks, columns sum right."""
    found = start(RANKS, tmp_path, 2)
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(12, 5, generator=g, dtype=torch.float64) * 20
    short, long = (torch.tensor(found[0][key] + found[1][key], dtype=torch.float64) for key in ("short", "long"))
    expected = sinkhorn_knopp(scores, 0.3, 3)
    torch.testing.assert_close(short, expected, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(torch.tensor(found[1]["empty"], dtype=torch.float64), expected, rtol=1e-12, atol=1e-300)
    assert found[0]["empty"] == []
    for q in (short, long):
        torch.testing.assert_close(q.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(long.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64), rtol=1e-6, atol=0)
