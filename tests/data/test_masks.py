"""Masks: exact counts, pure functions of their key, and shaped as they should be."""

import numpy as np
import pytest
import torch

from selfsup.data.masks import Masks, block_masks, magnified, random_masks, ratios

PLACES = np.arange(64)


def test_random_masks_are_uniform_and_exact() -> None:
    masked = np.concatenate([random_masks(0, step, PLACES, 0, tokens=16, count=12) for step in range(50)])
    assert (masked.sum(1) == 12).all()
    np.testing.assert_allclose(masked.mean(0), 0.75, atol=0.04)  # 3200 draws: 5 standard errors
    assert len(np.unique(masked, axis=0)) > 1000


@pytest.mark.parametrize("grid", [(14, 14), (4, 6), (2, 2)])
def test_block_masks_are_exact(grid: tuple[int, int]) -> None:
    tokens = grid[0] * grid[1]
    counts = np.arange(64) * tokens // 63
    masked = block_masks(0, 3, PLACES, 1, grid=grid, counts=counts)
    assert masked.shape == (64, tokens) and (masked.sum(1) == counts).all()


def test_block_masks_come_in_blocks() -> None:
    """A masked token's right neighbour is masked far more often than by chance, and few tokens are single draws."""
    counts = np.full(64, 60)
    masked = block_masks(0, 0, PLACES, 0, grid=(14, 14), counts=counts).reshape(64, 14, 14)
    pairs = masked[:, :, :-1] & masked[:, :, 1:]
    assert pairs.sum() / masked[:, :, :-1].sum() > 0.65  # 0.31 by chance
    lonely = masked.copy()
    lonely[:, :, 1:] &= ~masked[:, :, :-1]
    lonely[:, :, :-1] &= ~masked[:, :, 1:]
    lonely[:, 1:] &= ~masked[:, :-1]
    lonely[:, :-1] &= ~masked[:, 1:]
    assert lonely.sum() / masked.sum() < 0.03


def test_keys() -> None:
    """Seed, step, place and view each change the draw; the company of other images does not."""

    def drawn(seed: int = 0, step: int = 2, places: np.ndarray = PLACES, view: int = 0) -> list[np.ndarray]:
        n = ratios(seed, step, places, view, tokens=196, probability=0.5, low=0.1, high=0.5)
        return [
            n,
            block_masks(seed, step, places, view, grid=(14, 14), counts=np.full(len(places), 50)),
            random_masks(seed, step, places, view, tokens=196, count=50),
        ]

    base = drawn()
    for other in (drawn(seed=1), drawn(step=3), drawn(view=1), drawn(places=PLACES + 64)):
        assert all((a != b).any() for a, b in zip(base, other))
    for whole, part in zip(base, drawn(places=PLACES[10:20])):
        assert (whole[10:20] == part).all()


def test_ratios() -> None:
    n = np.concatenate([ratios(0, s, PLACES, 0, tokens=1000, probability=0.25, low=0.1, high=0.5) for s in range(100)])
    assert (n > 0).mean() == pytest.approx(0.25, abs=0.03)
    assert n[n > 0].min() >= 100 and n.max() <= 500 and n[n > 0].mean() == pytest.approx(300, abs=20)


def test_stratified_ratios() -> None:
    """Over all views of a step: exactly half the images, their ratios evenly spread; another half in another step."""
    tokens, options = 1000, {"probability": 0.5, "low": 0.1, "high": 0.5}
    step = [
        np.concatenate([ratios(0, s, PLACES, v, tokens=tokens, slots=128, first=64 * v, **options) for v in range(2)])
        for s in range(2)
    ]
    for n in step:
        assert (n > 0).sum() == 64
        assert np.diff(np.sort(n[n > 0])).max() <= 2 * 400 / 64 + 1  # one in each of 64 parts of [100, 500]
    assert ((step[0] > 0) != (step[1] > 0)).any()


def test_masks_of() -> None:
    masked = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=bool)
    masks = Masks.of(masked, torch.device("cpu"))
    assert masks.total == 6 and masks.counts.tolist() == [2, 0, 4]
    assert masks.index.tolist() == [1, 2, 8, 9, 10, 11]
    assert masks.weights.tolist() == [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert torch.equal(masks.masked.flatten().nonzero()[:, 0], masks.index)
    assert Masks.of(np.zeros((2, 3), dtype=bool), torch.device("cpu")).total == 0


def test_magnified() -> None:
    out = magnified(np.array([[True, False, False, True]]), (2, 2), 2).reshape(4, 4)
    assert out.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
