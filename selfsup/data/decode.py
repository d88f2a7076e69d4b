"""Bytes of an image file -> pixels with the asked number of channels, or `BadImage` with the reason.

What becomes of which file:

- 1, 3 and 4 channels give PIL images of mode L, RGB, RGBA; any other number gives uint8 arrays [H,W,C].
- The EXIF orientation is applied. Of animations and multi-page files the first picture is used, unless there are as
  many single-band pages as channels: then the pages are the channels.
- Transparent pixels are composited over white, or over `background` (for 4 channels alpha is kept; files without it get
  alpha 255).
- 16-bit and float images and `.npy` arrays ([H,W], [H,W,C] or [C,H,W]) are mapped to levels by `value_range`, 0..255 or,
  with depth=16, 0..65535; its default is 0..65535 for uint16 (and PIL's mode I), 0..1 for floats, and of a DICOM file its own
  window. Values outside are clipped, NaN becomes the low end. 8-bit files of depth 16 give 257 times their levels.
- 16-bit colour (PNG, TIFF) gives all its bits with a `value_range` or depth=16; without, Pillow's upper 8.
- Grey <-> colour as PIL does: luma of ITU-R 601-2, or the grey value in three channels.
- A truncated file is refused, never filled with grey.
"""

import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from selfsup.data.arrays import WHITE, Limits, ValueRange, oriented, read_npy, to_levels, with_channels
from selfsup.data.arrays import BadImage as BadImage
from selfsup.data.arrays import Pixels as Pixels
from selfsup.data.arrays import to_uint8 as to_uint8
from selfsup.data.wide_files import is_dicom, is_tiff, png_channels, read_dicom, read_png, read_tiff, upright
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
    ".dcm",
)
"""What a folder is searched for, in any case."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MAGIC = ((b"\x89PNG", "PNG"), (b"\xff\xd8", "JPEG"))
_SYSTEM_ERRORS = (MemoryError, KeyboardInterrupt, SystemExit)


def decode(
    source: bytes | str | os.PathLike[str],
    channels: int = 3,
    max_pixels: int = 100_000_000,
    value_range: ValueRange | None = None,
    *,
    depth: int = 8,
    background: Sequence[int] = WHITE,
) -> Pixels:
    """Decode one image file (its bytes or its path).

    Returns a PIL image for 1, 3 or 4 channels, else a uint8 array [H,W,channels]; with depth=16 always uint16
    [H,W,channels]. Raises BadImage for every file that
    does not hold a complete image of at most `max_pixels` pixels and a convertible number of channels.
    """
    try:
        data = source if isinstance(source, bytes) else read_file(source, channels, max_pixels)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None
    if not data:
        raise BadImage("empty file (0 bytes)")
    with _reasons(data, max_pixels):
        if data.startswith(b"\x93NUMPY"):
            return from_array(read_npy(data), channels, max_pixels, value_range, depth=depth, background=background)
        wide = _wide(data, channels, max_pixels, depth != 8 or value_range is not None)
        if wide is not None:
            array, window = wide
            given = window if value_range is None else value_range
            return from_array(array, channels, max_pixels, given, depth=depth, background=background)
        return _decode_pil(data, channels, max_pixels, value_range, depth, background)
    raise AssertionError("unreachable")


def stored(
    data: bytes, channels: int | None, max_pixels: int = 100_000_000, background: Sequence[int] = WHITE
) -> np.ndarray:
    """The values of an image file before they are levels: [H,W], [H,W,C] or [C,H,W] of the file's own type.

    What `decode` maps by a value range, and would be mapped by none; of 8-bit files what it gives for so many channels, and for
    None the channels that are there. Raises BadImage as `decode`.
    """
    if not data:
        raise BadImage("empty file (0 bytes)")
    with _reasons(data, max_pixels):
        if data.startswith(b"\x93NUMPY"):
            return read_npy(data)
        wide = _wide(data, channels or 0, max_pixels, True)
        if wide is not None:
            return wide[0]
        with _opened(data, max_pixels) as (image, _):
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            if pages > 1 and channels in (None, pages) and len(image.getbands()) == 1:
                return _pages(image, pages, max_pixels, exact=True)
            image.load()
            turned = _upright(image)
            if _is_deep(turned):
                return _plane(turned, exact=True)
            if channels is None:
                grey, alpha = turned.mode in ("1", "L", "LA", "La"), turned.has_transparency_data
                channels = 1 if grey and not alpha else 4 if alpha else 3
            if channels in _MODES:
                return np.array(convert(turned, channels, background=background))
            return np.array(turned)
    raise AssertionError("unreachable")


@contextmanager
def _reasons(data: bytes, max_pixels: int) -> Iterator[None]:
    """What decoders raise (OSError, SyntaxError, ValueError, struct.error, EOFError, zlib.error, ...) becomes BadImage."""
    try:
        yield
    except (BadImage, UserError, *_SYSTEM_ERRORS):
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"more than max_pixels={max_pixels} pixels") from None
    except Exception as error:
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
    array: np.ndarray,
    channels: int,
    max_pixels: int = 100_000_000,
    value_range: ValueRange | None = None,
    *,
    depth: int = 8,
    background: Sequence[int] = WHITE,
) -> Pixels:
    """An array [H,W], [H,W,C] or [C,H,W] of any real type as `decode` gives it. Raises BadImage when it is no image."""
    array = oriented(array, channels, max_pixels)
    if value_range is not None and np.ndim(value_range) == 2 and array.shape[2] != channels and array.dtype != np.bool_:
        array = with_channels(array, channels, background)  # the ranges are those of the channels asked for
    array = to_levels(array, value_range, depth)
    found = array.shape[2]
    if depth != 8:
        return with_channels(array, channels, background)
    if found == channels:
        return Image.fromarray(array[:, :, 0] if channels == 1 else array) if channels in _MODES else array
    if channels not in _MODES or found not in (1, 2, 3, 4):
        raise BadImage(f"{found} channels where {channels} are asked for")
    if found == 2:  # grey and alpha
        both = Image.merge("LA", [Image.fromarray(np.ascontiguousarray(array[:, :, c])) for c in (0, 1)])
        return convert(both, channels, background=background)
    return convert(Image.fromarray(array[:, :, 0] if found == 1 else array), channels, background=background)


def convert(
    image: Image.Image, channels: int, value_range: ValueRange | None = None, background: Sequence[int] = WHITE
) -> Image.Image:
    """Any PIL image -> mode L (1), RGB (3) or RGBA (4); transparent pixels over `background` (red, green, blue)."""
    mode = _MODES[channels]
    if image.mode == mode:
        return image
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        array = np.asarray(image)
        if image.mode != "F":
            array = np.clip(array, 0, 65535).astype(np.uint16) if value_range is None else array.astype(np.int64)
        if value_range is not None and np.ndim(value_range) == 2:
            return from_array(array, channels, array.size, value_range)  # type: ignore[return-value]
        return convert(Image.fromarray(to_levels(array[:, :, None], value_range)[:, :, 0]), channels)
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
        below = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(below, image.convert("RGBA"))
        image = image.convert("RGB")
    if image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        image = image.convert("RGB")  # CMYK, YCbCr, HSV, RGBX
    return image if image.mode == mode else image.convert(mode)


def _decode_pil(
    data: bytes,
    channels: int,
    max_pixels: int,
    value_range: ValueRange | None,
    depth: int,
    background: Sequence[int],
) -> Pixels:
    with _opened(data, max_pixels) as (image, kind):
        if kind is None and channels > 1 and getattr(image, "n_frames", 1) == channels and len(image.getbands()) == 1:
            pages = _pages(image, channels, max_pixels, exact=value_range is not None)
            given = None if pages.dtype == np.uint8 else value_range
            return from_array(pages, channels, max_pixels, given, depth=depth)
        image.load()
        turned = image
        if kind not in ("PNG", "JPEG") or not image.info.keys().isdisjoint(("exif", "xmp", "XML:com.adobe.xmp")):
            turned = _upright(image)
        if depth != 8 and _is_deep(turned):
            return from_array(_plane(turned, value_range is not None), channels, max_pixels, value_range, depth=depth)
        if channels in _MODES:
            out = convert(turned, channels, value_range, background)
            if depth != 8:
                return from_array(np.asarray(out), channels, max_pixels, depth=depth)
            return (
                out.copy() if out is image and kind is None else out
            )  # a GIF or TIFF would go back to its closed file
        if len(turned.getbands()) == channels:  # two channels: LA
            return from_array(np.asarray(turned), channels, max_pixels, value_range, depth=depth)
        pages_found = getattr(image, "n_frames", 1)
        raise BadImage(f"{len(turned.getbands())} channels in {pages_found} page(s) where {channels} are asked for")


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[tuple[Image.Image, str | None]]:
    """The image of a file, undecoded, and whether it is PNG or JPEG (None: neither). Raises BadImage if it is too large."""
    kind = next((name for magic, name in _MAGIC if data.startswith(magic)), None)
    with _strict(max_pixels), _open(data, kind) as image:
        if image.width * image.height > max_pixels:
            raise BadImage(f"more than max_pixels={max_pixels} pixels: {image.width}x{image.height}")
        if kind == "JPEG":
            _check_jpeg_end(data)
        yield image, kind


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


def _pages(image: Image.Image, channels: int, max_pixels: int, exact: bool) -> np.ndarray:
    """Single-band pages as they are stored, one a channel: [H,W,channels]."""
    if image.width * image.height * channels > max_pixels * 4:
        raise BadImage(f"{channels} pages of {image.width}x{image.height} are more than max_pixels={max_pixels} allows")
    planes = []
    for page in range(channels):
        image.seek(page)
        planes.append(_plane(image, exact) if _is_deep(image) else np.asarray(convert(image, 1)))
        if planes[-1].shape != planes[0].shape:
            raise BadImage(f"page {page} has another size than page 0")
        if planes[-1].dtype != planes[0].dtype:
            raise BadImage(f"page {page} is {planes[-1].dtype}, page 0 {planes[0].dtype}")
    return np.stack(planes, axis=-1)  # [H,W,C]


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _plane(image: Image.Image, exact: bool) -> np.ndarray:
    """[H,W] of an image of mode I, F or I;16; unless `exact` the integers are taken for 16 bits."""
    array = np.asarray(image)
    return array if exact or image.mode == "F" else np.clip(array, 0, 65535).astype(np.uint16)


def _wide(data: bytes, channels: int, max_pixels: int, exact: bool) -> tuple[np.ndarray, Limits | None] | None:
    """(values, the range that the file itself names) of a file that Pillow cannot hold; None for all others.

    exact: 16-bit colour is one of them; else it is Pillow's, which gives its upper 8 bits.
    """
    if is_dicom(data):
        return read_dicom(data, max_pixels)
    if exact and png_channels(data):
        with _opened(data, max_pixels) as (image, _):
            turn = image.getexif().get(0x0112, 1)
        return upright(read_png(data), turn), None
    if not is_tiff(data):
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            bits, samples = (image.tag_v2.get(tag, 1) for tag in (258, 277))  # type: ignore[attr-defined]
            bands = len(image.getbands())
    except Image.UnidentifiedImageError:
        return read_tiff(data, max_pixels), None
    deep = samples > 1 and max(bits if isinstance(bits, tuple) else (bits,)) > 8
    if samples > 4 or (deep and exact) or (samples == channels and bands != channels):
        return read_tiff(data, max_pixels), None
    return None


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
