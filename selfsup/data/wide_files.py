"""Files that hold more than 8 bits or four channels: TIFF of many bands, 16-bit colour PNG, DICOM; as they are stored.

Pillow opens such files in part: it gives the upper 8 bits of 16-bit colour, and refuses more than four interleaved bands.
tifffile (and imagecodecs, for LZW and the like) and pydicom are an extra, `selfsup[wide]`, imported when such a file comes.
"""

import importlib
import importlib.util
import io
import logging
import warnings
from types import ModuleType
from typing import Any

import numpy as np

from selfsup.data.arrays import BadImage, Limits

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_ORIENTATION = 274
_CT = (-1024.0, 3071.0)
"""Hounsfield units that 12 bits are used for: from below air to beyond dense bone."""

logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)  # it complains of the files that are read here


def is_tiff(data: bytes) -> bool:
    """Whether the bytes begin as a TIFF or BigTIFF does."""
    return data.startswith(TIFF_MAGIC)


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are a DICOM file with its preamble (PS3.10, section 7.1)."""
    return data[128:132] == b"DICM"


def png_channels(data: bytes) -> int:
    """Of a 16-bit PNG of several channels, which Pillow gives 8 bits of: how many; 0 for other files (PNG, section 11.2.1)."""
    if not data.startswith(b"\x89PNG") or len(data) < 26 or data[24] != 16:
        return 0
    return {2: 3, 4: 2, 6: 4}.get(data[25], 0)


def read_png(data: bytes) -> np.ndarray:
    """A 16-bit PNG as uint16 [H,W,C], by imagecodecs, or by torchvision as long as that has decoders."""
    if importlib.util.find_spec("imagecodecs") is not None:
        return importlib.import_module("imagecodecs").png_decode(data)
    try:
        from torchvision.io import ImageReadMode, decode_image
    except ImportError:
        raise BadImage("16-bit colour PNG files need imagecodecs: pip install 'selfsup[wide]'") from None
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
    return found.permute(1, 2, 0).numpy()  # [C,H,W] -> [H,W,C]


def open_tiff(data: bytes) -> Any:
    """tifffile's `TiffFile`. Raises BadImage without it, and what tifffile raises for what is none."""
    tifffile = _needed("tifffile", "TIFF files of many bands or of 16-bit colour")
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is said once, with its name
    return tifffile.TiffFile(io.BytesIO(data))


def read_tiff(data: bytes, max_pixels: int) -> np.ndarray:
    """The first series of a TIFF as it is stored, [H,W] or [H,W,C], upright.

    Overviews and further series (of a cloud-optimised GeoTIFF) are left alone. Raises BadImage for more than `max_pixels`
    pixels, before they are read.
    """
    with open_tiff(data) as file:
        if not file.series:
            raise BadImage("a TIFF without an image")
        first = file.series[0]
        sides = dict(zip(first.axes, first.shape, strict=True))
        height, width = sides.get("Y", 1), sides.get("X", 1)
        if height * width > max_pixels or first.nbytes > 8 * 64 * max_pixels:
            raise BadImage(f"more than max_pixels={max_pixels} pixels: {width}x{height}")
        array = np.asarray(first.asarray())
        tag = file.pages[0].tags.get(_ORIENTATION)
    if "Y" not in first.axes or "X" not in first.axes:
        raise BadImage(f"a TIFF of axes {first.axes}, shape {array.shape}; an image has Y and X")
    array = np.moveaxis(array, (first.axes.index("Y"), first.axes.index("X")), (0, 1))
    if array.ndim > 2:
        array = array.reshape(height, width, -1)
    return upright(array, int(tag.value) if tag is not None else 1)


def band_count(data: bytes) -> tuple[str, int]:
    """(type, channels) of a TIFF, without reading its pixels."""
    with open_tiff(data) as file:
        first = file.series[0]
        return str(first.dtype), int(
            np.prod([n for axis, n in zip(first.axes, first.shape, strict=True) if axis not in "YX"])
        )


def nodata_of(data: bytes) -> float | None:
    """The value that stands for nothing in a GeoTIFF, as GDAL notes it (tag 42113); None where there is no such note."""
    if not is_tiff(data):
        return None
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            noted = image.tag_v2.get(42113)  # type: ignore[attr-defined]
    except Exception:  # not for Pillow
        try:
            with open_tiff(data) as file:
                tag = file.pages[0].tags.get(42113)
                noted = None if tag is None else tag.value
        except Exception:  # what is wrong with it is said where its pixels are read
            return None
    try:
        return None if noted is None else float(str(noted).strip().strip("\0"))
    except ValueError:
        return None


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """[H,W] or [H,W,C] turned as the EXIF orientation 1..8 says."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def read_dicom(data: bytes, max_pixels: int) -> tuple[np.ndarray, Limits | None]:
    """(values [H,W], [H,W,3] or [frames,H,W]; the range that the file wants to be shown).

    Values are in the file's own unit (of a CT Hounsfield units, by the modality transformation; PS3.3, C.11.1). The range is
    its first window (C.11.2), or else of a CT -1024..3071, of others all that their bits can hold; None for colour, which has
    8 bits or the full 16.
    """
    pydicom = _needed("pydicom", "DICOM files")
    pixels = importlib.import_module("pydicom.pixels")
    found = pydicom.dcmread(io.BytesIO(data))
    if "PixelData" not in found:
        raise BadImage("a DICOM file without an image")
    if int(found.Rows) * int(found.Columns) > max_pixels:
        raise BadImage(f"more than max_pixels={max_pixels} pixels: {found.Columns}x{found.Rows}")
    kind = str(found.get("PhotometricInterpretation"))
    if kind == "PALETTE COLOR":
        raise BadImage("a DICOM file of palette colour, which is not read")
    array = pixels.pixel_array(found)  # colour as RGB
    if int(found.get("SamplesPerPixel", 1)) == 3:
        return array, None
    bits, signed = int(found.BitsStored), bool(found.PixelRepresentation)
    ends = np.array([-(1 << bits - 1), (1 << bits - 1) - 1] if signed else [0, (1 << bits) - 1])
    slope, shift = float(found.get("RescaleSlope", 1) or 1), float(found.get("RescaleIntercept", 0) or 0)
    values = np.asarray(pixels.apply_modality_lut(array, found), dtype=np.float32)
    low, high = sorted((ends * slope + shift).tolist()) if found.get("Modality") != "CT" else _CT
    centre, width = (_first(found.get(key)) for key in ("WindowCenter", "WindowWidth"))
    if centre is not None and width is not None and width > 1:
        low, high = centre - 0.5 - (width - 1) / 2, centre - 0.5 + (width - 1) / 2
    if kind == "MONOCHROME1":  # white is low: the same picture with black as its low end, whatever range it is seen by
        both = float((ends * slope + shift).sum())
        return both - values, (both - high, both - low)
    return values, (low, high)


def _first(value: Any) -> float | None:
    """Of a DICOM number that may be several, or absent."""
    if value is None or value == "":
        return None
    return float(value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value)


def _needed(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BadImage(f"{what} need {name}: pip install 'selfsup[wide]'") from None
