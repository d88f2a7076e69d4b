"""Every kind of image file becomes the right pixels, or BadImage with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from selfsup.data.decode import BadImage, convert, decode, from_array, to_uint8


@pytest.fixture
def colour():
    """A smooth colour image [40,56,3]: JPEG keeps it within a few levels."""
    y, x = np.mgrid[0:40, 0:56]
    return np.stack([x * 4, y * 6, 255 - x * 2 - y], axis=-1).clip(0, 255).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def difference(image, array):
    return np.abs(np.asarray(image).astype(int) - array).mean()


@pytest.mark.parametrize(
    "kind, options, tolerance",
    [("PNG", {}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 95}, 3),
     ("JPEG", {"quality": 95, "progressive": True}, 3), ("PPM", {}, 0)],
)  # fmt: skip
def test_formats(colour, kind, options, tolerance):
    image = decode(encoded(colour, kind, **options), 3)
    assert image.mode == "RGB" and difference(image, colour) <= tolerance
    assert decode(encoded(colour, kind, **options), 1).mode == "L"
    image.resize((8, 8)).tobytes()  # usable after its file is closed


def test_from_a_path(tmp_path, colour):
    path = tmp_path / "a.png"
    Image.fromarray(colour).save(path)
    assert difference(decode(path, 3), colour) == 0
    assert difference(decode(str(path), 3), colour) == 0
    with pytest.raises(BadImage, match="cannot be read"):
        decode(tmp_path / "none.png", 3)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_converts(mode, channels):
    image = Image.new(mode, (6, 4))
    out = convert(image, channels)
    assert out.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels] and out.size == (6, 4)


def test_modes_keep_their_meaning(colour):
    rgb = Image.fromarray(colour)
    grey = np.asarray(rgb.convert("L"))
    for mode, tolerance in (("CMYK", 1), ("YCbCr", 2), ("HSV", 4), ("RGBA", 0), ("RGBX", 0)):
        assert difference(convert(rgb.convert(mode), 3), colour) <= tolerance, mode
    few = rgb.quantize(16)
    assert difference(convert(few, 3), np.asarray(few.convert("RGB"))) == 0
    assert difference(convert(rgb, 1), grey) == 0
    assert (np.asarray(convert(Image.fromarray(grey), 3)) == grey[:, :, None]).all()
    assert (np.asarray(convert(rgb, 4))[:, :, 3] == 255).all()


def test_lab_is_colour_managed():
    lab = Image.new("LAB", (2, 2), (255, 128, 128))  # L = 100 %, a = b = 0: white
    assert np.asarray(convert(lab, 3)).min() >= 250


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
def test_sixteen_bit(suffix):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = decode(encoded(values, suffix), 1)
    assert np.asarray(image).tolist() == [[0, 1, 128, 255]]
    assert np.asarray(decode(encoded(values, suffix), 3))[0, 2].tolist() == [128] * 3
    narrow = decode(encoded(values, suffix), 1, value_range=(0, 1000))
    assert np.asarray(narrow).tolist() == [[0, 66, 255, 255]]


def test_float_tiff_and_32_bit():
    values = np.array([[0.0, 0.5, 1.0, 2.0]], dtype=np.float32)
    assert np.asarray(decode(encoded(values, "TIFF"), 1)).tolist() == [[0, 128, 255, 255]]
    assert np.asarray(decode(encoded(values, "TIFF"), 1, value_range=(0, 2))).tolist() == [[0, 64, 128, 255]]
    wide = np.array([[0, 65535, 70000]], dtype=np.int32)
    assert np.asarray(decode(encoded(wide, "TIFF"), 1)).tolist() == [[0, 255, 255]]


def test_transparency_is_composited_over_white(colour):
    alpha = np.zeros(colour.shape[:2], np.uint8)
    alpha[:20] = 255
    image = decode(encoded(np.dstack([colour, alpha]), "PNG"), 3)
    assert (np.asarray(image)[:20] == colour[:20]).all() and (np.asarray(image)[20:] == 255).all()
    kept = np.asarray(decode(encoded(np.dstack([colour, alpha]), "PNG"), 4))
    assert (kept[:, :, 3] == alpha).all() and (kept[:20, :, :3] == colour[:20]).all()
    grey_alpha = Image.merge("LA", [Image.new("L", (4, 4), 7), Image.new("L", (4, 4), 0)])
    assert (np.asarray(decode(encoded(grey_alpha, "PNG"), 1)) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 100, 150, 200])
    assert (np.asarray(decode(encoded(palette, "PNG", transparency=1), 3)) == 255).all()
    assert (np.asarray(decode(encoded(palette, "PNG"), 3)) == (100, 150, 200)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    """Corner markers: where each must end by the EXIF standard (0th row, 0th column of each orientation)."""
    stored = np.full((32, 48, 3), 128, np.uint8)
    stored[:16, :24] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    image = np.asarray(decode(encoded(stored, kind, exif=exif, **options), 3)).astype(int)
    assert image.shape[:2] == ((32, 48) if orientation <= 4 else (48, 32))
    top, left = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0), 7: (0, 0), 8: (0, 1)}[orientation]
    corner = image[2 if top else -3, 2 if left else -3]
    assert corner[0] > 200 and corner[1] < 60


def test_broken_exif_does_not_lose_the_image(colour):
    data = encoded(colour, "JPEG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert decode(data, 3).size == (56, 40)


def test_animation_gives_its_first_picture(colour):
    frames = [Image.fromarray(colour), Image.new("RGB", (56, 40))]
    image = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 3)
    assert difference(image, colour) < 12  # 256 colours
    image.crop((0, 0, 4, 4)).load()


def test_pages_are_channels():
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (13, 20, 24), dtype=np.uint8)
    pages = [Image.fromarray(p) for p in planes]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert (decode(data, 13) == planes.transpose(1, 2, 0)).all()
    with pytest.raises(BadImage, match=r"1 channels in 13 page\(s\) where 12 are asked for"):
        decode(data, 12)
    three = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:3])
    assert (np.asarray(decode(three, 3)) == planes[:3].transpose(1, 2, 0)).all()
    assert (np.asarray(decode(three, 1)) == planes[0]).all()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_npy_layouts_and_types():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 256, (13, 20, 24), dtype=np.uint8)
    expected = values.transpose(1, 2, 0)
    assert (decode(npy(values), 13) == expected).all()
    assert (decode(npy(np.ascontiguousarray(expected)), 13) == expected).all()
    assert (decode(npy((expected / 255).astype(np.float32)), 13) == expected).all()
    assert (decode(npy(expected.astype(np.uint16) * 257), 13) == expected).all()
    assert (decode(npy(expected.astype(np.int16) * 10), 13, value_range=(0, 2550)) == expected).all()
    assert (np.asarray(decode(npy(values[0]), 1)) == values[0]).all()
    assert (np.asarray(decode(npy(values[:3]), 3)) == expected[:, :, :3]).all()
    assert decode(npy(values[:3]), 1).mode == "L" and decode(npy(values[0]), 3).mode == "RGB"
    with pytest.raises(BadImage, match=r"int16: give data\.value_range"):
        decode(npy(expected.astype(np.int16)), 13)
    with pytest.raises(BadImage, match="12 are asked for"):
        decode(npy(expected), 12)
    with pytest.raises(BadImage, match="shape"):
        decode(npy(np.zeros(7, np.uint8)), 1)
    with pytest.raises(BadImage, match="Python objects"):
        decode(npy(np.array([[object()]])), 1)
    with pytest.raises(BadImage, match="truncated"):
        decode(npy(expected)[:-100], 13)


def test_nan_is_the_low_end_and_all_nan_is_bad():
    values = np.array([[np.nan, 0.5], [1.0, np.inf]], dtype=np.float32)
    assert to_uint8(values).tolist() == [[0, 128], [255, 255]]
    with pytest.raises(BadImage, match="NaN"):
        to_uint8(np.full((2, 2), np.nan))


def test_two_channels(colour):
    assert from_array(colour[:, :, :2], 2).shape == (40, 56, 2)
    assert decode(encoded(Image.new("LA", (4, 4)), "PNG"), 2).shape == (4, 4, 2)


# ------------------------------------------------------------------------------------------------------ bad files


def test_empty_html_and_text():
    with pytest.raises(BadImage, match="0 bytes"):
        decode(b"", 3)
    with pytest.raises(BadImage, match="HTML"):
        decode(b"\n<!DOCTYPE html><html><body>404</body></html>", 3)
    with pytest.raises(BadImage, match="not an image"):
        decode(b"hello, this is text", 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9])
def test_truncated(kind, part, monkeypatch):
    noise = np.random.default_rng(2).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    options = {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    data = encoded(noise, kind, **options)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other libraries set it
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * part)], 3)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    assert decode(data, 3).size == (80, 64)


def test_progressive_jpeg_truncated():
    noise = np.random.default_rng(2).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    data = encoded(noise, "JPEG", progressive=True)
    with pytest.raises(BadImage):
        decode(data[: len(data) // 2], 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_with_a_tail_of_zeros(progressive):
    """A download that was allocated and never finished: libjpeg gives grey without an error."""
    noise = np.random.default_rng(3).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    thumbnail = Image.Exif()
    data = encoded(noise, "JPEG", progressive=progressive, exif=thumbnail)
    cut = len(data) // 2
    with pytest.raises(BadImage, match="truncated"):
        decode(data[:cut] + bytes(len(data) - cut), 3)
    assert decode(data + bytes(100), 3).size == (80, 64)  # padding after a whole image is harmless


def test_bit_flips_in_a_png_are_noticed(colour):
    data = bytearray(encoded(colour, "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadImage, match="broken"):
        decode(bytes(data), 3)


def bomb(width, height):
    """A PNG of a few hundred bytes that announces width x height pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_decompression_bombs():
    with pytest.raises(BadImage, match="max_pixels"):
        decode(bomb(60_000, 60_000), 3)
    with pytest.raises(BadImage, match="max_pixels=1000"):
        decode(encoded(np.zeros((40, 40), np.uint8), "PNG"), 1, max_pixels=1000)
    with pytest.raises(BadImage, match="max_pixels"):
        decode(npy(np.zeros((40, 40), np.uint8)), 1, max_pixels=1000)
    pages = [Image.new("L", (30, 30))] * 13
    with pytest.raises(BadImage, match="max_pixels"):
        decode(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]), 13, max_pixels=1000)


def test_a_higher_limit_than_pils_holds(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # PIL alone would refuse 40 x 40
    assert decode(encoded(np.zeros((40, 40), np.uint8), "PNG"), 1, max_pixels=2000).size == (40, 40)
    assert Image.MAX_IMAGE_PIXELS == 500
