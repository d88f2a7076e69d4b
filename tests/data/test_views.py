"""What is drawn for each view follows the published distributions; crops equal torchvision's bit for bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tvf

from selfsup.config import Crops, ViewsConfig
from selfsup.data.views import ORDERS, P, ViewParams, crop, crops_of, draw, multicrop, resolutions, sample_params

N = 20_000


def column(rows, name):
    return rows[:, ViewParams._fields.index(name)].astype(float)


def drawn(view, height=375, width=500, seed=0, n=N, epoch=0):
    return draw(view, seed, np.full(n, epoch), np.arange(n), np.tile([[height, width]], (n, 1)))


@pytest.fixture(scope="module")
def views():
    return multicrop(ViewsConfig())


def test_the_published_views(views):
    assert [v.name for v in views] == ["global0", "global1"] + [f"local{i}" for i in range(8)]
    assert [v.number for v in views] == list(range(10)) and [v.index for v in views] == [0, 1, *range(8)]
    assert [len(g) for g in resolutions(views)] == [2, 8]
    assert [g[0].size for g in resolutions(views)] == [224, 96]


def test_no_local_views_and_equal_sizes():
    assert len(resolutions(multicrop(ViewsConfig(local=Crops(count=0))))) == 1
    same = multicrop(ViewsConfig(**{"global": Crops(size=32), "local": Crops(count=3, size=32)}))
    assert [len(g) for g in resolutions(same)] == [2, 3]


def test_probabilities_and_ranges(views):
    """DINO's main_dino.py: jitter 0.8 (0.4, 0.4, 0.2, 0.1), grey 0.2, blur 1.0 / 0.1 / 0.5, solarization 0 / 0.2 / 0."""
    for view, blur, solarize in ((views[0], 1.0, 0.0), (views[1], 0.1, 0.2), (views[2], 0.5, 0.0)):
        rows = drawn(view)
        for name, probability in (
            ("hflip", 0.5), ("vflip", 0.0), ("gray", 0.2),
        ):  # fmt: skip
            assert column(rows, name).mean() == pytest.approx(probability, abs=0.013), name
        assert (column(rows, "order") >= 0).mean() == pytest.approx(0.8, abs=0.013)
        assert (column(rows, "sigma") > 0).mean() == pytest.approx(blur, abs=0.013)
        assert (column(rows, "solarize") == 128).mean() == pytest.approx(solarize, abs=0.013)
        jittered = rows[column(rows, "order") >= 0]
        for name, low, high in (
            ("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1),
        ):  # fmt: skip
            uniform_on(column(jittered, name), low, high)
        counts = np.bincount(column(jittered, "order").astype(int), minlength=len(ORDERS))
        assert len(ORDERS) == 24 and np.abs(counts / len(jittered) - 1 / 24).max() < 0.008
        sigma = column(rows, "sigma")
        uniform_on(sigma[sigma > 0], 0.1, 2.0)
        still = rows[column(rows, "order") < 0]
        assert (column(still, "brightness") == 1).all() and (column(still, "hue") == 0).all()


def uniform_on(values, low, high):
    """Kolmogorov-Smirnov distance to the uniform distribution, at about p = 1e-4."""
    values = np.sort((values - low) / (high - low))
    assert values[0] >= -1e-6 and values[-1] <= 1 + 1e-6
    grid = np.arange(1, len(values) + 1) / len(values)
    assert np.abs(values - grid).max() < 2.2 / np.sqrt(len(values))


def ks(a, b):
    """Two-sample Kolmogorov-Smirnov statistic times the root of the effective size; 2.2 is about p = 1e-4."""
    grid = np.sort(np.concatenate([a, b]))
    distance = np.abs(
        np.searchsorted(np.sort(a), grid, "right") / len(a) - np.searchsorted(np.sort(b), grid, "right") / len(b)
    ).max()
    return distance * np.sqrt(len(a) * len(b) / (len(a) + len(b)))


@pytest.mark.parametrize("height, width", [(375, 500), (28, 28), (500, 120), (40, 600)])
@pytest.mark.parametrize("which", [0, 2])
def test_boxes_follow_torchvision(views, height, width, which):
    view = views[which]
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    reference = np.array(
        [RandomResizedCrop.get_params(image, list(view.crops.scale), list(view.crops.ratio)) for _ in range(8000)]
    )  # top, left, height, width
    rows = drawn(view, height, width)
    x, y, w, h = (column(rows, name) for name in "xywh")
    assert (x >= 0).all() and (y >= 0).all() and (w >= 1).all() and (h >= 1).all()
    assert (x + w <= width).all() and (y + h <= height).all()
    for ours, theirs in (
        (y, reference[:, 0]), (x, reference[:, 1]), (h, reference[:, 2]), (w, reference[:, 3]),
        (w * h / (height * width), reference[:, 2] * reference[:, 3] / (height * width)),
        (w / h, reference[:, 3] / reference[:, 2]),
    ):  # fmt: skip
        assert ks(ours, theirs) < 2.2


def test_an_impossible_box_falls_back_to_the_centre(views):
    rows = drawn(views[0], height=10, width=1000, n=2000)
    fallback = rows[column(rows, "w") == round(10 * 4 / 3)]
    assert len(fallback) > 1900 and (column(fallback, "h") == 10).all()
    assert (column(fallback, "x") == (1000 - 13) // 2).all()
    one = sample_params(views[0], 0, 0, 0, 1, 1)
    assert (one.x, one.y, one.w, one.h) == (0, 0, 1, 1)


def test_a_pure_function_of_its_key(views):
    """The same alone, in a batch, in another order; different for another seed, epoch, index or view."""
    rows = drawn(views[1], n=300, epoch=7)
    for i in (0, 17, 299):
        assert ViewParams.unpack(rows[i]) == sample_params(views[1], 0, 7, i, 375, 500)
    order = np.random.default_rng(0).permutation(300)
    sizes = np.tile([[375, 500]], (300, 1))
    assert (draw(views[1], 0, np.full(300, 7), order, sizes) == rows[order]).all()
    for other in (
        drawn(views[1], n=300, epoch=8),
        drawn(views[1], n=300, epoch=7, seed=1),
        drawn(views[3], n=300, epoch=7),
    ):
        assert (column(other, "x") == column(rows, "x")).mean() < 0.1
        assert abs(np.corrcoef(column(other, "hflip"), column(rows, "hflip"))[0, 1]) < 0.25
    assert (column(rows, "hflip")[1:] == column(rows, "hflip")[:-1]).mean() == pytest.approx(0.5, abs=0.12)


def test_draws_are_uncorrelated(views):
    rows = drawn(views[2])[:, [0, 4, 7, 8, 11, 12]].astype(float)
    other = drawn(views[3])[:, [0, 4, 7, 8, 11, 12]].astype(float)
    correlation = np.corrcoef(np.hstack([rows, other]).T) - np.eye(12)
    correlation[2, 3] = correlation[3, 2] = correlation[8, 9] = correlation[9, 8] = (
        0  # 1 together where there is no jitter
    )
    assert np.abs(correlation).max() < 0.04


def test_every_option_reaches_what_is_drawn():
    crops = Crops(
        count=2, size=20, scale=(0.9, 1.0), ratio=(1.0, 1.0), hflip=0, vflip=1, jitter=1, brightness=0, contrast=0.9,
        saturation=0, hue=0.5, grayscale=(1.0, 0.0), blur=(0.0, 1.0), blur_sigma=(3.0, 3.0), solarize=(1.0, 0.0),
        solarize_threshold=77,
    )  # fmt: skip
    a, b = multicrop(ViewsConfig(**{"global": crops, "local": Crops(count=0)}))
    first, second = drawn(a, 100, 100, n=2000), drawn(b, 100, 100, n=2000)
    assert (column(first, "w") == column(first, "h")).all() and column(first, "w").min() >= 94
    assert not column(first, "hflip").any() and column(first, "vflip").all()
    assert (column(first, "brightness") == 1).all() and column(first, "contrast").max() > 1.85
    assert np.abs(column(first, "hue")).max() > 0.45
    assert column(first, "gray").all() and not column(second, "gray").any()
    assert not column(first, "sigma").any() and (column(second, "sigma") == 3).all()
    assert (column(first, "solarize") == 77).all() and (column(second, "solarize") == -1).all()
    strong = multicrop(ViewsConfig(**{"global": Crops(brightness=2.0)}))[0]
    assert 0 <= column(drawn(strong), "brightness").min() < 0.01  # torchvision: from max(0, 1 - brightness)


def test_params_travel_as_float32():
    params = sample_params(multicrop(ViewsConfig())[0], 1, 2, 3, 5000, 7000)
    assert params.pack().dtype == np.float32 and params.pack().shape == (P,)
    assert ViewParams.unpack(params.pack()) == params


# ------------------------------------------------------------------------------------------------------------ crops


def random_crops(image, size, interpolation, count=40):
    """Ours and torchvision's, as [count,C,S,S]."""
    crops = Crops(count=1, size=size, scale=(0.05, 1.0), vflip=0.5, interpolation=interpolation)
    view = multicrop(ViewsConfig(**{"global": crops}))[0]
    mode = getattr(tvf.InterpolationMode, interpolation.upper())
    ours, theirs = [], []
    for index in range(count):
        p = sample_params(view, 0, 0, index, image.height, image.width)
        expected = tvf.resized_crop(image, int(p.y), int(p.x), int(p.h), int(p.w), [size, size], mode)
        expected = tvf.hflip(expected) if p.hflip else expected
        expected = tvf.vflip(expected) if p.vflip else expected
        theirs.append(tvf.pil_to_tensor(expected).numpy())
        ours.append(crop(image, p, size, interpolation))
    return np.stack(ours), np.stack(theirs)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 96])
def test_grey_crops_equal_torchvision(interpolation, size):
    array = np.random.default_rng(4).integers(0, 256, (61, 83), dtype=np.uint8)
    ours, theirs = random_crops(Image.fromarray(array), size, interpolation)
    assert ours.dtype == np.uint8 and ours.shape == (40, 1, size, size) and (ours == theirs).all()


@pytest.mark.parametrize("interpolation, worst, mean", [("bilinear", 1, 0.5), ("bicubic", 30, 0.5)])
@pytest.mark.parametrize("size", [24, 96])
def test_colour_crops_equal_torchvision(pictures, interpolation, size, worst, mean):
    """On noise, where the overshoot of bicubic filters is worst, and on pictures."""
    noise = np.random.default_rng(4).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    ours, theirs = random_crops(Image.fromarray(noise), size, interpolation)
    difference = np.abs(ours.astype(int) - theirs)
    assert ours.shape == (40, 3, size, size) and difference.max() <= worst
    assert difference.mean(axis=(1, 2, 3)).max() < mean
    ours, theirs = random_crops(Image.fromarray(pictures[0]), size, interpolation)
    assert np.abs(ours.astype(int) - theirs).mean(axis=(1, 2, 3)).max() < 0.15


def test_four_channels_are_resized_each_alone():
    """PIL would multiply colours by alpha, which four-channel measurements do not have."""
    array = np.random.default_rng(4).integers(0, 256, (61, 83, 4), dtype=np.uint8)
    ours, _ = random_crops(Image.fromarray(array), 24, "bilinear")
    for c in range(4):
        _, plane = random_crops(Image.fromarray(np.ascontiguousarray(array[:, :, c])), 24, "bilinear")
        assert np.abs(ours[:, c : c + 1].astype(int) - plane).max() <= 1


def test_crops_of_many_channels_equal_those_of_one():
    rng = np.random.default_rng(5)
    array = rng.integers(0, 256, (40, 50, 13), dtype=np.uint8)
    view = multicrop(ViewsConfig(**{"global": Crops(size=16, vflip=0.5)}))[0]
    rows = drawn(view, 40, 50, n=12)
    many = crops_of([array] * 12, rows, 16, "bicubic")
    for channel in (0, 12):
        one = crops_of([Image.fromarray(np.ascontiguousarray(array[:, :, channel]))] * 12, rows, 16, "bicubic")
        assert (many[..., channel : channel + 1] == one).all()
