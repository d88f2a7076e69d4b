"""Fourier style equals whole Fourier transforms; partners are a matter of the draw alone; networks as operations."""

import numpy as np
import pytest
import torch
from torch import nn

from selfsup.config import ViewsConfig
from selfsup.data import modules, style
from selfsup.data.loader import Loader
from selfsup.data.photometric import apply
from selfsup.data.sources import open_source
from selfsup.data.views import COLUMN, STYLE, P, ViewParams, multicrop, resolutions
from selfsup.errors import UserError

KEYS = {"count": 1, "size": 24, "blur": 0.0, "solarize": 0.0, "style": "fourier", "style_probability": 0.7}
KEYS["fourier_beta"] = (0.02, 0.2)


def by_whole_transforms(x, other, beta):
    """As Yang & Soatto's published code does it (YanchaoYang/FDA, utils/__init__.py), one channel at a time."""
    height, width = x.shape[:2]
    b = int(np.floor(min(height, width) * beta))
    out = np.empty_like(x)
    for c in range(x.shape[2]):
        mine, theirs = (np.fft.fftshift(np.fft.fft2(image[:, :, c])) for image in (x, other))
        size, phase = np.abs(mine), np.angle(mine)
        rows, columns = (slice(n // 2 - b, n // 2 + b + 1) for n in (height, width))
        size[rows, columns] = np.abs(theirs)[rows, columns]
        out[:, :, c] = np.fft.ifft2(np.fft.ifftshift(size * np.exp(1j * phase))).real
    return out


@pytest.mark.parametrize("shape", [(32, 32, 3), (31, 45, 1), (20, 33, 5)])
@pytest.mark.parametrize("beta", [0.0, 0.05, 0.3])
def test_fourier_equals_whole_transforms(shape, beta):
    random = np.random.default_rng(0)
    x, other = random.uniform(0, 255, (2, *shape))
    assert np.allclose(style.fourier(x, other, beta), by_whole_transforms(x, other, beta), atol=1e-8)
    assert np.allclose(style.fourier(x, x, beta), x, atol=1e-9)
    black = np.zeros(shape)  # no amplitude, hence no phase
    assert np.allclose(style.fourier(black, other, beta), by_whole_transforms(black, other, beta), atol=1e-8)


def test_statistics():
    random = np.random.default_rng(0)
    x, other = random.normal(100, 10, (20, 30, 4)), random.normal(150, 30, (20, 30, 4))
    out = style.statistics(x, other)
    assert np.allclose(out.mean((0, 1)), other.mean((0, 1))) and np.allclose(out.std((0, 1)), other.std((0, 1)))
    assert np.isclose(np.corrcoef(out[:, :, 2].ravel(), x[:, :, 2].ravel())[0, 1], 1)
    assert np.isfinite(style.statistics(np.full((4, 4, 1), 7.0), other[:4, :4, :1])).all()


def batches(source, views, world=1, workers=0, seed=0):
    """(crops, params) of two steps by image and step."""
    out = {}
    for rank in range(world):
        loader = Loader(source, views, seed=seed, global_batch=8, rank=rank, world=world, workers=workers)
        for step, (batch,) in enumerate(loader.stream(0, 2)):
            for b, i in enumerate(batch.ids.tolist()):
                out[step, i] = batch.crops[0][0, b].clone(), batch.params[0][0, b].clone()
    return out


def test_partners_in_the_loader(flat_folder):
    """The same on two ranks and in two workers; some images are styled, with the partner that the row names."""
    source = open_source(str(flat_folder), channels=3)
    views, plain = (
        multicrop(ViewsConfig(**{"global": k, "local": {"count": 0}})) for k in (KEYS, {**KEYS, "style": "none"})
    )
    whole, without = batches(source, views), batches(source, plain)
    for other in (batches(source, views, world=2), batches(source, views, workers=2)):
        assert whole.keys() == other.keys()
        assert all(torch.equal(a, b) for k in whole for a, b in zip(whole[k], other[k], strict=True))
    changed = [not torch.equal(whole[k][0], without[k][0]) for k in whole]
    rows = np.stack([whole[k][1].numpy() for k in whole])[:, STYLE]
    assert (rows[:, style.KIND] == 1).tolist() == changed and 4 < sum(changed) < 16
    key = next(k for k, c in zip(whole, changed, strict=True) if c)
    pick, beta = whole[key][1][STYLE][style.PICK].item(), whole[key][1][STYLE][style.BETA].item()
    other = source.read(style.partner(pick, len(source), key[1]))
    seen = torch.nn.functional.interpolate(
        torch.from_numpy(np.array(other)).permute(2, 0, 1)[None], size=24, mode="bicubic", antialias=True
    )
    image, seen = (t.permute(1, 2, 0).numpy().astype(float) for t in (without[key][0], seen[0]))
    expected = by_whole_transforms(image, seen, beta).clip(0, 255)
    assert np.abs(whole[key][0].permute(1, 2, 0).numpy() - expected).max() <= 0.501


def test_no_image_is_its_own_partner():
    picks = np.arange(1000) / 1000
    assert {style.partner(p, 10, 3) for p in picks} == set(range(10)) - {3}
    assert style.partner(0.99, 1, 0) == 0


# ------------------------------------------------------------------------------------------------------- image to image


class Negative(nn.Module):
    """An image-to-image network."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x):
        assert not self.training
        return self.one - x


class Smaller(nn.Module):
    """Gives another shape."""

    def forward(self, x):
        return x[..., ::2]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_module_as_an_operation(channels):
    view = {
        "count": 1,
        "size": 16,
        "blur": 0.0,
        "solarize": 0.0,
        "module": f"{__name__}:Negative",
        "module_probability": 0.5,
    }
    views = multicrop(ViewsConfig(**{"global": view, "local": {"count": 0}}))
    (module,) = modules.modules_of(resolutions(views), channels, "cpu")
    assert module is not None and not any(p.requires_grad for p in module.parameters())
    crops = torch.randint(0, 256, (1, 6, channels, 16, 16), dtype=torch.uint8)
    rows = np.zeros((6, P), np.float32)
    rows[:] = ViewParams(0, 0, 1, 1, 0, 0, -1, 1, 1, 1, 0, 0, 0, -1).pack()
    rows[:, COLUMN["module"]] = [1, 0, 1, 1, 0, 0]
    out = apply(crops, torch.from_numpy(rows)[None], (0.0,) * channels, (1 / 255,) * channels, "cpu", module=module)[0]
    for b, live in enumerate(rows[:, COLUMN["module"]]):
        assert torch.equal(out[b].round().byte(), 255 - crops[0, b] if live else crops[0, b])


@pytest.mark.parametrize(
    "name, words",
    [
        ("nowhere", "package.module:Class"),
        ("selfsup.nothing:X", "cannot be imported"),
        ("builtins:dict", "nn.Module is needed"),
        (f"{__name__}:Smaller", "keep their shape"),
        ("torch.nn:Sigmoid2", "cannot be imported"),
    ],
)
def test_what_is_no_module(name, words):
    with pytest.raises(UserError, match=words):
        modules.image_module(name, 3, torch.device("cpu"))
