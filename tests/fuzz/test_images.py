"""Bytes that are nearly images: pixels, or BadImage with a reason of one line; never another exception, never much memory."""

import io
import itertools
import resource
import struct
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from selfsup.config import Crops, DataConfig, ViewsConfig
from selfsup.data import decode as decoding
from selfsup.data.decode import BadImage, decode
from selfsup.data.views import crop, multicrop, sample_params
from tests.fuzz.cases import Edit, edits, fuzz

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
MOST = 1_000_000
VIEW = multicrop(ViewsConfig(**{"global": Crops(size=8), "local": Crops(count=0)}))[0]


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _array(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version)
    return out.getvalue()


def _bases() -> dict[str, bytes]:
    """Small files of every kind that is read."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8))
    rgba = Image.fromarray(rng.integers(0, 255, (20, 24, 4), np.uint8))
    grey, deep = rgb.convert("L"), Image.fromarray(rng.integers(0, 65535, (20, 24), np.uint16))
    real = Image.fromarray(rng.random((20, 24), np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    pages = [Image.fromarray(rng.integers(0, 255, (20, 24), np.uint8)) for _ in range(3)]
    found = {
        "rgb.png": _saved(rgb, "PNG"),
        "palette.png": _saved(rgb.convert("P"), "PNG", transparency=3),
        "deep.png": _saved(deep, "PNG"),
        "one bit.png": _saved(rgb.convert("1"), "PNG"),
        "exif.png": _saved(rgba, "PNG", exif=exif),
        "animated.png": _saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(9)]),
        "rgb.jpg": _saved(rgb, "JPEG", exif=exif),
        "grey.jpg": _saved(grey, "JPEG"),
        "cmyk.jpg": _saved(rgb.convert("CMYK"), "JPEG"),
        "progressive.jpg": _saved(rgb, "JPEG", progressive=True, optimize=True),
        "several.jpg": _saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        "plain.tif": _saved(rgb, "TIFF"),
        "deflate.tif": _saved(rgb, "TIFF", compression="tiff_adobe_deflate"),
        "lzw.tif": _saved(deep, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": _saved(rgb, "TIFF", compression="jpeg"),
        "float.tif": _saved(real, "TIFF"),
        "lab.tif": _saved(Image.new("LAB", (24, 20), (50, 20, 30)), "TIFF"),
        "pages.tif": _saved(pages[0], "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw"),
        "one.gif": _saved(rgb.convert("P"), "GIF"),
        "animated.gif": _saved(grey, "GIF", save_all=True, append_images=pages, loop=0),
        "rgb.webp": _saved(rgba, "WEBP"),
        "animated.webp": _saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(9)]),
        "rgb.bmp": _saved(rgb, "BMP"),
        "rgb.ppm": _saved(rgb, "PPM"),
        "rgb.jp2": _saved(rgb, "JPEG2000"),
        "rgb.avif": _saved(rgb, "AVIF"),
    }
    for name in ("uint8", "uint16", "float32", "float64", "bool", "int64", "complex64"):
        found[f"{name}.npy"] = _array((rng.random((20, 24, 3)) * 200).astype(name))
    for n, version in enumerate([(1, 0), (2, 0), (3, 0)]):
        found[f"version {n}.npy"] = _array(np.asfortranarray(rng.random((5, 20, 24))), version)
    return found


BASES = _bases()


def check(data: bytes, channels: int, most: int = MOST, value_range: tuple[float, float] | None = None) -> bool:
    """Decode and crop, or be told why not in one line; whether there were pixels."""
    try:
        pixels = decode(data, channels, most, value_range)
    except BadImage as error:
        assert 0 < len(str(error)) <= 400 and "\n" not in str(error), str(error)
        return False
    if isinstance(pixels, np.ndarray):
        assert channels not in (1, 3, 4) and pixels.dtype == np.uint8 and pixels.shape[2] == channels
        height, width = pixels.shape[:2]
    else:
        assert pixels.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        width, height = pixels.size
    assert 0 < width * height <= most
    out = crop(pixels, sample_params(VIEW, 0, 0, 0, height, width), VIEW.size)
    assert out.dtype == np.uint8 and out.size == 8 * 8 * channels
    return True


CHANNELS = st.sampled_from([1, 3, 3, 4, 2, 5])
RANGES = st.sampled_from([None, None, (0.0, 1.0), (-3.0, 1e9)])


@pytest.mark.parametrize("name", BASES)
def test_they_are_images_before(name: str) -> None:
    """Or nothing below would be near one."""
    if name.startswith(("int64", "complex64")):
        assert check(BASES[name], 3, value_range=(0.0, 200.0)) == name.startswith("int64")
    else:
        assert check(BASES[name], 5 if "version" in name else 3)


@fuzz(1500, name=st.sampled_from(sorted(BASES)), edit=edits(), channels=CHANNELS, value_range=RANGES)
def test_edited(name: str, edit: Edit, channels: int, value_range: tuple[float, float] | None) -> None:
    check(edit(BASES[name]), channels, value_range=value_range)


@fuzz(
    150,
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\x00", b"MM\x00*", b"GIF89a", b"RIFF",
                           b"BM",
                           b"\x93NUMPY\x01\x00", b"P6\n", b"\x00\x00\x00\x0cjP  ", b"8BPS", b"\x00\x00\x01\x00"]),
    rest=st.binary(max_size=300),
    channels=CHANNELS,
)  # fmt: skip
def test_random_bytes(start: bytes, rest: bytes, channels: int) -> None:
    check(start + rest, channels)


@fuzz(100, names=st.tuples(*[st.sampled_from(sorted(BASES))] * 2), at=st.floats(0, 1), channels=CHANNELS)
def test_half_of_one_and_half_of_another(names: tuple[str, str], at: float, channels: int) -> None:
    a, b = (BASES[name] for name in names)
    check(a[: int(at * len(a))] + b[int(at * len(b)) :], channels)


def chunked(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, with right lengths and checksums."""
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@fuzz(
    150,
    size=st.tuples(*[st.sampled_from([0, 1, 7, 24, 1000, 65_535, 2**31 - 1, 2**32 - 1])] * 2),
    depth=st.sampled_from([1, 2, 4, 8, 16, 3]),
    colour=st.sampled_from([0, 2, 3, 4, 6, 5]),
    interlace=st.sampled_from([0, 1, 2]),
    extra=st.lists(
        st.tuples(st.sampled_from([b"PLTE", b"tRNS", b"iCCP", b"eXIf", b"zTXt", b"iTXt", b"acTL", b"fcTL", b"gAMA",
                                   b"pHYs"]),
                  st.binary(max_size=60)), max_size=3),
    rows=st.binary(max_size=400),
    channels=CHANNELS,
)  # fmt: skip
def test_pngs_with_true_checksums(size, depth, colour, interlace, extra, rows, channels) -> None:
    head = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlace)
    check(chunked((b"IHDR", head), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")), channels)


SIZES = st.sampled_from([0, 1, -1, 3, 20, 10**4, 2**31, 2**32 + 1, 2**62, 2**63, 2**64 + 3, 10**40])


@fuzz(
    150,
    shape=st.lists(SIZES, max_size=4),
    kind=st.sampled_from(
        ["|u1", "<u2", "<f4", "<f8", "|b1", "<c8", "|O", "|V0", "|S0", "<U9999999", "<M8[s]", "f4,f4"]
    ),
    order=st.sampled_from(["False", "True", "None", "7"]),
    version=st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x04\x00"]),
    rest=st.binary(max_size=100),
    channels=CHANNELS,
)
def test_arrays_of_strange_shapes(shape, kind, order, version, rest, channels) -> None:
    text = f"{{'descr': {kind!r}, 'fortran_order': {order}, 'shape': {tuple(shape)!r}, }}\n".encode()
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    check(b"\x93NUMPY" + version + length + text + rest, channels)


def declared(kind: str, width: int, height: int) -> bytes:
    """A few bytes that say they are this large."""
    if kind == "png":
        head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return chunked((b"IHDR", head), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    if kind == "gif":
        return b"GIF89a" + struct.pack("<HH", min(width, 65535), min(height, 65535)) + BASES["one.gif"][10:]
    if kind == "bmp":
        return (
            BASES["rgb.bmp"][:18]
            + struct.pack("<ii", min(width, 2**31 - 1), min(height, 2**31 - 1))
            + BASES["rgb.bmp"][26:]
        )
    if kind == "ppm":
        return b"P6 %d %d 255\n" % (width, height) + bytes(1000)
    if kind == "npy":
        text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({height}, {width}, 3), }}\n".encode()
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(1000)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1,
                                                                                                         200),
               (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 1000)]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(entries)) + table + bytes(1200)


LARGE = [2**13, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**32 - 1]


def test_what_is_declared_is_not_allocated() -> None:
    """Sizes above the cap are refused before a pixel is stored; the process does not grow by the size of an image."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind, width, height in itertools.product(["png", "gif", "bmp", "ppm", "npy", "tif"], LARGE, LARGE):
        assert not check(declared(kind, width, height), 3)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000
    )  # KB; one of 8192 x 8192 would be 200,000
    assert DataConfig().max_pixels < 2**13 * 2**15
    for kind in ("png", "bmp", "ppm", "tif"):
        with pytest.raises(BadImage, match="max_pixels"):
            decode(declared(kind, 2**13, 2**15), 3, DataConfig().max_pixels)
    assert decoding.Image.MAX_IMAGE_PIXELS is not None
