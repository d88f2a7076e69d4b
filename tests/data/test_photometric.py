"""The batched operations equal PIL's, as torchvision and DINO's code call them, for given parameters."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import functional as tvf

from selfsup.config import Crops, ViewsConfig
from selfsup.data.blur import blurred, blurred_in_tiles, box_taps, matrices, reaches
from selfsup.data.colour import turn_hue
from selfsup.data.photometric import apply, together
from selfsup.data.photometric_rows import few_at_a_time
from selfsup.data.sources import open_source
from selfsup.data.views import ORDERS, ViewParams, crops_of, draw, multicrop, prepare
from selfsup.errors import UserError

PLAIN = ViewParams(0, 0, 1, 1, 0, 0, -1, 1, 1, 1, 0, 0, 0, -1)
SIZES = pytest.mark.parametrize("size", [32, 112], ids=["together", "few at a time"])
"""Images that a CPU takes in one batch, and such as it takes a few at a time."""


def noise(channels, size=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)


def smooth(channels, size=32):
    """Gradients with edges: where blur and hue go wrong if they do."""
    y, x = np.mgrid[0:size, 0:size] / size
    planes = [x, y, (x + y) / 2, np.where(x > y, 0.9, 0.2)] * 4
    return (np.stack(planes[:channels], -1) * 255).astype(np.uint8)


def ours(images, params):
    """uint8-valued floats [N,S,S,C] from images [N] of [S,S,C] and as many ViewParams."""
    crops = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)[None]  # [1,N,C,S,S]
    rows = torch.from_numpy(np.stack([p.pack() for p in params]))[None]
    channels = crops.shape[2]
    out = apply(crops, rows, (0.0,) * channels, (1 / 255,) * channels, "cpu")
    return out[0].permute(0, 2, 3, 1).numpy()


def with_pil(image, p):
    """One image [S,S,C] through PIL, in DINO's order."""
    out = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    if p.order >= 0:
        for op in ORDERS[int(p.order)]:
            function = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)[op]
            if p[7 + op] != PLAIN[7 + op]:  # torchvision leaves out what is not asked for; its hue is never quite idle
                out = function(out, p[7 + op])
    if p.gray:
        out = tvf.rgb_to_grayscale(out, num_output_channels=len(out.getbands()))
    if p.sigma:
        out = out.filter(ImageFilter.GaussianBlur(radius=p.sigma))
    if p.solarize >= 0:
        out = ImageOps.solarize(out, int(p.solarize))
    return np.asarray(out).reshape(image.shape).astype(float)


def check(images, params, tolerance=2.0):
    for got, image, p in zip(ours(images, params), images, params, strict=True):
        expected = with_pil(image, p)
        assert np.abs(got - expected).mean() <= tolerance, (p, np.abs(got - expected).mean())


@SIZES
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [noise, smooth])
def test_single_operations(channels, make, size):
    """Far tighter than 2 levels: brightness, contrast, grey and solarization to a rounding, blur to one level.

    (Factors such as 0.6, whose products are whole numbers, would test the last bit of a float32.)
    """
    image = make(channels, size)
    cases = {
        0.05: [PLAIN._replace(order=0, brightness=b) for b in (0.0, 0.613, 0.937, 1.0, 1.391, 2.0)]
        + [PLAIN._replace(order=0, contrast=c) for c in (0.0, 0.617, 1.0, 1.387)]
        + [PLAIN._replace(gray=1), PLAIN._replace(solarize=128), PLAIN._replace(solarize=0), PLAIN],
        0.6: [PLAIN._replace(sigma=s) for s in (0.35, 0.8, 1.0, 1.5, 2.0, 5.0)],
        1.2: [PLAIN._replace(sigma=0.1)],  # PIL rounds after each of its six passes
    }
    if channels == 3:
        cases[0.05] += [PLAIN._replace(order=0, saturation=s) for s in (0.0, 0.813, 1.0, 1.187, 1.913)]
        cases[1.0] = [PLAIN._replace(order=0, hue=h) for h in (-0.5, -0.1, -0.03, 0.0, 0.05, 0.1, 0.4, 0.5)]
    for tolerance, params in cases.items():
        check([image] * len(params), params, tolerance)


@pytest.mark.parametrize(
    "first", [{"gray": 1}, {"order": 0, "hue": 0.1}, {"order": 0, "contrast": 0.6}, {"sigma": 1.5}]
)
def test_an_operation_on_all_images_before_one_on_some(first):
    """A small batch can be all grey, and in part blurred or solarized; so can any batch where grey is certain."""
    p = PLAIN._replace(**first)
    params = [p, p._replace(sigma=1.5), p._replace(solarize=128), p]
    check([noise(3)] * 4, params)
    check([smooth(3)] * 4, params)


@SIZES
def test_untouched_images_stay_bit_for_bit(size):
    image = noise(3, size)
    assert (ours([image], [PLAIN])[0] == image).all()
    assert (ours([image], [PLAIN._replace(order=5)])[0] == image).all()  # jitter with all factors idle


@SIZES
@pytest.mark.parametrize("make", [noise, smooth])
def test_jitter_in_every_order(make, size):
    params = [
        PLAIN._replace(order=o, brightness=1.3, contrast=0.7, saturation=1.15, hue=h)
        for o in range(24)
        for h in (-0.08, 0.1)
    ]
    check([make(3, size)] * len(params), params, 1.0)


@pytest.mark.parametrize("channels", [1, 3])
def test_dinos_augmentation_on_real_images(channels):
    """All operations at once with drawn parameters; the solarization's jump is the worst case."""
    source = open_source("demo:val", channels=channels)
    crops = Crops(count=2, size=28, blur=(1.0, 0.3), solarize=(0.0, 0.5))
    worst = 0.0
    for view in multicrop(ViewsConfig(**{"global": crops, "local": Crops(count=4, size=16, scale=(0.05, 0.4))})):
        n = 120
        rows = draw(view, 3, np.zeros(n, int), np.arange(n), np.full((n, 2), 28))
        images = list(crops_of([prepare(source.read(i)) for i in range(n)], rows, view.size, view.crops.interpolation))
        params = [ViewParams.unpack(r) for r in rows]
        for got, image, p in zip(ours(images, params), images, params, strict=True):
            worst = max(worst, np.abs(got - with_pil(image, p)).mean())
    assert worst <= 2.0


@SIZES
def test_any_number_of_channels(size):
    """Brightness, blur and solarization act on each channel as on a grey image; contrast around the mean of each."""
    image = noise(13, size)
    p = PLAIN._replace(order=0, brightness=1.2, sigma=1.1, solarize=200, gray=1, saturation=0.3, hue=0.2)
    got = ours([image], [p])[0]
    for channel in (0, 7, 12):
        one = with_pil(image[:, :, channel : channel + 1], p._replace(gray=0, saturation=1, hue=0))
        assert np.abs(got[:, :, channel : channel + 1] - one).mean() < 2
    level = np.floor(image.mean(axis=(0, 1)) + 0.5)
    expected = np.floor(np.clip(0.5 * image.astype(float) + 0.5 * level, 0, 255))
    assert np.abs(ours([image], [PLAIN._replace(order=0, contrast=0.5)])[0] - expected).max() <= 1


@SIZES
def test_normalisation_shape_and_type(size):
    crops = torch.from_numpy(noise(3, size)[None, None]).permute(0, 1, 4, 2, 3).expand(2, 5, 3, size, size)
    params = torch.from_numpy(PLAIN.pack()).expand(2, 5, -1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    out = apply(crops, params, mean, std, "cpu")
    expected = tvf.normalize(crops.reshape(10, 3, size, size) / 255, list(mean), list(std)).view_as(out)
    assert out.shape == (2, 5, 3, size, size) and out.is_contiguous() and torch.allclose(out, expected, atol=1e-6)
    assert apply(crops, params, mean, std, "cpu", torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"data\.mean and data\.std need 3 values"):
        apply(crops, params, (0.5,), (0.5,), "cpu")


@SIZES
def test_the_input_is_left_alone_and_rows_are_independent(size):
    """A row's result does not depend on its neighbours: what makes ranks and micro-batches equal."""
    view = multicrop(ViewsConfig())[1]
    rows = draw(view, 0, np.zeros(32, int), np.arange(32), np.full((32, 2), 32))
    params = [ViewParams.unpack(r) for r in rows]
    images = [noise(3, size, i) for i in range(32)]
    before = [i.copy() for i in images]
    whole = ours(images, params)
    assert all((a == b).all() for a, b in zip(images, before, strict=True))
    halves = np.concatenate([ours(images[:11], params[:11]), ours(images[11:], params[11:])])
    assert (whole == halves).all()
    alone = np.concatenate([ours([image], [p]) for image, p in zip(images, params, strict=True)])
    assert (whole == alone).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_few_at_a_time_equal_all_together(channels):
    """On the same images with the same parameters, but for sums that fall on the other side of a level."""
    views = multicrop(ViewsConfig(**{"global": Crops(blur=0.7, solarize=0.3), "local": Crops(count=0)}))
    n = 48
    rows = draw(views[0], 5, np.zeros(n, int), np.arange(n), np.full((n, 2), 112))
    crops = torch.from_numpy(np.stack([(noise, smooth)[i % 2](channels, 112) for i in range(n)])).permute(0, 3, 1, 2)
    alone = few_at_a_time(crops, rows, np.ones(channels, np.float32), np.zeros(channels, np.float32), torch.float32)
    difference = (alone - together(crops.float().contiguous(), rows)).abs()
    assert difference.mean() < 1e-3 and (difference > 1).float().mean() < 1e-4


def test_a_few_at_a_time_are_the_same_for_any_number_of_threads():
    view = multicrop(ViewsConfig())[1]
    params = [ViewParams.unpack(r) for r in draw(view, 1, np.zeros(8, int), np.arange(8), np.full((8, 2), 112))]
    images = [noise(3, 112, i) for i in range(8)]
    threads, made = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            made.append(ours(images, params))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert (made[0] == made[1]).all()


@pytest.mark.parametrize("size", [20, 45, 96, 100, 224])
def test_a_blur_in_tiles_equals_that_by_whole_matrices(size):
    x = torch.from_numpy(noise(3, size)).permute(2, 0, 1).float().contiguous()
    for sigma in (0.1, 0.5, 1.2, 2.0, 5.0, 11.0):
        whole = blurred(x, matrices(torch.from_numpy(box_taps(np.array([sigma]))), size)[0])
        sigmas = np.array([sigma])
        difference = (blurred_in_tiles(x[None], sigmas, int(reaches(sigmas)[0]))[0] - whole).abs()
        assert difference.max() <= 1 and difference.mean() < 1e-3, sigma


@pytest.mark.parametrize("turn", [0.003, 0.05, -0.1, 0.3, -0.5, 0.5])
def test_hue_of_very_many_colours(turn):
    """A quarter of a million of every brightness and saturation, and all those of the 48 darkest levels."""
    random = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    dark = np.stack(np.meshgrid(*[np.arange(48, dtype=np.uint8)] * 3, indexing="ij"), -1).reshape(216, 512, 3)
    image = np.concatenate([random, dark])
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    got = turn_hue(x, torch.full((1, 1, 1, 1), turn))[0].permute(1, 2, 0).numpy()
    difference = np.abs(got - np.asarray(tvf.adjust_hue(Image.fromarray(image), turn)))
    assert difference.mean() < 0.005 and (difference > 0).mean() < 0.003 and difference.max() <= 8


class Watch(TorchDispatchMode):
    """Names of the operations that make the host wait for a device, or read a size from it."""

    def __init__(self):
        super().__init__()
        self.waits, self.seen = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        name = str(function)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")):
            self.waits.append(name)
        if "aten.index.Tensor" in name and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    moved = {"rotate": 30, "zoom": (0.8, 1.2), "fill": "reflect", "affine": 0.5, "noise": 0.5, "salt_pepper": 0.5}
    view = multicrop(ViewsConfig(**{"global": Crops(blur=0.5, solarize=0.3, **moved)}))[0]
    rows = torch.from_numpy(draw(view, 0, np.zeros(32, int), np.arange(32), np.full((32, 2), 32)))[None]
    crops = torch.from_numpy(np.stack([noise(3, 32, i) for i in range(32)])).permute(0, 3, 1, 2)[None]
    with Watch() as watch:
        apply(crops, rows, (0.5,) * 3, (0.25,) * 3, "cpu")
    assert watch.seen > 50 and not watch.waits
    with Watch() as watch:
        crops.max().item()
    assert watch.waits  # the watch works


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_cuda_equals_cpu_and_never_waits():
    moved = {"rotate": 30, "fill": "wrap", "affine": 0.5, "noise": 0.5, "salt_pepper": 0.5}
    view = multicrop(ViewsConfig(**{"global": Crops(size=64, blur=0.5, solarize=0.3, **moved)}))[0]
    n = 64
    rows = torch.from_numpy(draw(view, 0, np.zeros(n, int), np.arange(n), np.full((n, 2), 64)))[None]
    crops = torch.from_numpy(np.stack([noise(3, 64, i) for i in range(n)])).permute(0, 3, 1, 2)[None]
    mean, std = (0.0,) * 3, (1 / 255,) * 3
    expected = apply(crops, rows, mean, std, "cpu")
    pinned = crops.pin_memory()
    apply(pinned, rows, mean, std, "cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = apply(pinned, rows, mean, std, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (got.cpu() - expected).abs()
    assert difference.mean() < 0.05
