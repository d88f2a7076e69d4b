"""Whole images of any shape get what views get."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from selfsup.augment.colours import coloured
from selfsup.data.photometric import apply
from selfsup.data.views import ViewParams

PLAIN = ViewParams(0, 0, 1, 1, 0, 0, -1, 1, 1, 1, 0, 0, 0, -1)
FULL = PLAIN._replace(order=5, brightness=1.2, contrast=0.8, saturation=1.3, hue=0.07, sigma=1.4, solarize=200)


def image(height, width, channels=3):
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 100 * np.sin(x / (5 + c)) * np.cos(y / (9 - c)) for c in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_as_of_a_view(channels):
    """Square ones equal those of a batch, noise included."""
    pixels = image(40, 40, channels)
    params = FULL._replace(noise_std=7, noise_key=3, salt_part=0.05, salt_key=4, gray=0)
    crops = torch.from_numpy(pixels).permute(2, 0, 1)[None, None]
    row = torch.from_numpy(params.pack())[None, None]
    of_view = apply(crops, row, (0.0,) * channels, (1 / 255,) * channels, "cpu")[0, 0].permute(1, 2, 0).numpy()
    assert np.abs(coloured(pixels, params.pack()) - of_view).max() <= 0.51


@pytest.mark.parametrize("height, width", [(30, 70), (90, 20), (600, 40)])
def test_of_any_shape(height, width):
    """Blur of narrow images by products, of large ones by PIL: both are PIL's to two levels."""
    pixels = image(height, width)
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(1.7))
    expected = np.asarray(ImageOps.solarize(blurred, 150)).astype(int)
    got = coloured(pixels, PLAIN._replace(sigma=1.7, solarize=150).pack()).astype(int)
    near = np.abs(np.asarray(blurred).astype(int) - 150) > 2  # where a level more or less changes nothing
    assert np.abs(got - expected)[near].max() <= 2
    grey = coloured(pixels, PLAIN._replace(gray=1).pack())
    assert np.abs(grey[:, :, 0].astype(int) - np.asarray(Image.fromarray(pixels).convert("L"))).max() <= 1
    lit = coloured(pixels, PLAIN._replace(light_red=20, light_green=-10).pack()).astype(int)
    assert np.array_equal(lit, (pixels.astype(int) + np.array([20, -10, 0])).clip(0, 255))
