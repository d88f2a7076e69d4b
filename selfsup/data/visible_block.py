"""One block of patches that stays visible: inverse block masking (Darcet et al., 2025, CAPI, section 3.3) and the focal
masks of MSN (Assran et al., 2022, section 3)."""

import numpy as np

from selfsup.data.masks import draws

_VISIBLE = 5
_ASPECT = 2.0


def visible_block(
    seed: int, step: int, places: np.ndarray, view: int, *, grid: tuple[int, int], count: int, roll: bool
) -> np.ndarray:
    """bool [B, rows * columns] with exactly `count` patches visible, in a rectangle of a random place and shape.

    Height / width is log-uniform in [1/2, 2], as far as such a rectangle fits; what it has too many is cut off its last
    row. roll: then shifted around the edges by any number of rows and columns, so that every patch is as likely to be
    visible as any other; without, those in the middle are more likely. Row b is a pure function of (seed, step, places[b],
    view), as all of `masks`.
    """
    rows, columns = grid
    if not 0 < count <= rows * columns:
        raise ValueError(f"{count} visible patches of {rows} x {columns}")
    u = draws(seed, step, places, view, 5, _VISIBLE)  # [B, 5]
    low = np.log(max(1 / _ASPECT, count / columns**2))
    high = np.log(min(_ASPECT, rows**2 / count))
    aspect = np.exp(low + u[:, 0] * (high - low))
    height = np.clip(np.ceil(np.sqrt(count * aspect) - 1e-9), -(-count // columns), rows)
    width = np.clip(np.ceil(count / height), 1, columns)
    top, left = np.floor(u[:, 1] * (rows - height + 1)), np.floor(u[:, 2] * (columns - width + 1))
    if roll:
        top, left = top + np.floor(u[:, 3] * rows), left + np.floor(u[:, 4] * columns)
    y = (np.arange(rows) - top[:, None]) % rows  # [B, rows], from the top of the block
    x = (np.arange(columns) - left[:, None]) % columns  # [B, columns]
    order = y[:, :, None] * width[:, None, None] + x[:, None, :]  # [B, rows, columns]
    inside = (x < width[:, None])[:, None, :] & (order < count)
    return inside.reshape(len(u), -1)


def indices(chosen: np.ndarray) -> np.ndarray:
    """Which are true: bool [B, T] with the same count in every row -> int64 [B, count], ascending."""
    return np.nonzero(chosen)[1].reshape(len(chosen), -1)
