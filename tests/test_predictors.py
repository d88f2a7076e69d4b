"""Predictors: positions against their formula; every block of every image is predicted by itself."""

import math

import pytest
import torch

from selfsup.predictors import CrossPredictor, Predictor, sincos_positions


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


def test_cross_attention() -> None:
    """Queries are independent of one another; attention is softmax(q k / sqrt d) v, head by head; positions matter."""
    torch.manual_seed(0)
    predictor = CrossPredictor(12, (4, 4), dim=16, depth=2, heads=2).double().eval()
    where, wanted = (torch.stack([torch.randperm(16)[:n] for _ in range(3)]) for n in (7, 4))
    seen = torch.randn(3, 2 + 7, 12, dtype=torch.float64)  # two prefix tokens
    out = predictor(seen, where, wanted)
    assert out.shape == (3, 4, 16)
    torch.testing.assert_close(predictor(seen, where, wanted[:, 2:3])[:, 0], out[:, 2])
    mixed = torch.randperm(7)
    again = predictor(torch.cat([seen[:, :2], seen[:, 2:][:, mixed]], 1), where[:, mixed], wanted)
    torch.testing.assert_close(again, out)
    assert not torch.allclose(predictor(seen, where[:, mixed], wanted), out)

    attention = predictor.blocks[0].attn
    x, context = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        q, k, v = (
            w.weight[head] @ y[0].T for w, y in ((attention.q, x), (attention.k, context), (attention.v, context))
        )
        heads.append((v * ((q * k).sum(0) / 8**0.5).softmax(0)).sum(1))
    torch.testing.assert_close(attention(x, context)[0, 0], attention.proj(torch.cat(heads)))
