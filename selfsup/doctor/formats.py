"""What a stored image is: format, mode and channels, without decoding its pixels."""

import io
import os
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image

from selfsup.data.decode import BadImage, read_file
from selfsup.data.wide_files import band_count, is_dicom, is_tiff

_GREY_MODES = ("1", "L", "LA", "La", "I", "F")


def describe(raw: Any) -> tuple[str, str, int]:
    """(format, mode, channels as they are stored) of what `Source.raw` gives; channels 0 if that is not known."""
    if isinstance(raw, (str, os.PathLike)):
        try:
            raw = read_file(raw, 4, 100_000_000)
        except (OSError, BadImage):
            return "file", "?", 0
    if isinstance(raw, bytes):
        if raw.startswith(b"\x93NUMPY"):
            return "NPY", *_of_array(*_npy_header(raw))
        if is_dicom(raw):
            return "DICOM", "?", 1
        try:
            with warnings.catch_warnings(), Image.open(io.BytesIO(raw)) as image:
                warnings.simplefilter("ignore")
                pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
                mode, bands = image.mode, _bands(image.mode, len(image.getbands()))
                if image.format == "TIFF" and image.tag_v2.get(277, 1) > bands:  # type: ignore[attr-defined]
                    return _wide_tiff(raw)
                if pages > 1 and bands == 1:
                    return "TIFF", f"{mode} x {pages} pages", pages
                return image.format or "?", mode, bands
        except Exception:  # decoding it tells why
            return _wide_tiff(raw)
    if isinstance(raw, Image.Image):
        return "PIL image", raw.mode, _bands(raw.mode, len(raw.getbands()))
    if isinstance(raw, (np.ndarray, torch.Tensor)):
        return type(raw).__name__, *_of_array(tuple(raw.shape), str(raw.dtype))
    return type(raw).__name__, "?", 0


def _wide_tiff(raw: bytes) -> tuple[str, str, int]:
    """Of a TIFF of more bands than Pillow takes; nothing is known of others, and without tifffile."""
    if not is_tiff(raw):
        return "?", "?", 0
    try:
        dtype, bands = band_count(raw)
    except Exception:  # decoding it tells why
        return "TIFF", "?", 0
    return "TIFF", f"{dtype}, {bands} channels", bands


def _bands(mode: str, bands: int) -> int:
    return 1 if mode in _GREY_MODES or mode.startswith("I;16") else (3 if mode == "P" else bands)


def _npy_header(raw: bytes) -> tuple[tuple[int, ...], str]:
    stream = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except (ValueError, OSError):
        return (), "?"
    return shape, str(dtype)


def _of_array(shape: tuple[int, ...], dtype: str) -> tuple[str, int]:
    channels = 1 if len(shape) == 2 else (min(shape[0], shape[2]) if len(shape) == 3 else 0)
    return f"{dtype}, {channels} channels", channels
