"""CAPI's losses against the paper in loops; balance at each position."""

import math

import pytest
import torch

from selfsup.losses.capi import assignments, cluster_cross_entropy
from tests.losses.checks import check_large, draw, value_and_gradients

B, P, K = 6, 3, 4
TEMPERATURE = 0.3


def loops(scores: torch.Tensor, iterations: int) -> torch.Tensor:
    """[rows, K]: exponentials, then columns and rows to sum 1 by turns, entry by entry."""
    q = [[math.exp(x / TEMPERATURE) for x in row] for row in scores.tolist()]
    for _ in range(iterations):
        sums = [sum(column) for column in zip(*q, strict=True)]
        q = [[x / s for x, s in zip(row, sums, strict=True)] for row in q]
        q = [[x / sum(row) for x in row] for row in q]
    return torch.tensor(q, dtype=torch.float64)


@pytest.mark.parametrize("iterations", [1, 3])
def test_assignments(iterations: int) -> None:
    (scores,) = draw((B, P, K))
    found = assignments(scores, TEMPERATURE, iterations)
    for p in range(P):
        torch.testing.assert_close(found[:, p], loops(scores[:, p], iterations), rtol=1e-11, atol=0)
    found = assignments(scores, TEMPERATURE, iterations, positionwise=False)
    torch.testing.assert_close(found.flatten(0, 1), loops(scores.flatten(0, 1), iterations), rtol=1e-11, atol=0)


def test_positions_get_no_clusters_of_their_own() -> None:
    """Scores that tell nothing but the position: one cluster a position without the correction, all alike with it."""
    scores = torch.eye(4)[None].repeat(8, 1, 1)
    torch.testing.assert_close(assignments(scores, 0.06, 3), torch.full((8, 4, 4), 0.25))
    assert (assignments(scores, 0.06, 3, positionwise=False).diagonal(dim1=1, dim2=2) > 0.99).all()


def test_cross_entropy() -> None:
    scores, other = draw((B, P, K), (B, P, K))
    targets = torch.softmax(other, -1)

    def ours(z: torch.Tensor) -> torch.Tensor:
        return cluster_cross_entropy(z, targets.to(z.dtype), TEMPERATURE)

    def oracle(z: torch.Tensor) -> torch.Tensor:
        total = 0
        for row, q in zip(z.flatten(0, 1), targets.flatten(0, 1), strict=True):
            partition = sum((x / TEMPERATURE).exp() for x in row)
            total = total - sum(t * ((x / TEMPERATURE).exp() / partition).log() for t, x in zip(q, row, strict=True))
        return total / (B * P)

    value, gradients = value_and_gradients(ours, (scores,))
    expected, references = value_and_gradients(oracle, (scores,))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients[0], references[0], rtol=1e-10, atol=1e-12)
    check_large(ours, scores)
    half = scores.bfloat16()
    assert ours(half).dtype == torch.float32
