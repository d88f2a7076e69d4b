"""Masks and boxes go where the pixels go."""

import numpy as np
import pytest

from selfsup.augment.geometry import Placement, place, still
from selfsup.augment.settings import AugmentConfig
from selfsup.data.views import P, ViewParams

EVERYTHING = AugmentConfig(
    scale=(0.6, 1.0), ratio=(0.8, 1.25), hflip=0.5, vflip=0.3, rotate=30, translate=0.1, zoom=(0.8, 1.2), shear=8
)


def scene(height=120, width=160):
    """Two flat rectangles on black: image [H,W,1] whose level is 100 times the id of the mask [H,W]; boxes."""
    ids = np.zeros((height, width), np.uint8)
    boxes = np.array([[40, 30, 50, 24], [100, 60, 30, 40]])
    for number, (x, y, w, h) in enumerate(boxes, 1):
        ids[y : y + h, x : x + w] = number
    return (ids * 100)[:, :, None], ids, boxes


@pytest.mark.parametrize("fill", ["constant", "edge", "reflect", "symmetric", "wrap"])
def test_a_mask_is_where_its_pixels_are(fill):
    """Away from edges, where pixels are mixed and ids are not, the level says the id; no id is made up."""
    config = EVERYTHING.model_copy(update={"fill": fill, "fill_level": 250})
    image, ids, _ = scene()
    for copy in range(1, 25):
        placement = place(config, 0, copy, *ids.shape)
        pixels = placement.warped(placement.pixels(image, "bilinear"))[:, :, 0].astype(int)
        moved = placement.mask(ids, 255)
        assert set(np.unique(moved)) <= {0, 1, 2, 255} and moved.dtype == np.uint8
        assert (fill == "constant") or not (moved == 255).any()
        sure = np.isin(pixels, (0, 100, 200)) if fill != "constant" else np.isin(pixels, (0, 100, 200, 250))
        expected = np.where(pixels == 250, 255, pixels // 100)
        assert sure.mean() > 0.8 and (moved == expected)[sure].mean() > 0.995


def test_boxes_hold_what_they_held():
    """The upright box about the turned corners holds every pixel of the object, and no side lies far from one that it
    touches, unless the object is cut."""
    _, ids, boxes = scene()
    seen = 0
    for copy in range(1, 41):
        placement = place(EVERYTHING.model_copy(update={"fill_level": 250}), 3, copy, *ids.shape)
        moved = placement.mask(ids, 255)
        for number, (box, visible) in enumerate(placement.boxes(boxes), 1):
            rows, columns = np.nonzero(moved == number)
            if visible <= 0:
                assert len(rows) == 0
                continue
            x, y, w, h = box
            assert x >= 0 and y >= 0 and x + w <= 160 + 1e-6 and y + h <= 120 + 1e-6
            if len(rows):
                inside = (columns + 1 > x - 1) & (columns < x + w + 1) & (rows + 1 > y - 1) & (rows < y + h + 1)
                assert inside.all()
            if visible > 0.999:
                ends = columns.min() - x, x + w - columns.max() - 1, rows.min() - y, y + h - rows.max() - 1
                assert np.abs(ends).max() < 2.5
                seen += 1
    assert seen > 15


def test_flips_and_crops_by_hand():
    plain = ViewParams(0, 0, 160, 120, 0, 0, -1, 1, 1, 1, 0, 0, 0, -1)
    boxes = np.array([[10.0, 20, 30, 40]])

    def moved(**changes):
        return Placement(plain._replace(**changes).pack(), 120, 160).boxes(boxes)[0]

    assert moved() == ((10, 20, 30, 40), 1)
    assert moved(hflip=1) == ((120, 20, 30, 40), 1) and moved(vflip=1) == ((10, 60, 30, 40), 1)
    assert moved(x=20, y=0, w=80, h=60) == ((0, 40, 40, 80), pytest.approx(2 / 3))
    assert moved(x=60, w=80).visible == 0
    turned = moved(fill=1, zoom=1, angle=90)  # clockwise about (80, 60): left becomes top
    assert turned.box == pytest.approx((80, -10 + 0, 40, 20), abs=1e-6) or turned.box == pytest.approx((80, 0, 40, 20))
    assert turned.visible == pytest.approx(20 / 30)


def test_draws_are_of_image_and_copy_alone():
    rows = {(i, c): place(EVERYTHING, i, c, 50, 60).row for i in range(20) for c in (1, 2)}
    assert len({row.tobytes() for row in rows.values()}) == 40
    assert np.array_equal(rows[7, 2], place(EVERYTHING, 7, 2, 50, 60).row)
    other = place(EVERYTHING.model_copy(update={"seed": 1}), 7, 2, 50, 60).row
    assert len(other) == P and not np.array_equal(rows[7, 2], other)
    for placement in (place(EVERYTHING, i, 1, h, w) for i in range(50) for h, w in ((1, 1), (3, 200), (500, 2))):
        left, top, width, height = placement.box
        assert 0 <= left < left + width <= placement.width and 0 <= top < top + height <= placement.height
    quiet = place(AugmentConfig(), 5, 1, 31, 17).row
    assert np.array_equal(quiet, still(31, 17).row)
