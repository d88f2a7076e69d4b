"""Predictors: positions against their formula; every block of every image is predicted by itself."""

import math

import pytest
import torch

from selfsup.predictors import Predictor, sincos_positions


def test_positions() -> None:
    dim, (rows, columns) = 8, (2, 3)
    got = sincos_positions(dim, (rows, columns))
    for y in range(rows):
        for x in range(columns):
            expected = [
                function(coordinate / 10000 ** (i / 2))
                for coordinate in (x, y)
                for function in (math.sin, math.cos)
                for i in range(2)
            ]
            assert got[y * columns + x].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(6, (2, 2))


def test_blocks_are_apart() -> None:
    """One pass over all blocks of all images equals a pass for each; the order of what was seen does not matter."""
    torch.manual_seed(0)
    predictor = Predictor(12, (4, 4), dim=16, depth=2, heads=2).double().eval()
    where = torch.stack([torch.randperm(16)[:7] for _ in range(3)])  # [B, C]
    wanted = torch.stack([torch.randperm(16)[:8].unflatten(0, (2, 4)) for _ in range(3)])  # [B, M, T]
    seen = torch.randn(3, 7, 12, dtype=torch.float64)
    out = predictor(seen, where, wanted)
    assert out.shape == (3, 2, 4, 12)
    mixed = torch.randperm(7)
    for b in range(3):
        for m in range(2):
            one = slice(b, b + 1)
            alone = predictor(seen[one][:, mixed], where[one][:, mixed], wanted[one, m : m + 1])
            torch.testing.assert_close(out[b, m], alone[0, 0])
    weights = torch.stack([predictor.blocks[1].mlp.fc2.weight.std(), predictor.blocks[1].mlp.fc1.weight.std()])
    assert weights.tolist() == pytest.approx([0.01, 0.02], rel=0.15)  # the second block's: divided by sqrt(4)
