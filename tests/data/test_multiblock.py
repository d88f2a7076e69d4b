"""Multi-block masks: what is drawn, from what it depends, and how large it is."""

import numpy as np
import pytest

from selfsup.data.multiblock import Blocks, MultiBlock, block_size, draw

GRID = (14, 14)


def as_sets(blocks: Blocks, i: int) -> tuple[set[int], list[set[int]]]:
    return set(blocks.context[i].tolist()), [set(t.tolist()) for t in blocks.targets[i]]


def test_context_and_targets() -> None:
    """Targets are rectangles of one size a step; the context meets none of them, and has the same count in every image."""
    for step in range(20):
        blocks = draw(MultiBlock(), GRID, 16, seed=1, step=step)
        assert blocks.context.dtype == blocks.targets.dtype == np.int64 and blocks.targets.shape[:2] == (16, 4)
        shapes = set()
        for i in range(16):
            context, targets = as_sets(blocks, i)
            assert len(context) == blocks.context.shape[1] >= 10
            assert not context & set.union(*targets) and max(context) < 196
            assert (np.diff(blocks.context[i]) > 0).all() and (np.diff(blocks.targets[i], axis=-1) > 0).all()
            for target in targets:
                rows, columns = {p // 14 for p in target}, {p % 14 for p in target}
                assert len(target) == len(rows) * len(columns)
                assert len(rows) == max(rows) - min(rows) + 1 and len(columns) == max(columns) - min(columns) + 1
                shapes.add((len(rows), len(columns)))
        assert len(shapes) == 1


def test_depends_on_seed_and_step() -> None:
    one, again = draw(MultiBlock(), GRID, 8, 1, 5), draw(MultiBlock(), GRID, 8, 1, 5)
    assert np.array_equal(one.context, again.context) and np.array_equal(one.targets, again.targets)
    for seed, step in ((2, 5), (1, 6)):
        other = draw(MultiBlock(), GRID, 8, seed, step)
        assert other.targets.shape != one.targets.shape or not np.array_equal(other.targets, one.targets)
    assert not np.array_equal(one.targets[0], one.targets[1])


def test_sizes_and_places_are_spread_evenly() -> None:
    """Areas as drawn, both edges of the grid reached, and about the mean context that 0.925 - 4 overlapping targets leave."""
    areas, tops, lefts = [], [], []
    for step in range(300):
        targets = draw(MultiBlock(), GRID, 4, 0, step).targets
        areas.append(targets.shape[-1] / 196)
        tops += (targets[..., 0] // 14).reshape(-1).tolist()
        lefts += (targets[..., -1] % 14).reshape(-1).tolist()
    assert 0.16 < np.mean(areas) < 0.19 and min(areas) >= 0.12 and max(areas) <= 0.22
    assert min(tops) == 0 and max(lefts) == 13
    assert block_size(np.array([0.999, 0.5]), (0.85, 1.0), (1.0, 1.0), GRID) == (14, 14)
    assert block_size(np.array([0.0, 0.0]), (0.001, 0.001), (1.0, 1.0), GRID) == (1, 1)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (3, 7)])
def test_small_grids(grid: tuple[int, int]) -> None:
    """A context is never empty, even where the targets cover everything."""
    for step in range(30):
        blocks = draw(MultiBlock(target_scale=(0.15, 1.0)), grid, 8, 0, step)
        assert blocks.context.shape[1] >= 1
        assert blocks.context.max() < grid[0] * grid[1] > blocks.targets.max()


def test_larger_contexts_can_be_asked_for() -> None:
    few, many = (draw(MultiBlock(min_context=n), GRID, 64, 0, 3) for n in (10, 60))
    assert np.array_equal(few.targets.shape, many.targets.shape) and many.context.shape[1] > few.context.shape[1]
