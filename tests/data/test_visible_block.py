"""Blocks that stay visible: their counts, their shapes, and how often each patch is in one."""

import numpy as np
import pytest

from selfsup.data.visible_block import indices, visible_block

PLACES = np.arange(400)


@pytest.mark.parametrize("roll", [False, True])
@pytest.mark.parametrize("grid", [(14, 14), (6, 9), (2, 2)])
def test_counts_and_shapes(grid: tuple[int, int], roll: bool) -> None:
    total = grid[0] * grid[1]
    for count in {1, total // 3, total // 2, total - 1, total}:
        seen = visible_block(3, 7, PLACES, 0, grid=grid, count=count, roll=roll)
        assert seen.shape == (400, total) and (seen.sum(1) == count).all()
        assert indices(seen).shape == (400, count)
        if not roll:
            for image in seen[:50].reshape(-1, *grid):
                rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
                height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
                assert height * width - count < width or height * width - count < height  # all but part of one line
                assert count < 8 or grid != (14, 14) or 1 / 3 < height / width < 3 or count > 98


def test_every_patch_alike_if_rolled() -> None:
    """68 of 196 visible: 0.35 each, within four standard errors; without rolling the middle more often than the corners."""
    places = np.arange(4000)
    rolled, fixed = (
        visible_block(0, 0, places, 0, grid=(14, 14), count=68, roll=roll).mean(0).reshape(14, 14)
        for roll in (True, False)
    )
    assert abs(rolled - 68 / 196).max() < 4 * (0.35 * 0.65 / 4000) ** 0.5
    assert fixed[7, 7] > 3 * fixed[0, 0]


def test_is_a_pure_function() -> None:
    """Of seed, step, place and view: a part of the batch gets its rows of the whole."""
    options = {"grid": (7, 7), "count": 17, "roll": True}
    whole = visible_block(1, 2, PLACES, 0, **options)
    assert np.array_equal(visible_block(1, 2, PLACES[37:90], 0, **options), whole[37:90])
    for other in ((2, 2, PLACES, 0), (1, 3, PLACES, 0), (1, 2, PLACES, 1)):
        assert not np.array_equal(visible_block(*other, **options), whole)
    with pytest.raises(ValueError, match="0 visible"):
        visible_block(1, 2, PLACES, 0, grid=(7, 7), count=0, roll=True)
