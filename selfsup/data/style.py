"""The style of another image: its low frequencies, or the statistics of its channels.

fourier: Yang & Soatto, 2020, "FDA: Fourier Domain Adaptation for Semantic Segmentation", equation 5: the amplitude of the
low frequencies comes from the other image, the phase stays. The low frequencies are a square of 2 b + 1, b = beta times the
shorter side; only these are computed. statistics: Huang & Belongie, 2017, "Arbitrary Style Transfer in Real-time with
Adaptive Instance Normalization", equation 8, on the pixels instead of features: each channel takes the other's mean and
standard deviation (Reinhard et al., 2001, "Color Transfer between Images", without its colour space).

Which image that is is drawn with everything else, from (seed, epoch, image, view) alone. This happens in the loader's
workers, where any image of the data set can be read.
"""

import numpy as np

from selfsup.config import Crops

_WHETHER, _PICK, _BETA, DRAWS = range(4)
KIND, PICK, BETA = range(3)
"""Columns of what `drawn` gives."""

NONE, FOURIER, STATISTICS = range(3)
_PICKS = 1 << 24  # steps that float32 holds


def drawn(u: np.ndarray, crops: Crops) -> np.ndarray:
    """Uniform u [B,DRAWS] -> [B,3]: which style (0: none), which image as a fraction of all, and beta."""
    low, high = crops.fourier_beta
    live = u[:, _WHETHER] < crops.style_probability
    kind = np.full(len(u), ("none", "fourier", "statistics").index(crops.style))
    pick, beta = np.floor(u[:, _PICK] * _PICKS) / _PICKS, low + u[:, _BETA] * (high - low)
    return np.stack([kind, pick, beta], axis=1) * live[:, None]


def partner(pick: float, count: int, itself: int | None) -> int:
    """The number of the other image among `count`; never the image itself where there are others."""
    found = int(pick * count)
    return (found + 1) % count if found == itself else found


def styled(image: np.ndarray, other: np.ndarray, kind: int, beta: float) -> np.ndarray:
    """uint8 [H,W,C] in the style of another of that shape."""
    x, y = image.astype(np.float64), other.astype(np.float64)
    out = fourier(x, y, beta) if kind == FOURIER else statistics(x, y)
    return np.rint(out).clip(0, 255).astype(np.uint8)


def fourier(x: np.ndarray, other: np.ndarray, beta: float) -> np.ndarray:
    """float64 [H,W,C] with the amplitudes of `other` at frequencies up to floor(beta * min(H, W)) along both axes."""
    height, width = x.shape[:2]
    reach = int(np.floor(beta * min(height, width)))
    down, across = _waves(reach, height), _waves(reach, width)  # [K,H], [K,W]
    mine, theirs = (np.einsum("kh,hwc,lw->klc", down, image, across, optimize=True) for image in (x, other))
    size = np.abs(mine)
    phase = np.where(size > 0, mine / np.where(size > 0, size, 1), 1)
    change = (np.abs(theirs) - size) * phase
    added = np.einsum("kh,klc,lw->hwc", down.conj(), change, across.conj(), optimize=True)
    return x + added.real / (height * width)


def _waves(reach: int, length: int) -> np.ndarray:
    """The rows of a discrete Fourier transform for frequencies -reach..reach: complex128 [2 reach + 1, length]."""
    return np.exp(-2j * np.pi * np.outer(np.arange(-reach, reach + 1), np.arange(length)) / length)


def statistics(x: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64 [H,W,C] with the mean and the standard deviation of each channel of `other`."""
    spread = x.std((0, 1))
    return (x - x.mean((0, 1))) / np.where(spread > 0, spread, 1) * other.std((0, 1)) + other.mean((0, 1))
