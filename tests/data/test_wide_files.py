"""Images of more than 8 bits or four channels: what is stored comes out, at the depth and range that were asked for."""

import copy
import importlib.util
import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image
from skimage import data as samples

from selfsup.config import DataConfig, load
from selfsup.data.arrays import eight_bits, to_levels, with_channels
from selfsup.data.decode import BadImage, decode, from_array
from selfsup.data.sources import open_source
from selfsup.data.wide_files import upright
from selfsup.doctor.formats import describe
from selfsup.errors import UserError

tifffile = pytest.importorskip("tifffile")


@pytest.fixture(scope="module")
def deep():
    """A photograph as uint16 [40,56,3] whose lower bits matter."""
    values = samples.astronaut()[:40, 100:156].astype(np.uint16) * 257
    return values - (np.arange(56, dtype=np.uint16) * 3)[:, None] * (values > 300)


def tiff(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **{"photometric": "minisblack", **options})
    return buffer.getvalue()


def png16(array, extra=b""):
    """A PNG of 16 bits, uint16 [H,W,2..4]: Pillow writes none (PNG, sections 5 and 11)."""
    height, width, channels = array.shape

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    end = chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + end


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_thirteen_bands(deep, planar, compression):
    """Interleaved or band by band, compressed or not: all values, and their upper 8 bits at depth 8."""
    bands = np.concatenate([deep] * 5, axis=2)[:, :, :13]
    stored = tiff(
        bands if planar == "contig" else bands.transpose(2, 0, 1), planarconfig=planar, compression=compression
    )
    out = decode(stored, 13, depth=16)
    assert out.dtype == np.uint16 and (out == bands).all()
    assert (decode(stored, 13) == np.rint(bands / 257)).all()
    assert describe(stored)[2] == 13
    with pytest.raises(BadImage, match="13 channels where 3 are asked for"):
        decode(stored, 3)
    with pytest.raises(BadImage):
        decode(stored[: len(stored) // 2], 13)
    with pytest.raises(BadImage, match="max_pixels=100"):
        decode(stored, 13, max_pixels=100)


def test_pages_are_channels_at_any_depth(deep):
    pages = np.concatenate([deep, deep], axis=2)[:, :, :5]
    stored = tiff(pages.transpose(2, 0, 1))
    assert (decode(stored, 5, depth=16) == pages).all()
    ranges = [(0, 1000 * (c + 1)) for c in range(5)]
    assert (decode(stored, 5, value_range=ranges) == to_levels(pages, ranges)).all()


@pytest.mark.parametrize("store", [png16, lambda a: tiff(a, photometric="rgb"), npy])
def test_sixteen_bit_colour(deep, store):
    """All 16 bits at depth 16 and under a range; by default what Pillow gives, as ever."""
    stored = store(deep)
    assert (decode(stored, 3, depth=16) == deep).all()
    dark = np.asarray(decode(stored, 3, value_range=(0, 1000)))
    assert (dark == np.rint(np.clip(deep * (255 / 1000), 0, 255))).all()
    plain = np.asarray(decode(stored, 3)).astype(int)
    assert np.abs(plain - deep // 257).max() <= 1


def test_orientation_of_a_16_bit_png(deep):
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    assert (decode(png16(deep, chunk), 3, depth=16) == np.rot90(deep, -1)).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_upright_as_pillow_turns(turn):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = image.getexif()
    exif[0x0112] = turn
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    assert (np.asarray(decode(buffer.getvalue(), 1)) == upright(np.asarray(image), turn)).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_depth_16_of_8_bit_files(mode, channels):
    """257 times the levels of depth 8, whatever the file."""
    image = Image.fromarray(samples.astronaut()[:20, :30])
    image = (
        image.convert("L").convert("I").point(lambda v: v * 257).convert("I;16")
        if mode == "I;16"
        else image.convert(mode)
    )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    out = decode(buffer.getvalue(), channels, depth=16)
    assert out.dtype == np.uint16 and out.shape == (20, 30, channels)
    assert (eight_bits(out) == np.asarray(decode(buffer.getvalue(), channels)).reshape(out.shape)).all()


def test_background_under_transparency(deep):
    """White unless said otherwise; at 16 bits as at 8."""
    clear = np.zeros((4, 5, 4), np.uint8)
    clear[:2, :, 3] = 255  # above black, below nothing
    buffer = io.BytesIO()
    Image.fromarray(clear).save(buffer, "PNG")
    for depth, full in ((8, 255), (16, 65535)):
        out = np.asarray(decode(buffer.getvalue(), 3, depth=depth))
        assert (out[:2] == 0).all() and (out[2:] == full).all()
        out = np.asarray(decode(buffer.getvalue(), 3, depth=depth, background=(0, 128, 255)))
        assert (out[2:] == np.array([0, 128, 255]) * (full // 255)).all() and (out[:2] == 0).all()
        assert np.asarray(decode(buffer.getvalue(), 4, depth=depth))[3, 0].tolist() == [0, 0, 0, 0]
    wide = np.zeros((4, 5, 4), np.uint16)
    wide[:2, :, 3] = 65535
    out = decode(png16(wide), 3, depth=16, background=(0, 128, 255))
    assert (out[2:] == np.array([0, 128 * 257, 65535])).all()
    assert decode(png16(wide), 1, depth=16).shape == (4, 5, 1)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("found", [1, 2, 3, 4])
def test_with_channels_as_pillow_has_it(found, channels):
    image = np.concatenate([samples.astronaut()[:16, :16], samples.camera()[100:116, 200:216, None]], axis=2)
    image = image[:, :, [0, 3]] if found == 2 else image[:, :, :found]
    want = np.asarray(from_array(image, channels)).reshape(16, 16, channels)
    assert np.abs(with_channels(image, channels).astype(int) - want).max() <= 1


def test_ranges_of_each_channel():
    values = np.stack([np.full((3, 4), v, np.float32) for v in (-10.0, 5.0, 500.0)], axis=-1)
    ranges = [(-20, 0), (0, 10), (0, 1000)]
    assert np.abs(to_levels(values, ranges, 16).astype(int) - 32768).max() <= 1
    with pytest.raises(BadImage, match="2 ranges for 3 channels"):
        to_levels(values, ranges[:2])
    big = values.astype(">f4")
    assert (to_levels(big, ranges) == to_levels(values, ranges)).all()


def test_configuration():
    """Keys are checked when a recipe is read, and written to config.yaml."""
    two = ["backbone.in_chans=2", "data.mean=[0.5,0.5]", "data.std=[0.25,0.25]"]
    made = load("demo", [*two, "data.value_range=[[0,1],[5,9]]", "data.depth=16"])
    assert made.data.value_range == ((0, 1), (5, 9)) and made.data.depth == 16
    assert load("demo", ["data.value_range=[0,300]"]).data.value_range == (0, 300)
    for wrong, said in (
        (["data.value_range=[[0,1],[0,1]]"], "2 ranges for backbone.in_chans=1"),
        (["data.value_range=[5,5]"], "low < high"),
        (["data.depth=12"], "data.depth"),
        (["data.depth=16", "views.global.policy=randaugment"], "works on 8 bits"),
        ([*two, "views.global.policy=randaugment"], "1 or 3 channels"),
        (["data.background=[0,0]"], "data.background"),
    ):
        with pytest.raises(UserError, match=said):
            load("demo", wrong)
    plain = ["views.local.count=0", "views.global.jitter=0", "views.global.grayscale=0.1"]
    assert load("demo", plain).views.colour_keys() == ["grayscale"]


def test_sources_read_as_their_configuration_says(tmp_path, deep):
    (tmp_path / "a.tif").write_bytes(tiff(deep[:, :, 0]))
    np.save(tmp_path / "b.npy", deep[:, :, 0])
    source = open_source(str(tmp_path), channels=1, config=DataConfig(depth=16))
    assert source.dtype == np.uint16
    for i in range(2):
        assert (source.read(i)[:, :, 0] == deep[:, :, 0]).all()


def test_dicom():
    """A CT slice that pydicom ships: Hounsfield units under a range of one's own, else the file's window or all its bits."""
    pydicom = pytest.importorskip("pydicom")
    path = pydicom.data.get_testdata_file("CT_small.dcm")
    slope = pydicom.dcmread(path)
    units = slope.pixel_array * float(slope.RescaleSlope) + float(slope.RescaleIntercept)
    window = decode(path, 1, value_range=(-160, 240), depth=16)[:, :, 0]  # soft tissue
    assert (window == np.rint(np.clip((units + 160) * (65535 / 400), 0, 65535))).all()
    plain = np.asarray(decode(path, 1))
    assert plain.shape == (128, 128) and plain.std() > 20
    slope.PhotometricInterpretation = "MONOCHROME1"
    buffer = io.BytesIO()
    slope.save_as(buffer)
    inverted = decode(buffer.getvalue(), 1, depth=16).astype(int)
    assert np.abs(inverted + decode(path, 1, depth=16).astype(int) - 65535).max() <= 1


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_a_stack_in_one_file(tmp_path, deep, layout):
    """Mapped, with labels beside it; the same images as from files of their own, in another process too."""
    images = np.stack([deep[:30, i : i + 30] for i in range(6)])
    stack = {"NHWC": images, "NCHW": images.transpose(0, 3, 1, 2), "NHW": images[..., 0]}[layout]
    np.save(tmp_path / "x.npy", stack)
    channels = 1 if layout == "NHW" else 3
    source = open_source(str(tmp_path / "x.npy"), channels=channels, config=DataConfig(depth=16))
    assert len(source) == 6 and source.labels is None
    again = copy.deepcopy(source)  # as another process gets it
    for i in range(6):
        assert (source.read(i) == images[i][:, :, :channels]).all() and (again.read(i) == source.read(i)).all()
    np.save(tmp_path / "x.labels.npy", np.arange(6) % 2)
    assert open_source(str(tmp_path / "x.npy"), channels=channels).labels.tolist() == [0, 1] * 3
    np.save(tmp_path / "x.labels.npy", np.arange(5))
    with pytest.raises(UserError, match=r"x.labels.npy is int64 \[5\]"):
        open_source(str(tmp_path / "x.npy"), channels=channels)


def test_stacks_that_are_none(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    np.save(tmp_path / "flat.npy", np.zeros(5))
    whole = npy(np.zeros((4, 8, 8), np.uint8))
    (tmp_path / "cut.npy").write_bytes(whole[:200])
    for name, said in (
        ("objects", "cannot be read as an array"),
        ("flat", r"shape \[5\]"),
        ("cut", "cannot be read as an array"),
    ):
        with pytest.raises(UserError, match=said):
            open_source(str(tmp_path / f"{name}.npy"), channels=1)


def test_without_the_extra(deep, monkeypatch):
    """What needs a package names it, as the reason for which that file is left out; 16-bit PNG falls back on torchvision."""
    bands = np.concatenate([deep] * 5, axis=2)
    for name in ("tifffile", "pydicom", "imagecodecs"):
        monkeypatch.setitem(sys.modules, name, None)
    stored = tiff(bands, planarconfig="contig")
    with pytest.raises(BadImage, match=r"need tifffile: pip install 'selfsup\[wide\]'"):
        decode(stored, 15)
    with pytest.raises(BadImage, match="need pydicom"):
        decode(bytes(128) + b"DICM" + bytes(50), 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (decode(png16(deep), 3, depth=16) == deep).all()
    with pytest.raises(BadImage):
        decode(png16(deep)[:2000], 3, depth=16)


def test_signed_pages_keep_their_values():
    pages = np.stack([np.full((6, 8), -1000, np.int16), np.full((6, 8), 1000, np.int16)])
    out = decode(tiff(pages), 2, value_range=(-1000, 1000))
    assert np.array_equal(out[..., 0], np.zeros((6, 8))) and np.array_equal(out[..., 1], np.full((6, 8), 255))
    single = decode(tiff(np.full((6, 8), -500, np.int16)), 1, value_range=(-1000, 1000))
    assert np.asarray(single).max() == np.asarray(single).min() == 64


def test_grey_files_where_each_channel_has_its_range():
    """As `selfsup stats --channels 3` proposes it: grey is repeated, and then each channel goes by its own range."""
    grey = np.full((6, 8), 1000, np.uint16)
    for read in (lambda **k: decode(tiff(grey), 3, **k), lambda **k: from_array(grey, 3, 100, **k)):
        out = np.asarray(read(value_range=((0, 1000), (0, 2000), (0, 4000))))
        assert out.shape == (6, 8, 3) and out[0, 0].tolist() == [255, 128, 64]
