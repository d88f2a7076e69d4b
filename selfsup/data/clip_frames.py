"""Which frames of a video a clip has: see `clips` for the rules."""

import numpy as np

from selfsup.config import Crops, DataConfig
from selfsup.data.views import View, uniforms
from selfsup.randomness import mix

_TAG = 0xC119


def window(count: int, frames: int, stride: int) -> tuple[int, int]:
    """(stride, starts): what is left of the stride in a video of so many frames, and how many first frames there are."""
    if frames > 1:
        stride = max(1, min(stride, (count - 1) // (frames - 1)))
    return stride, max(1, count - (frames - 1) * stride)


def numbers(first: int, count: int, frames: int, stride: int) -> list[int]:
    """Of a clip; past the end the last frame is repeated."""
    return [min(first + k * stride, count - 1) for k in range(frames)]


def centred(count: int, frames: int, stride: int, clip: int = 0, clips: int = 1) -> list[int]:
    """Frames of clip number `clip` of `clips` evenly spaced ones; of one it is the middle."""
    stride, starts = window(count, frames, stride)
    return numbers(int((starts - 1) * (clip + 0.5) / clips), count, frames, stride)


def span(crops: Crops, config: DataConfig) -> tuple[int, int]:
    """(frames, stride) of a kind of views."""
    return crops.frames or config.frames or 1, crops.stride or config.stride


def drawn(view: View, config: DataConfig, seed: int, epoch: int, index: int, count: int) -> list[int]:
    """Frames of a view's clip of a video of `count` frames: a function of (seed, epoch, index, view) and the video."""
    frames, stride = span(view.crops, config)
    stride, starts = window(count, frames, stride)
    u = uniforms(mix(seed, _TAG), np.array([epoch]), np.array([index]), view.number, 1)
    return numbers(int(u[0, 0] * starts), count, frames, stride)
