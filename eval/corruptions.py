"""Corruptions of images in the style of ImageNet-C (Hendrycks & Dietterich, 2019, section 3), in two strengths.

Own code and own draws: mild and strong are near levels 1 and 4 of the published set, with radii in proportion to the image's
side instead of 224 pixels, so figures are not those of ImageNet-C. Each is a function of (image in [0, 1] float64 [S, S, C],
strength, generator) and gives values that are cut to [0, 1] afterwards.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

Corruption = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def corrupted(pixels: np.ndarray, name: str, strength: str, rng: np.random.Generator) -> np.ndarray:
    """uint8 [S, S, C] -> the same, corrupted. name: of CORRUPTIONS; strength: 'mild' or 'strong'."""
    function, *values = CORRUPTIONS[name]
    out = function(pixels / 255.0, values[("mild", "strong").index(strength)], rng)
    return (out.clip(0, 1) * 255).round().astype(np.uint8)


def _gaussian_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(0, deviation, x.shape)


def _shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    draw = rng.uniform(size=x.shape)
    return np.where(draw < share / 2, 0.0, np.where(draw > 1 - share / 2, 1.0, x))


def _defocus_blur(x: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    r = radius * len(x) / 224 + 0.5  # half a pixel more, so that the smallest images are blurred too
    offsets = np.arange(-int(np.ceil(r)), int(np.ceil(r)) + 1)
    disk = np.clip(r + 0.5 - np.hypot(offsets[:, None], offsets), 0, 1)
    return _filtered(x, disk)


def _motion_blur(x: np.ndarray, length: float, rng: np.random.Generator) -> np.ndarray:
    half = max(1.0, length * len(x) / 448)
    size = int(np.ceil(half))
    angle, kernel = rng.uniform(0, np.pi), np.zeros((2 * size + 1, 2 * size + 1))
    for step in np.linspace(-half, half, 8 * size + 1):
        kernel[round(size + step * np.sin(angle)), round(size + step * np.cos(angle))] += 1
    return _filtered(x, kernel)


def _filtered(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    from scipy.ndimage import convolve

    return convolve(x, (kernel / kernel.sum())[:, :, None], mode="reflect")


def _fog(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Bright clouds, noise of every scale with amplitudes that halve, over an image that keeps its largest value."""
    size, clouds, weight = len(x), np.zeros(x.shape[:2]), 1.0
    cells = 2
    while cells <= size:
        noise = Image.fromarray(rng.uniform(size=(cells, cells)).astype(np.float32))
        clouds += weight * np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
        weight, cells = weight / 2, cells * 2
    clouds = (clouds - clouds.min()) / max(float(np.ptp(clouds)), 1e-12)
    top = x.max()
    return (x + amount * clouds[:, :, None]) * top / (top + amount)


def _brightness(x: np.ndarray, amount: float, rng: np.random.Generator) -> np.ndarray:
    return x + amount


def _contrast(x: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * factor + mean


def _pixelate(x: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    small = max(1, round(len(x) * factor))
    out = [
        Image.fromarray(layer.astype(np.float32))
        .resize((small, small), Image.Resampling.BOX)
        .resize((len(x), len(x)), Image.Resampling.NEAREST)
        for layer in x.transpose(2, 0, 1)
    ]
    return np.stack([np.asarray(layer, np.float64) for layer in out], axis=2)


def _jpeg(x: np.ndarray, quality: float, rng: np.random.Generator) -> np.ndarray:
    """Three channels as colours, others each as grey."""
    levels = (x * 255).round().astype(np.uint8)
    parts = [levels] if levels.shape[2] == 3 else [levels[:, :, i] for i in range(levels.shape[2])]
    out = []
    for part in parts:
        stored = io.BytesIO()
        Image.fromarray(part).save(stored, "JPEG", quality=int(quality))
        out.append(np.asarray(Image.open(stored)).reshape(*part.shape[:2], -1))
    return np.concatenate(out, axis=2) / 255.0


CORRUPTIONS: dict[str, tuple[Corruption, float, float]] = {
    "gaussian_noise": (_gaussian_noise, 0.08, 0.26),
    "shot_noise": (_shot_noise, 60, 5),
    "impulse_noise": (_impulse_noise, 0.03, 0.17),
    "defocus_blur": (_defocus_blur, 3, 8),
    "motion_blur": (_motion_blur, 10, 30),
    "fog": (_fog, 1.0, 2.5),
    "brightness": (_brightness, 0.1, 0.4),
    "contrast": (_contrast, 0.4, 0.1),
    "pixelate": (_pixelate, 0.6, 0.3),
    "jpeg": (_jpeg, 25, 10),
}
"""Name -> (function, mild, strong)."""
