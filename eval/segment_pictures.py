"""The sheet image | truth | prediction of a segmentation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.patches import Patch

from .canvas import INK, bare, new_figure, save
from .dense import palette
from .segment_data import IGNORE
from .shown import rgb

_GREY = (0.5, 0.5, 0.5)


def colours(classes: int) -> np.ndarray:
    """float [K, 3] in [0, 1]: PASCAL VOC's palette without its black, which would hide the image; K may be anything."""
    return palette(classes + 1)[1:] / 255


def sheet(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], names: Sequence[str], title: str, path: Path
) -> Path:
    """One row an image: (pixels uint8 [H, W, C], truth [H, W], predicted [H, W]). Ignored pixels are grey in the truth.

    A class called background, as class 0, is not painted over. Of many classes the legend has those that are seen.
    """
    paints = colours(len(names))
    bare_class = 0 if names and names[0] in ("background", "0") else None
    count = len(rows)
    heights = [1.9 * pixels.shape[0] / pixels.shape[1] for pixels, _, _ in rows]
    figure = new_figure(3 * 1.9 + 1.6, min(sum(heights) + 0.1 * count + 0.5, 80))
    grid = figure.subplots(count, 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    seen: set[int] = set()
    for line, (pixels, truth, predicted) in zip(grid, rows):
        picture = rgb(pixels) / 255.0
        for axes in line:
            bare(axes)
        line[0].imshow(picture)
        for axes, ids in ((line[1], truth), (line[2], predicted)):
            axes.imshow(_painted(picture, ids, paints, bare_class), interpolation="nearest")
            seen |= set(np.unique(ids).tolist())
    for axes, name in zip(grid[0], ("image", "truth", "prediction")):
        axes.set_title(name, fontsize=9, color=INK, pad=4)
    handles = [Patch(color=paints[k], label=names[k]) for k in sorted(seen) if k >= 0 and k != bare_class]
    handles += [Patch(color=_GREY, label="ignored")] if IGNORE in seen else []
    if handles:
        figure.legend(handles=handles[:40], loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, color=INK)
    return save(figure, path)


def _painted(picture: np.ndarray, ids: np.ndarray, paints: np.ndarray, bare_class: int | None) -> np.ndarray:
    out = picture.copy()
    for k in np.unique(ids):
        where = ids == k
        if k == bare_class:
            out[where] = 0.6 * out[where] + 0.1  # darker, so that what is found stands out
        else:
            colour = np.array(_GREY) if k < 0 else paints[k]
            out[where] = 0.35 * out[where] + 0.65 * colour
    return np.clip(out, 0, 1)
