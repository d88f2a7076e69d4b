"""Random erasing follows torchvision's, Cutout its authors' code; nothing that was drawn before they were there has changed."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from selfsup.config import Crops, ViewsConfig
from selfsup.data import erasing
from selfsup.data.erasing import KEYS, MEAN, ZERO, all_at_once, erase, one_by_one
from selfsup.data.photometric import apply
from selfsup.data.views import COLUMN, CUTOUT, ERASE, LIGHT, draw, multicrop

N = 4000
SIZES = pytest.mark.parametrize("size", [32, 112], ids=["together", "few at a time"])


def rows(n=N, seed=0, index=0, size=64, epoch=0, **options):
    """What is drawn for n images."""
    crops = Crops(count=2, size=size, **options)
    view = multicrop(ViewsConfig(**{"global": crops, "local": Crops(count=0)}))[index]
    return draw(view, seed, np.full(n, epoch), np.arange(n), np.full((n, 2), 80))


def images(n, size, channels=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, n, channels, size, size), dtype=np.uint8))


def done(crops, p, channels=3, device="cpu", dtype=torch.float32):
    return apply(crops, torch.from_numpy(p)[None], (0.5,) * channels, (0.25,) * channels, device, dtype)[0]


# ------------------------------------------------------------------------------------------------------------------- drawn


@pytest.mark.parametrize("area, ratio", [((0.02, 0.33), (0.3, 3.3)), ((0.3, 0.9), (0.2, 0.5))])
def test_boxes_follow_torchvision(area, ratio):
    torch.manual_seed(0)
    theirs = v2.RandomErasing(p=1, scale=area, ratio=ratio)
    drawn = [theirs.make_params([torch.empty(3, 64, 64)]) for _ in range(2000)]
    expected = np.array([(d["j"], d["i"], d["w"], d["h"]) for d in drawn if d["v"] is not None])
    boxes = rows(erase=1.0, erase_area=area, erase_ratio=ratio)[:, ERASE]
    assert (boxes[:, 2] > 0).mean() == pytest.approx(len(expected) / 2000, abs=0.04)
    boxes = boxes[boxes[:, 2] > 0]
    for k in range(4):
        assert stats.ks_2samp(boxes[:, k], expected[:, k]).pvalue > 1e-4
    for ours, reference in ((boxes[:, 2] * boxes[:, 3], expected[:, 2] * expected[:, 3]),
                            (boxes[:, 3] / boxes[:, 2], expected[:, 3] / expected[:, 2])):  # fmt: skip
        assert stats.ks_2samp(ours, reference).pvalue > 1e-4
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 64).all() and (boxes[:, 2:] < 64).all()


def test_probabilities_one_a_view():
    for index, expected in ((0, 0.25), (1, 0.9)):
        boxes = rows(index=index, erase=(0.25, 0.9))[:, ERASE]
        assert (boxes[:, 2] > 0).mean() == pytest.approx(expected, abs=0.03)
    assert not rows(erase=0.0)[:, COLUMN["light_red"] :].any()


def by_the_authors(y, x, side, size):
    """Cutout's published code: the box about a centre, for an even side."""
    y1, y2 = np.clip(y - side // 2, 0, size), np.clip(y + side // 2, 0, size)
    x1, x2 = np.clip(x - side // 2, 0, size), np.clip(x + side // 2, 0, size)
    return np.stack([x1, y1, x2 - x1, y2 - y1], axis=1)


def test_squares_are_the_authors():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 32, (2, 500))
    u = (np.stack([x, y], axis=1) + 0.5) / 32
    assert (erasing.squares(u, 16, 32) == by_the_authors(y, x, 16, 32)).all()
    odd = erasing.squares(np.full((1, 2), 0.5), 5, 32)[0]
    assert odd.tolist() == [14, 14, 5, 5]


def test_centres_of_cutout_are_any_pixel():
    boxes = rows(cutout=16)[:, CUTOUT]
    assert boxes[:, 2:].max() == 16 and boxes[:, 2:].min() == 8  # whole inside; on a border: half
    for start, extent in ((0, 2), (1, 3)):
        low, length = boxes[:, start], boxes[:, extent]
        centre = np.where(low > 0, low + 8, length - 8)
        assert np.bincount(centre.astype(int), minlength=64).min() > 30  # of 62.5 expected
    assert abs(np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1]) < 0.06


def test_former_draws_are_as_they_were():
    """Whatever is added, rows up to solarization are the same; and each of the three leaves the others alone."""
    plain = rows(blur=0.5, solarize=0.3)
    every = rows(blur=0.5, solarize=0.3, erase=0.5, erase_fill="noise", cutout=8, lighting=0.1)
    first = COLUMN["light_red"]
    assert (every[:, :first] == plain[:, :first]).all() and not plain[:, first:].any()
    for part, options in (
        (LIGHT, {"lighting": 0.1}), (CUTOUT, {"cutout": 8}), (ERASE, {"erase": 0.5}),
    ):  # fmt: skip
        alone = rows(**options)
        assert (alone[:, part] == every[:, part]).all() and alone[:, part].any()


def test_a_pure_function_of_its_key():
    options = {"erase": 1.0, "erase_fill": "noise", "cutout": 8}
    once = rows(300, **options)
    for other in (rows(300, epoch=1, **options), rows(300, seed=1, **options), rows(300, index=1, **options)):
        for name in ("erase_x", "erase_fill", "cutout_x"):
            assert (once[:, COLUMN[name]] == other[:, COLUMN[name]]).mean() < 0.15
    assert (rows(20, **options) == once[:20]).all()


# -------------------------------------------------------------------------------------------------------------------- done


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_in_the_box_and_nothing_beside_it(size, dtype):
    p = rows(24, size=size, erase=0.7, cutout=9)
    plain = p.copy()
    plain[:, ERASE], plain[:, CUTOUT] = 0, 0
    crops = images(24, size)
    got, expected = done(crops, p, dtype=dtype), done(crops, plain, dtype=dtype)
    for image, row in zip(expected, p, strict=True):
        for part in (ERASE, CUTOUT):
            x, y, w, h = row[part].astype(int)
            v2.functional.erase(image, y, x, h, w, torch.zeros(1, dtype=dtype), inplace=True)
    assert torch.equal(got, expected) and got.dtype == dtype
    assert 0.02 < (got == 0).float().mean() < 0.5


@SIZES
def test_the_crops_own_mean(size):
    p = rows(8, size=size, erase=1.0, erase_fill="mean")
    plain = p.copy()
    plain[:, ERASE] = 0
    crops = images(8, size)
    got, whole = done(crops, p), done(crops, plain)
    for image, before, row in zip(got, whole, p, strict=True):
        x, y, w, h = row[ERASE].astype(int)
        assert w > 0
        box = image[:, y : y + h, x : x + w]
        torch.testing.assert_close(box, before.mean((1, 2))[:, None, None].expand_as(box))


@SIZES
def test_noise_is_normal_and_the_images_own(size):
    """It does not depend on the batch or on a global generator, and differs between images, channels and pixels."""
    p = rows(40, size=size, erase=1.0, erase_fill="noise", erase_area=(0.3, 0.33))
    crops = images(40, size)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    got = done(crops, p)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(got[30:], done(crops[:, 30:], p[30:]))
    torch.manual_seed(1)
    assert torch.equal(got, done(crops, p))
    values = []
    for image, row in zip(got, p, strict=True):
        x, y, w, h = row[ERASE].astype(int)
        values.append(image[:, y : y + h, x : x + w].flatten())
    every = torch.cat(values).double().numpy()
    assert len(every) > 20_000 and stats.kstest(every[:50_000], "norm").pvalue > 1e-4
    assert len(np.unique(every)) > 0.99 * len(every)
    same = p[:2].copy()
    same[1, ERASE] = same[0, ERASE]  # another image with the same box: other noise
    two = done(crops[:, :2], same)
    x, y, w, h = same[0, ERASE].astype(int)
    a, b = (image[:, y : y + h, x : x + w].flatten() for image in two)
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1


@pytest.mark.parametrize("channels, size", [(3, 32), (1, 20), (5, 17)])
def test_one_by_one_equals_all_at_once(channels, size):
    """What CPUs do and what accelerators do, with every kind of fill in one batch."""
    p = rows(60, size=size, erase=0.8, erase_fill="noise")
    fill = p[:, COLUMN["erase_fill"]]
    fill[::3], fill[1::3] = ZERO, MEAN
    boxed = np.flatnonzero(p[:, COLUMN["erase_w"]] > 0)
    x = torch.randn(60, channels, size, size)
    ours, theirs = (f(x.clone(), p[:, ERASE], fill, boxed) for f in (one_by_one, all_at_once))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert not torch.equal(ours, x) and torch.equal(erase(x.clone(), p[:, ERASE], fill), ours)


def test_the_key_of_noise_survives_float32():
    keys = erasing.fills(np.random.default_rng(0).random((10_000, erasing.DRAWS)), "noise")
    assert (keys.astype(np.float32).astype(np.float64) == keys).all() and keys.min() >= 0 and keys.max() < KEYS
    assert len(np.unique(keys)) > 9_990


def test_nothing_waits_for_the_device():
    """On the meta device there is nothing that could be read."""
    p = rows(20, size=32, erase=0.8, erase_fill="noise", cutout=8, lighting=0.1, blur=0.5, solarize=0.3)
    p[::3, COLUMN["erase_fill"]], p[1::3, COLUMN["erase_fill"]] = ZERO, MEAN
    assert done(images(20, 32), p, device="meta").shape == (20, 3, 32, 32)


@SIZES
def test_rows_are_independent(size):
    p = rows(12, size=size, erase=0.7, erase_fill="mean", cutout=8, lighting=0.1)
    crops = images(12, size)
    whole = done(crops, p)
    assert torch.equal(whole, torch.cat([done(crops[:, :5], p[:5]), done(crops[:, 5:], p[5:])]))
    assert torch.equal(whole, torch.cat([done(crops[:, b : b + 1], p[b : b + 1]) for b in range(12)]))


# ------------------------------------------------------------------------------------------------------------------- light


EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


@SIZES
def test_light_is_a_shift_of_each_channel(size):
    p = rows(10, size=size, lighting=0.1)
    plain = p.copy()
    plain[:, LIGHT] = 0
    crops = images(10, size)
    shift = (done(crops, p) - done(crops, plain)) * 0.25 * 255  # in levels
    expected = torch.from_numpy(p[:, LIGHT])[:, :, None, None].expand_as(shift)
    torch.testing.assert_close(shift, expected, atol=1e-3, rtol=1e-4)
    assert expected.abs().max() > 3
    grey = apply(images(10, size, 1), torch.from_numpy(p)[None], (0.5,), (0.25,), "cpu")
    assert torch.equal(grey, apply(images(10, size, 1), torch.from_numpy(plain)[None], (0.5,), (0.25,), "cpu"))


def test_light_has_the_published_covariance():
    """Krizhevsky et al., 2012: sum over k of p_k a_k l_k with a_k normal, of standard deviation 0.1; in levels of 255."""
    vectors, values = np.array(EIGENVECTORS), np.array(EIGENVALUES)
    light = rows(20_000, lighting=0.1)[:, LIGHT].astype(float) / 255
    a = light @ np.linalg.inv((vectors * values).T)  # light = (vectors * values) a
    for k in range(3):
        assert stats.kstest(a[:, k] / 0.1, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(a.T) - np.eye(3)).max() < 0.03
