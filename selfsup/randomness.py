"""Random numbers that are pure functions of what they are for.

Nothing in training draws from a global generator. Host-side draws (crops, colour, order) come from a counter-based
Philox generator keyed by integers such as (seed, epoch, sample, view); device-side draws (drop path, dropout, masks)
come from an integer hash of (key, index), so that the number of workers, ranks, micro-batches or the point of a resume
never changes what is drawn.
"""

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """Hash integers to 64 bits; order matters. (SplitMix64 finaliser, Steele et al., 2014, chained.)"""
    h = 0x9E3779B97F4A7C15
    for part in parts:
        h = (h ^ (part & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB & _MASK
        h ^= h >> 31
    return h


def generator(*key: int) -> np.random.Generator:
    """A numpy generator that depends on `key` alone."""
    return np.random.Generator(np.random.Philox(key=mix(*key)))


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keyed_uniform(key: int, index: Tensor) -> Tensor:
    """Uniform float32 in [0, 1) for each int64 in `index`, on its device; bitwise equal on every device.

    key: from `mix`. index: any shape. The 24 bits used make every value exact in float32.
    """
    return _shift(_keyed(key, index), 40).to(torch.float32) * (1.0 / (1 << 24))


def keyed_integers(key: int, index: Tensor, below: int) -> Tensor:
    """Uniform int64 in [0, below) for each int64 in `index`, on its device; bitwise equal on every device.

    48 bits modulo `below`: for a hundred million values some are more likely than others by one in two millions.
    """
    return _shift(_keyed(key, index), 16) % below


def _keyed(key: int, index: Tensor) -> Tensor:
    """SplitMix64's number `index` of the sequence that begins at `key`: int64, all bits random."""
    h = (index + _signed(key)) * _signed(0x9E3779B97F4A7C15)
    h = (h ^ _shift(h, 30)) * _signed(0xBF58476D1CE4E5B9)
    h = (h ^ _shift(h, 27)) * _signed(0x94D049BB133111EB)
    return h ^ _shift(h, 31)


def keyed_normal(key: int, index: Tensor) -> Tensor:
    """Standard normal float32 for each int64 in `index`, from two uniform ones (Box & Muller, 1958)."""
    radius = torch.sqrt(-2 * torch.log1p(-keyed_uniform(mix(key, 0), index)))  # of (0, 1]
    return radius * torch.cos(2 * torch.pi * keyed_uniform(mix(key, 1), index))
