"""The sheet image | truth | prediction of a detector: boxes in the colours of their classes, predicted ones with their scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from .canvas import INK, bare, new_figure, save
from .detect_data import Picture
from .detect_figures import Found
from .segment_pictures import colours
from .shown import rgb

_GREY = (0.5, 0.5, 0.5)


def sheet(
    rows: Sequence[tuple[np.ndarray, Picture, Found]], names: Sequence[str], title: str, path: Path, least: float
) -> Path:
    """One row an image: (pixels uint8 [H, W, C], its boxes, what was found). Ignored boxes are grey; predictions of a score
    below `least` are left out. Of many classes the legend has those that are seen."""
    paints = colours(len(names))
    heights = [2.4 * pixels.shape[0] / pixels.shape[1] for pixels, _, _ in rows]
    figure = new_figure(3 * 2.4 + 1.6, min(sum(heights) + 0.1 * len(rows) + 0.5, 80))
    grid = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    seen: set[int] = set()
    ignored = False
    for line, (pixels, truth, found) in zip(grid, rows):
        for axes in line:
            bare(axes)
            axes.imshow(rgb(pixels))
        for box, label, left_out in zip(truth.boxes, truth.labels, truth.ignored):
            _box(line[1], box, _GREY if left_out else paints[label])
            ignored |= bool(left_out)
            seen |= set() if left_out else {int(label)}
        for box, label, score in zip(found["boxes"].numpy(), found["labels"].tolist(), found["scores"].tolist()):
            if score >= least:
                _box(line[2], box, paints[label], f"{100 * score:.0f}")
                seen.add(label)
    for axes, name in zip(grid[0], ("image", "truth", f"prediction (score >= {least:g}, in %)")):
        axes.set_title(name, fontsize=9, color=INK, pad=4)
    handles = [Patch(color=paints[k], label=names[k]) for k in sorted(seen)]
    handles += [Patch(color=_GREY, label="ignored")] if ignored else []
    if handles:
        figure.legend(handles=handles[:40], loc="outside right upper", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, color=INK)
    return save(figure, path)


def _box(axes: Axes, box: np.ndarray, colour: Sequence[float] | np.ndarray, text: str = "") -> None:
    x1, y1, x2, y2 = (float(v) - 0.5 for v in box)  # imshow's pixels are centred on whole numbers
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="white", linewidth=2.6))
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=tuple(colour), linewidth=1.6))
    if text:
        look = {"facecolor": tuple(colour), "edgecolor": "none", "pad": 0.8}
        light = float(np.dot(np.asarray(colour)[:3], (0.3, 0.59, 0.11))) > 0.6
        axes.text(
            x1, y1, text, fontsize=6, color=INK if light else "white", bbox=look, va="bottom", ha="left", clip_on=True
        )  # fmt: skip
