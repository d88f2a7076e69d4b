"""Arrays as images: which axis is which, how many channels, and what becomes of their values.

A network sees levels: of 8 bits (0..255, `data.depth=8`) or of 16 (0..65535, `data.depth=16`), which a line maps the values
to. Its ends are `data.value_range`, one pair for all channels or one for each; by default 0..65535 for uint16 and 0..1 for
floats. Values outside are cut, NaN becomes the low end. `selfsup stats DATA` proposes a range.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

Pixels = Image.Image | np.ndarray
"""A PIL image of mode L, RGB or RGBA, or uint8 [H,W,C]; of `depth=16` always uint16 [H,W,C]."""

Limits = tuple[float, float]
ValueRange = Limits | Sequence[Limits]
"""(low, high) of all channels, or of each."""

WHITE = (255, 255, 255)
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2, as PIL's "L"
TYPES: dict[int, type[np.uint8] | type[np.uint16]] = {8: np.uint8, 16: np.uint16}
"""Of levels, by depth."""


class BadImage(Exception):
    """This image cannot be read; the message is the reason, without the file's name."""


def top(depth: int) -> int:
    """The highest level: 255 or 65535."""
    return (1 << depth) - 1


def oriented(array: np.ndarray, channels: int, max_pixels: int) -> np.ndarray:
    """[H,W], [H,W,C] or [C,H,W] -> [H,W,C], of the same type; `channels`, which are asked for, tell the last two apart.

    Raises BadImage when it is no image, or one of more than `max_pixels` pixels.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise BadImage(f"array of shape {array.shape}; an image is [H,W], [H,W,C] or [C,H,W]")
    if array.shape[2] != channels and (
        array.shape[0] == channels or (array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4))
    ):
        array = array.transpose(1, 2, 0)  # [C,H,W] -> [H,W,C]
    if array.shape[0] * array.shape[1] > max_pixels:
        raise BadImage(f"more than max_pixels={max_pixels} pixels: {array.shape[1]}x{array.shape[0]}")
    return array


def to_levels(array: np.ndarray, value_range: ValueRange | None = None, depth: int = 8) -> np.ndarray:
    """Any real array [...,C] -> contiguous levels of the same shape: uint8, or uint16 of depth=16.

    A range for each channel needs as many as the last axis is long. Raises BadImage for values that no range is known for.
    """
    high, kind = top(depth), TYPES[depth]
    if array.dtype == np.bool_:
        return np.where(np.ascontiguousarray(array), high, 0).astype(kind)
    if array.dtype.kind not in "uif":
        raise BadImage(f"array of type {array.dtype}; an image is uint8, uint16 or float")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if value_range is None:
        value_range = _usual(array.dtype)
    if array.dtype == kind and value_range == (0, high):
        return np.ascontiguousarray(array)
    limits = np.asarray(value_range, dtype=np.float64)  # [2] or [C,2]
    if limits.ndim == 2 and (array.ndim < 2 or array.shape[-1] != len(limits)):
        found = array.shape[-1] if array.ndim == 3 else 1
        raise BadImage(f"data.value_range has {len(limits)} ranges for {found} channels")
    low, span = limits[..., 0], limits[..., 1] - limits[..., 0]
    with np.errstate(all="ignore"):  # infinities
        scaled = (array.astype(np.float64) - low) * (high / span)
    if array.dtype.kind == "f":
        nan = np.isnan(scaled)
        if nan.all():
            raise BadImage("every value is NaN")
        scaled[nan] = 0.0
    return np.ascontiguousarray(np.rint(np.clip(scaled, 0, high)).astype(kind))


def to_uint8(array: np.ndarray, value_range: ValueRange | None = None) -> np.ndarray:
    """`to_levels` of 8 bits."""
    return to_levels(array, value_range)


def _usual(dtype: np.dtype) -> Limits:
    if dtype.kind == "f":
        return 0.0, 1.0
    if dtype in (np.uint8, np.uint16):
        return 0.0, float(np.iinfo(dtype).max)
    raise BadImage(f"array of type {dtype}: give data.value_range=[low, high]")


def with_channels(array: np.ndarray, channels: int, background: Sequence[int] = WHITE) -> np.ndarray:
    """[H,W,C] of levels or other values -> [H,W,channels], as PIL has it for 8 bits: for 1 to 4 channels on both sides.

    Two channels are grey and alpha, four are colour and alpha; without a place for alpha it is composed over `background`
    (8-bit red, green, blue). Grey is repeated, colour becomes luma. Integers are full at their type's largest value, floats
    at 1. Raises BadImage for other numbers of channels.
    """
    found, dtype = array.shape[2], array.dtype
    if found == channels:
        return array
    if channels not in (1, 3, 4) or found not in (1, 2, 3, 4):
        raise BadImage(f"{found} channels where {channels} are asked for")
    full = 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)
    colour, alpha = array.astype(np.float64), None
    if found in (2, 4):
        colour, alpha = colour[:, :, :-1], colour[:, :, -1:]
    if channels == 4:
        alpha = np.full((*array.shape[:2], 1), full) if alpha is None else alpha
        out = np.concatenate([np.broadcast_to(colour, (*array.shape[:2], 3)), alpha], axis=2)
    else:
        if alpha is not None:
            below = np.asarray(background) * (full / 255)  # [3]
            colour = colour * (alpha / full) + below * (1 - alpha / full)  # grey becomes colour if the background is
        if channels == 1 and colour.shape[2] == 3:
            colour = (colour @ LUMA)[:, :, None]
        out = np.broadcast_to(colour, (*array.shape[:2], channels))
    return np.ascontiguousarray(out if dtype.kind == "f" else np.rint(out), dtype=dtype)


def eight_bits(pixels: Pixels) -> Pixels:
    """Levels of 16 bits, rounded to 8; others as they are: for pictures, and for what knows 8 bits alone."""
    if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint16:
        return np.rint(pixels / 257).astype(np.uint8)
    return pixels


def read_npy(data: bytes) -> np.ndarray:
    """The array of an .npy file's bytes, without copying them. Raises BadImage for objects, which are never unpickled."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise BadImage("an .npy file of Python objects; an image is uint8, uint16 or float")
    start, count = stream.tell(), math.prod(shape)
    if start + count * dtype.itemsize > len(data):
        raise BadImage(f"truncated: {len(data)} of {start + count * dtype.itemsize} bytes")
    array = np.frombuffer(data, dtype, count, start) if count else np.zeros(0, dtype)
    return array.reshape(shape, order="F" if fortran else "C")
