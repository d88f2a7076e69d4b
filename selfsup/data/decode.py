"""Bytes of an image file -> pixels with the asked number of channels, or `BadImage` with the reason.

What becomes of which file:

- 1, 3 and 4 channels give PIL images of mode L, RGB, RGBA; any other number gives uint8 arrays [H,W,C].
- The EXIF orientation is applied. Of animations and multi-page files the first picture is used, unless there are as
  many single-band pages as channels: then the pages are the channels.
- Transparent pixels are composited over white (for 4 channels alpha is kept; files without it get alpha 255).
- 16-bit and float images and `.npy` arrays ([H,W], [H,W,C] or [C,H,W]) are mapped to 0..255 by `value_range`;
  its default is 0..65535 for uint16 (and PIL's mode I), 0..1 for floats. Values outside are clipped, NaN becomes the low end.
- Grey <-> colour as PIL does: luma of ITU-R 601-2, or the grey value in three channels.
- A truncated file is refused, never filled with grey.
"""

import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from selfsup.errors import UserError
from selfsup.wording import one_line

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".gif",
    ".npy",
    ".jfif",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
)
"""What a folder is searched for, in any case."""

Pixels = Image.Image | np.ndarray
"""A PIL image of mode L, RGB or RGBA, or uint8 [H,W,C]."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MAGIC = ((b"\x89PNG", "PNG"), (b"\xff\xd8", "JPEG"))
_SYSTEM_ERRORS = (MemoryError, KeyboardInterrupt, SystemExit)


class BadImage(Exception):
    """This image cannot be read; the message is the reason, without the file's name."""


def decode(
    source: bytes | str | os.PathLike[str],
    channels: int = 3,
    max_pixels: int = 100_000_000,
    value_range: tuple[float, float] | None = None,
) -> Pixels:
    """Decode one image file (its bytes or its path).

    Returns a PIL image for 1, 3 or 4 channels, else a uint8 array [H,W,channels]. Raises BadImage for every file that
    does not hold a complete image of at most `max_pixels` pixels and a convertible number of channels.
    """
    try:
        data = source if isinstance(source, bytes) else read_file(source, channels, max_pixels)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None
    if not data:
        raise BadImage("empty file (0 bytes)")
    try:
        if data.startswith(b"\x93NUMPY"):
            return from_array(_npy(data, max_pixels), channels, max_pixels, value_range)
        return _decode_pil(data, channels, max_pixels, value_range)
    except (BadImage, UserError):
        raise
    except _SYSTEM_ERRORS:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"more than max_pixels={max_pixels} pixels") from None
    except (
        Exception
    ) as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, zlib.error, ...
        raise BadImage(_reason(data, error)) from None


def read_file(path: str | bytes | os.PathLike[str], channels: int, max_pixels: int) -> bytes:
    """A file's bytes. Raises OSError, and BadImage for what is no file or larger than any image of `max_pixels` pixels."""
    try:
        # a pipe without a writer would be waited for
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0))
    except ValueError as error:  # a NUL in the name
        raise BadImage(f"cannot be read: {error}") from None
    with open(handle, "rb") as file:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            raise BadImage("a folder, a device or a pipe, and no file")
        check_bytes(info.st_size, channels, max_pixels)
        return file.read()


def check_bytes(size: int, channels: int, max_pixels: int) -> None:
    """Raise BadImage if a file of `size` bytes cannot be an image of at most `max_pixels` pixels of eight bytes a channel."""
    if size > 8 * max(4, channels) * max_pixels + 10_000_000:
        raise BadImage(f"{size} bytes, more than an image of max_pixels={max_pixels} has")


def from_array(
    array: np.ndarray, channels: int, max_pixels: int = 100_000_000, value_range: tuple[float, float] | None = None
) -> Pixels:
    """An array [H,W], [H,W,C] or [C,H,W] of any real type as `decode` gives it. Raises BadImage when it is no image."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise BadImage(f"array of shape {array.shape}; an image is [H,W], [H,W,C] or [C,H,W]")
    if array.shape[2] != channels and (
        array.shape[0] == channels or (array.shape[0] in _MODES and array.shape[2] not in _MODES)
    ):
        array = array.transpose(1, 2, 0)  # [C,H,W] -> [H,W,C]
    if array.shape[0] * array.shape[1] > max_pixels:
        raise BadImage(f"more than max_pixels={max_pixels} pixels: {array.shape[1]}x{array.shape[0]}")
    array = to_uint8(array, value_range)
    found = array.shape[2]
    if found == channels:
        return Image.fromarray(array[:, :, 0] if channels == 1 else array) if channels in _MODES else array
    if channels not in _MODES or found not in (1, 2, 3, 4):
        raise BadImage(f"{found} channels where {channels} are asked for")
    if found == 2:  # grey and alpha
        return convert(
            Image.merge("LA", [Image.fromarray(np.ascontiguousarray(array[:, :, c])) for c in (0, 1)]), channels
        )
    return convert(Image.fromarray(array[:, :, 0] if found == 1 else array), channels)


def to_uint8(array: np.ndarray, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Any real array -> contiguous uint8 of the same shape, by `value_range` or its type's default."""
    if array.dtype == np.uint8 and value_range in (None, (0, 255)):
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return np.ascontiguousarray(array).astype(np.uint8) * 255
    if array.dtype.kind not in "uif":
        raise BadImage(f"array of type {array.dtype}; an image is uint8, uint16 or float")
    if value_range is None:
        if array.dtype.kind == "f":
            value_range = (0.0, 1.0)
        elif array.dtype == np.uint16:
            value_range = (0.0, 65535.0)
        else:
            raise BadImage(f"array of type {array.dtype}: give data.value_range=[low, high]")
    low, high = value_range
    with np.errstate(all="ignore"):  # infinities
        scaled = (array.astype(np.float64) - low) * (255.0 / (high - low))
    if array.dtype.kind == "f":
        nan = np.isnan(scaled)
        if nan.all():
            raise BadImage("every value is NaN")
        scaled[nan] = 0.0
    return np.ascontiguousarray(np.rint(np.clip(scaled, 0, 255)).astype(np.uint8))


def convert(image: Image.Image, channels: int, value_range: tuple[float, float] | None = None) -> Image.Image:
    """Any PIL image -> mode L (1), RGB (3) or RGBA (4)."""
    mode = _MODES[channels]
    if image.mode == mode:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image)
        if image.mode != "F":
            array = np.clip(array, 0, 65535).astype(np.uint16) if value_range is None else array.astype(np.int64)
        return convert(Image.fromarray(to_uint8(array, value_range)), channels)
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        transformed = ImageCms.applyTransform(image, to_rgb)
        assert transformed is not None  # None only for in-place transforms
        image = transformed
    if image.mode in ("La", "RGBa"):  # premultiplied
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if image.mode == "P" or image.mode == "PA":
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    elif "transparency" in image.info and image.mode in ("1", "L", "RGB"):
        image = image.convert("RGBA")
    if image.mode in ("LA", "RGBA") and mode != "RGBA":
        background = Image.new(image.mode, image.size, (255,) * len(image.getbands()))
        image = Image.alpha_composite(background.convert("RGBA"), image.convert("RGBA"))
        image = image.convert("RGB")
    if image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")  # CMYK, YCbCr, HSV, RGBX
    return image if image.mode == mode else image.convert(mode)


def _decode_pil(data: bytes, channels: int, max_pixels: int, value_range: tuple[float, float] | None) -> Pixels:
    kind = next((name for magic, name in _MAGIC if data.startswith(magic)), None)
    with _strict(max_pixels), _open(data, kind) as image:
        if image.width * image.height > max_pixels:
            raise BadImage(f"more than max_pixels={max_pixels} pixels: {image.width}x{image.height}")
        if kind == "JPEG":
            _check_jpeg_end(data)
        if kind is None and channels > 1 and getattr(image, "n_frames", 1) == channels and len(image.getbands()) == 1:
            pages = _pages(image, channels, max_pixels, value_range)
            return Image.fromarray(pages) if channels in _MODES else pages
        image.load()
        upright = image
        if kind not in ("PNG", "JPEG") or not image.info.keys().isdisjoint(("exif", "xmp", "XML:com.adobe.xmp")):
            upright = _upright(image)
        if channels in _MODES:
            out = convert(upright, channels, value_range)
            return (
                out.copy() if out is image and kind is None else out
            )  # a GIF or TIFF would go back to its closed file
        if len(upright.getbands()) == channels:  # two channels: LA
            return from_array(np.asarray(upright), channels, max_pixels, value_range)
        pages_found = getattr(image, "n_frames", 1)
        raise BadImage(f"{len(upright.getbands())} channels in {pages_found} page(s) where {channels} are asked for")


def _open(data: bytes, kind: str | None) -> Image.Image:
    stream: IO[bytes] = io.BytesIO(data)
    try:
        return Image.open(stream, formats=(kind,) if kind else None)
    except Image.UnidentifiedImageError:
        if kind == "JPEG":  # MPO and the like announce themselves later in the file
            stream.seek(0)
            return Image.open(stream)
        raise


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata raises anything; the pixels are whole
        return image


def _pages(image: Image.Image, channels: int, max_pixels: int, value_range: tuple[float, float] | None) -> np.ndarray:
    if image.width * image.height * channels > max_pixels * 4:
        raise BadImage(f"{channels} pages of {image.width}x{image.height} are more than max_pixels={max_pixels} allows")
    planes = []
    for page in range(channels):
        image.seek(page)
        planes.append(np.asarray(convert(image, 1, value_range)))
        if planes[-1].shape != planes[0].shape:
            raise BadImage(f"page {page} has another size than page 0")
    return np.ascontiguousarray(np.stack(planes, axis=-1))  # [H,W,C]


def _npy(data: bytes, max_pixels: int) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise BadImage("an .npy file of Python objects; an image is uint8, uint16 or float")
    expected = stream.tell() + math.prod(shape) * dtype.itemsize
    if expected > len(data):
        raise BadImage(f"truncated: {len(data)} of {expected} bytes")
    return np.load(io.BytesIO(data), allow_pickle=False)


def _check_jpeg_end(data: bytes) -> None:
    """libjpeg decodes a tail of zeros (a download that was allocated, not written) as grey without an error."""
    start = _jpeg_scan(data)
    if data.find(b"\xff\xd9", start) < 0 and data.endswith(bytes(16)):
        raise BadImage("truncated: the file ends in zeros without an end-of-image marker")


def _jpeg_scan(data: bytes) -> int:
    """Where the first scan begins; embedded thumbnails, which have their own end marker, lie before it."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:
            return at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0


@contextmanager
def _strict(max_pixels: int) -> Iterator[None]:
    """Truncated files raise and `max_pixels` decides alone, whatever another library set in PIL's globals."""
    limit = Image.MAX_IMAGE_PIXELS  # PIL refuses twice as many
    if not ImageFile.LOAD_TRUNCATED_IMAGES and limit is not None and max_pixels <= 2 * limit:
        yield
        return
    before: tuple[Any, Any] = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def _reason(data: bytes, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        start = data[:200].lstrip().lower()
        if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
            return "not an image but HTML or XML"
        return f"not an image; starts with {data[:8]!r}"
    return f"broken: {one_line(error) or type(error).__name__}"
