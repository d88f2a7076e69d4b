"""Moved images equal those of scipy and torchvision, fill modes those of numpy.pad; what is drawn is what the keys say."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from selfsup.config import Crops, ViewsConfig
from selfsup.data import warp
from selfsup.data.photometric import apply
from selfsup.data.views import WARP, ViewParams, draw, multicrop

SCIPY = {
    "constant": "grid-constant",
    "edge": "nearest",
    "reflect": "mirror",
    "symmetric": "reflect",
    "wrap": "grid-wrap",
}


def image(channels=3, height=24, width=31, seed=0):
    y, x = np.mgrid[0:height, 0:width]
    random = np.random.default_rng(seed)
    planes = [120 + 60 * np.sin(x / (3 + c)) + 50 * np.cos(y / (2 + c)) for c in range(channels)]
    return (np.stack(planes) + random.normal(0, 4, (channels, height, width))).clip(0, 255).astype(np.uint8)


def row(angle=0.0, x=0.0, y=0.0, zoom=1.0, shear_x=0.0, shear_y=0.0, fill="constant", level=77):
    return np.array([[angle, x, y, zoom, shear_x, shear_y, 1 + warp.FILLS.index(fill), level]], np.float32)


@pytest.mark.parametrize("fill", warp.FILLS)
@pytest.mark.parametrize("channels", [1, 5])
def test_fills_equal_scipy(fill, channels):
    """Far beyond the border, where an image is seen several times over; constant fill is blended at the border as scipy does."""
    x = image(channels)
    for moved in (
        row(33, 0.2, -0.4, 0.6, 10, -5, fill),
        row(-120, 1.0, 0.7, 0.3, 0, 0, fill),
        row(0, 0.5, 0, 1, fill=fill),
    ):
        got = warp.warp(torch.from_numpy(x)[None], moved, [0.0] * channels)[0].numpy().astype(float)
        inverse = warp.matrices(moved, *x.shape[1:])[1][0]
        order = inverse[::-1, [1, 0]]  # scipy's axes are (y, x)
        for plane, own in zip(x, got, strict=True):
            expected = ndimage.affine_transform(
                plane.astype(float), order, inverse[::-1, 2], order=1, mode=SCIPY[fill], cval=77
            )
            assert np.abs(own - expected).max() <= 0.51


@pytest.mark.parametrize("fill", warp.FILLS)
def test_whole_shifts_equal_numpy_pad(fill):
    x = image(2, 6, 8)
    options = {"constant_values": 9} if fill == "constant" else {}
    padded = np.pad(x, ((0, 0), (15, 0), (20, 0)), mode=fill, **options)[:, :6, :8]
    moved = row(x=20 / 8, y=15 / 6, fill=fill, level=9)
    assert np.array_equal(warp.warp(torch.from_numpy(x)[None], moved, [0.0, 0.0])[0].numpy(), padded)
    inverse = warp.matrices(moved, 6, 8)[1][0]
    rows, columns, inside = warp.nearest(inverse, 6, 8, warp.FILLS.index(fill))
    assert np.array_equal(np.where(inside, x[:, rows, columns], 9), padded)


@pytest.mark.parametrize(
    "moved", [row(30), row(-75, 0.1, -0.25), row(10, 0, 0, 1.7, 20, -15), row(0, 0.25, 0.5), row(0, 0, 0, 0.5)]
)
def test_the_inside_equals_torchvision(moved):
    x = torch.from_numpy(image())
    angle, tx, ty, zoom, sx, sy = moved[0, :6].tolist()
    shift = [round(tx * 31), round(ty * 24)]
    moved[0, 1:3] = shift[0] / 31, shift[1] / 24
    theirs = tvf.affine(x.float(), angle, shift, zoom, [sx, sy], InterpolationMode.BILINEAR, fill=[0.0])
    seen = tvf.affine(torch.ones_like(x).float(), angle, shift, zoom, [sx, sy], InterpolationMode.BILINEAR, fill=[0.0])
    ours = warp.warp(x[None].float(), moved, [0.0] * 3)[0]
    inside = seen > 0.999
    assert inside.float().mean() > 0.15
    assert (ours - theirs)[inside].abs().max() <= 1.01


def test_a_point_goes_where_its_pixel_goes():
    """The forward matrix, which boxes follow, and the inverse one agree; a bright spot is found at its place."""
    x = torch.zeros(1, 1, 40, 60)
    x[0, 0, 10:13, 20:23] = 255
    moved = row(40, 0.1, 0.05, 1.2, 8, 0, level=0)
    forward, inverse = warp.matrices(moved, 40, 60)
    full = [np.vstack([m[0], [0, 0, 1]]) for m in (forward, inverse)]
    assert np.allclose(full[0] @ full[1], np.eye(3), atol=1e-9)
    out = warp.warp(x, moved, [0.0])[0, 0].numpy()
    y, xs = np.mgrid[0:40, 0:60]
    centre = np.array([(out * xs).sum(), (out * y).sum()]) / out.sum()
    assert np.abs(centre - forward[0] @ [21, 11, 1]).max() < 0.1


def test_draws_and_order_of_a_batch():
    """Each value within its key's range; an image's row does not depend on those beside it, nor do rows of other keys change."""
    keys = {"rotate": 30, "translate": 0.2, "zoom": (0.8, 1.25), "shear": 10, "fill": "wrap", "affine": 0.7}
    plain, moved = (multicrop(ViewsConfig(**{"global": {"size": 32, **k}}))[0] for k in ({}, keys))
    n = 4000
    sizes = np.tile([[40, 50]], (n, 1))
    rows = draw(moved, 3, np.full(n, 2), np.arange(n), sizes)
    before = draw(plain, 3, np.full(n, 2), np.arange(n), sizes)
    assert np.array_equal(np.delete(rows, np.r_[WARP], 1), np.delete(before, np.r_[WARP], 1))
    live = rows[:, WARP][:, warp.FILL] > 0
    assert live.mean() == pytest.approx(0.7, abs=0.03) and not rows[:, WARP][~live].any()
    own = rows[:, WARP][live]
    for column, low, high in (
        (warp.ANGLE, -30, 30), (warp.MOVE_X, -0.2, 0.2), (warp.MOVE_Y, -0.2, 0.2), (warp.ZOOM, 0.8, 1.25),
        (warp.SHEAR_X, -10, 10), (warp.SHEAR_Y, -10, 10),
    ):  # fmt: skip
        values = own[:, column]
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
    assert abs(np.corrcoef(own[:, [0, 1, 2, 3, 4, 5]].T) - np.eye(6)).max() < 0.07
    assert (own[:, warp.FILL] == 5).all() and (own[:, warp.LEVEL] == -1).all()
    alone = draw(moved, 3, np.array([2]), np.array([17]), sizes[:1])
    assert np.array_equal(alone[0], rows[17])


@pytest.mark.parametrize("size", [32, 112], ids=["together", "few at a time"])
def test_in_a_batch(size):
    """Only rows that have it are moved, before colours change; the fill of constant is the data's mean."""
    crops = torch.from_numpy(np.stack([image(3, size, size, s) for s in range(4)]))[None]  # [1,4,3,S,S]
    moved = ViewParams(0, 0, 1, 1, 0, 0, -1, 1, 1, 1, 0, 0, 0, 128, angle=45, zoom=1, fill=1, fill_level=-1)
    still = moved._replace(fill=0, angle=0, zoom=0)
    rows = torch.from_numpy(np.stack([p.pack() for p in (moved, still, moved, still)]))[None]
    mean = (0.2, 0.4, 0.6)
    out = apply(crops, rows, mean, (1 / 255,) * 3, "cpu")[0]
    plain = apply(crops, torch.from_numpy(np.stack([still.pack()] * 4))[None], mean, (1 / 255,) * 3, "cpu")[0]
    assert torch.equal(out[1], plain[1]) and torch.equal(out[3], plain[3]) and not torch.equal(out[0], plain[0])
    corner = out[0, :, 0, 0] + 255 * torch.tensor(mean)
    assert torch.allclose(corner, torch.tensor([51.0, 102, 102]), atol=1e-3)  # the last one was solarized: 255 - 153
    own = warp.warp(crops[0, 2:3], rows[0, 2:3, WARP].numpy(), [51, 102, 153])
    after = apply(own[None], torch.from_numpy(still.pack())[None, None], mean, (1 / 255,) * 3, "cpu")[0]
    assert torch.equal(after[0], out[2])


def test_bad_keys():
    for keys, word in (
        ({"zoom": (0.0, 1.0)}, "zoom"), ({"rotate": 200}, "rotate"), ({"fill": "mirror"}, "fill"), ({"shear": 90}, "shear"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            Crops(**keys)
