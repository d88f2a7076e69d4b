"""The batched probes against torch.optim.SGD, one head at a time; statistics; ranks; divergence."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from selfsup.eval import probe
from selfsup.eval.probe import Cached, Probe, Recipe, statistics, steps_of, train_cached


def blobs(n: int, width: int, classes: int, seed: int, noise: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return (centres[labels] + noise * rng.normal(size=(n, width))).astype("f"), labels


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_each_head_is_what_sgd_makes_of_it_alone(weight_decay: float):
    recipe = Recipe((0.05, 0.5, 3.0), 3, 32, 4, momentum=0.9, weight_decay=weight_decay, seed=5)
    features = [blobs(100, 6, 4, 0)[0], blobs(100, 10, 4, 1)[0], blobs(100, 6, 4, 2)[0]]
    labels = blobs(100, 6, 4, 0)[1]
    data = Cached(features, labels, None, torch.device("cpu"))
    many = Probe([6, 10, 6], recipe)
    starts = {w: (h.weight.clone(), h.bias.clone()) for w, h in many.heads.items()}
    rows = np.arange(100)
    train_cached(many, data, rows)
    total = steps_of(recipe, 100)
    assert total == 12
    for f, (width, place) in enumerate(((6, 0), (10, 0), (6, 1))):
        for r, lr in enumerate(recipe.scaled()):
            columns = slice(4 * r, 4 * r + 4)
            layer = torch.nn.Linear(width, 4)
            with torch.no_grad():
                layer.weight.copy_(starts[width][0][place][:, columns].T)
                layer.bias.copy_(starts[width][1][place][0, columns])
            sgd = torch.optim.SGD(layer.parameters(), lr, momentum=0.9, weight_decay=weight_decay)
            step = 0
            for epoch in range(3):
                shuffled = rows[probe.order(100, epoch, 5)]
                for i in range(0, 100, 32):
                    batch = shuffled[i : i + 32]
                    sgd.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / total))
                    loss = torch.nn.functional.cross_entropy(
                        layer(torch.from_numpy(features[f][batch])), torch.from_numpy(labels[batch])
                    )
                    sgd.zero_grad()
                    loss.backward()
                    sgd.step()
                    step += 1
            heads = many.heads[width]
            torch.testing.assert_close(heads.weight[place][:, columns], layer.weight.detach().T, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(heads.bias[place][0, columns], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_start_is_dino_s_and_shared_by_all_rates():
    many = Probe([64], Recipe((0.1, 0.2), 1, 8, 50))
    weight = many.heads[64].weight
    assert torch.equal(weight[..., :50], weight[..., 50:]) and not many.heads[64].bias.any()
    assert weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_evaluate_counts_as_by_hand():
    many = Probe([5], Recipe((0.1, 0.2), 1, 8, 7))
    x, y = blobs(300, 5, 7, 3)
    with torch.no_grad():
        many.heads[5].weight.normal_(generator=torch.Generator().manual_seed(0))
    scores = many.evaluate(Cached([x], y, None, torch.device("cpu")).batches(np.arange(300), batch=64))
    logits = many.heads[5].logits(torch.from_numpy(x)[None])[0]  # [300, 2, 7]
    for r in range(2):
        order = logits[:, r].sort(dim=1, descending=True, stable=True).indices
        hit = order == torch.from_numpy(y)[:, None]
        assert scores["top1"][0, r].item() == pytest.approx(hit[:, 0].float().mean().item())
        assert scores["top5"][0, r].item() == pytest.approx(hit[:, :5].any(1).float().mean().item())
        assert scores["loss"][0, r].item() == pytest.approx(
            torch.nn.functional.cross_entropy(logits[:, r], torch.from_numpy(y)).item(), rel=1e-5
        )


def test_a_head_that_diverges_leaves_the_others_alone():
    x, y = blobs(200, 8, 3, 0)
    x = x * 1e4
    data = Cached([x], y, None, torch.device("cpu"))
    mixed, alone = Probe([8], Recipe((1e-9, 1e35), 4, 50, 3)), Probe([8], Recipe((1e-9,), 4, 50, 3))
    for p in (mixed, alone):
        train_cached(p, data, np.arange(200))
    scores = mixed.evaluate(data.batches(np.arange(200)))
    assert scores["top1"][0, 1] == 0 and scores["loss"][0, 1] == math.inf
    torch.testing.assert_close(mixed.heads[8].weight[..., :3], alone.heads[8].weight)


def test_learns_what_is_there():
    x, y = blobs(600, 12, 5, 0, noise=0.5)
    data = Cached([x], y, [statistics(x, np.arange(500))], torch.device("cpu"))
    p = Probe([12], Recipe((0.001, 0.1), 10, 64, 5))
    train_cached(p, data, np.arange(500))
    assert p.evaluate(data.batches(np.arange(500, 600)))["top1"][0, 1] > 0.95


def test_reading_from_a_file_equals_holding_it(tmp_path: Path):
    x, y = blobs(150, 6, 3, 0)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    stats = [statistics(mapped, np.arange(0, 150, 2))]
    held = Cached([mapped], y, stats, torch.device("cpu"))
    read = Cached([mapped], y, stats, torch.device("cpu"), budget=0)
    assert held.held is not None and read.held is None
    rows = np.random.default_rng(0).permutation(150)[:70]
    (a,), la = held.take(rows)
    (b,), lb = read.take(rows)
    assert torch.equal(a, b) and torch.equal(la, lb) and torch.equal(la, torch.from_numpy(y[rows]))


def test_statistics_over_chunks_and_constant_columns():
    x = np.random.default_rng(0).normal(3, 2, size=(101, 4)).astype("f")
    x[:, 2] = 0.7
    mean, scale = statistics(x, np.arange(100), chunk=7)
    assert np.allclose(mean, x[:100].mean(0), atol=1e-5)
    assert scale[2] == 0 and np.allclose(1 / scale[[0, 1, 3]], x[:100, [0, 1, 3]].std(0), rtol=1e-4)


def test_order_is_a_pure_function():
    assert np.array_equal(probe.order(50, 3, 1), probe.order(50, 3, 1))
    assert not np.array_equal(probe.order(50, 3, 1), probe.order(50, 4, 1))
    assert sorted(probe.order(50, 3, 1)) == list(range(50))
