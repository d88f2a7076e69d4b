"""Gaussian noise and salt and pepper: distribution, purity, and what is cut."""

import numpy as np
import pytest
import torch
from scipy import stats

from selfsup.config import ViewsConfig
from selfsup.data.noise import KEY, PART, SALT_KEY, STD
from selfsup.data.photometric import apply
from selfsup.data.views import NOISE, ViewParams, draw, multicrop

PLAIN = ViewParams(0, 0, 1, 1, 0, 0, -1, 1, 1, 1, 0, 0, 0, -1)


def levels(rows, channels=3, size=32, level=128, dtype=torch.float32):
    """What becomes of images of one level: float [N,C,S,S] in levels."""
    crops = torch.full((1, len(rows), channels, size, size), level, dtype=torch.uint8)
    packed = torch.from_numpy(np.stack([r.pack() for r in rows]))[None]
    out = apply(crops, packed, (0.5,) * channels, (0.25,) * channels, "cpu", dtype)[0]
    return (out * 0.25 + 0.5) * 255


@pytest.mark.parametrize("channels, size", [(1, 48), (3, 112), (13, 32)])
def test_gaussian(channels, size):
    """Normal of the row's own deviation, for each value; the key alone decides, not the place in the batch."""
    rows = [PLAIN._replace(noise_std=10, noise_key=5), PLAIN, PLAIN._replace(noise_std=3, noise_key=6)]
    out = levels(rows, channels, size)
    assert torch.allclose(out[1], torch.tensor(128.0), atol=1e-3)
    for image, std in ((out[0], 10), (out[2], 3)):
        values = ((image - 128) / std).flatten().double().numpy()
        assert stats.kstest(values, "norm").pvalue > 1e-4
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 4 / np.sqrt(len(values))
    assert torch.equal(levels(rows[::-1], channels, size)[2], out[0])
    assert levels([PLAIN._replace(noise_std=50, noise_key=1)], level=240).max() <= 255 + 1e-3


def test_salt_and_pepper():
    rows = [PLAIN._replace(salt_part=0.2, salt_key=9), PLAIN, PLAIN._replace(salt_part=0.2, salt_key=10)]
    out = levels(rows, 3, 128)
    salt, pepper = (out[0] > 254).float(), (out[0] < 1).float()
    for part in (salt, pepper):
        assert part.mean() == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 128**2))
        assert torch.equal(part[0], part[1]) and torch.equal(part[0], part[2])  # whole pixels
    assert ((out[0] - 128).abs() < 1e-3).float().mean() == pytest.approx(0.8, abs=0.02)
    assert torch.allclose(out[1], torch.tensor(128.0), atol=1e-3) and not torch.equal(out[0], out[2])
    assert torch.allclose(levels(rows, 3, 128, dtype=torch.float64)[0], out[0].double(), atol=1e-3)


def test_draws():
    view = multicrop(
        ViewsConfig(
            **{"global": {"noise": 0.5, "noise_std": (2, 8), "salt_pepper": 0.25, "salt_pepper_part": (0.01, 0.02)}}
        )
    )[1]
    n = 4000
    rows = draw(view, 0, np.zeros(n), np.arange(n), np.full((n, 2), 50))[:, NOISE]
    noisy, salted = rows[:, STD] > 0, rows[:, PART] > 0
    assert noisy.mean() == pytest.approx(0.5, abs=0.03) and salted.mean() == pytest.approx(0.25, abs=0.03)
    assert 2 <= rows[noisy, STD].min() < 2.1 and 7.9 < rows[noisy, STD].max() <= 8
    assert rows[salted, PART].min() >= 0.01 and rows[salted, PART].max() <= 0.02
    for live, key in ((noisy, KEY), (salted, SALT_KEY)):
        assert len(np.unique(rows[live, key])) > live.sum() - 10 and not rows[~live, key].any()
    with pytest.raises(ValueError, match="noise_std"):
        ViewsConfig(**{"global": {"noise_std": (9, 2)}})
