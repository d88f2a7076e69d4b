"""`selfsup stats` against numpy, on files of every kind; its block is a recipe that trains."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from skimage import data as samples
from typer.testing import CliRunner

from selfsup.cli import app
from selfsup.config import DataConfig, load
from selfsup.data.sources import open_source
from selfsup.data.statistics import Channel, cells_of, channel_of, values_of
from selfsup.errors import UserError
from selfsup.eval import stats

tifffile = pytest.importorskip("tifffile")


def photographs(count=6, size=40):
    """Parts of scikit-image's photographs, uint8 [count,size,size,3]."""
    whole = [samples.astronaut(), samples.coffee(), samples.chelsea()]
    return np.stack([whole[i % 3][30 * i : 30 * i + size, 40 * i : 40 * i + size] for i in range(count)])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_moments_and_percentiles(dtype):
    """Merged over images as numpy's of all values; percentiles exact for up to 16 bits, else within 0.1 %."""
    values = photographs().astype(np.float64) * 37 - (2000 if np.dtype(dtype).kind != "u" else 0)
    values = values.astype(dtype) if dtype != np.uint8 else photographs()
    whole = Channel()
    for image in values:
        whole.add(channel_of(image, None))
    assert whole.count == values.size
    np.testing.assert_allclose([whole.mean, whole.std], [values.mean(dtype=float), values.std(dtype=float)], rtol=1e-11)
    assert (whole.low, whole.high) == (values.min(), values.max())
    table = stats.Table(values.dtype, [whole])
    for q in (0.1, 1, 25, 50, 99, 99.9, 100):
        want = float(np.percentile(values, q, method="inverted_cdf"))
        exact = np.dtype(dtype).itemsize <= 2
        assert table.percentile(0, q) == (want if exact else pytest.approx(want, rel=1.1e-3, abs=1e-6)), q


def test_cells_are_ordered_and_hold_their_values():
    values = np.array([-np.float32(3e38), -7.5, -1e-30, 0, 1e-30, 0.1, 1, 1.01, 9e9, 3e38], np.float32)
    cells = cells_of(values)
    assert (np.diff(cells) > 0).all()
    np.testing.assert_allclose(values_of(cells, values.dtype), values, rtol=1e-3)


def test_nothing_is_left_out_silently():
    """NaN, infinities and the value for nothing are counted, and change no figure."""
    values = np.array([1.0, 2, 3, np.nan, np.inf, -9999], np.float32)
    one = channel_of(values, -9999)
    assert (one.count, one.left_out, one.mean, one.low, one.high) == (3, 3, 2, 1, 3)
    assert channel_of(values[3:5], None).count == 0


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """Six images of 5 bands: mixtures of a photograph's colours, one band constant, one that is nothing; and a broken file."""
    root = tmp_path_factory.mktemp("bands")
    weights = np.array([[9, 0, 0], [5, 5, 0], [1, 8, 3]]).T
    images = []
    for i, image in enumerate(photographs()):
        mixed = image.astype(np.float64) @ weights + 100
        images.append(
            np.concatenate([mixed, np.full((*mixed.shape[:2], 1), 7), np.zeros((*mixed.shape[:2], 1))], axis=2)
        )
        tag = [(42113, "s", 2, "0", True)]
        tifffile.imwrite(
            root / f"{i}.tif",
            images[-1].astype(np.uint16),
            photometric="minisblack",
            planarconfig="contig",
            extratags=tag,
        )
    (root / "broken.tif").write_bytes((root / "0.tif").read_bytes()[:900])
    return root, np.stack(images).astype(np.uint16)


def test_command(bands, tmp_path):
    root, images = bands
    out = tmp_path / "made" / "five.yaml"
    done = CliRunner().invoke(app, ["stats", str(root), "--out", str(out), "--json", "--workers", "0"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["read"] == 6 and result["bad_count"] == 1 and result["bad"][0]["file"].endswith("broken.tif")
    assert result["modes"] == {"uint16, 5 channels": 6} and result["nodata"] == {"0": 6}
    assert [row["state"] for row in result["channels"]] == ["ok", "ok", "ok", "constant", "missing"]
    for c in range(3):
        kept = images[..., c].astype(float)
        row = result["channels"][c]
        assert (row["mean"], row["std"]) == (
            pytest.approx(kept.mean(), rel=1e-11),
            pytest.approx(kept.std(), rel=1e-11),
        )
        assert row["percentiles"]["99.9"] == np.percentile(kept, 99.9, method="inverted_cdf")
        low, high = result["recipe"]["data"]["value_range"][c]
        seen = np.clip((kept - low) / (high - low), 0, 1)
        assert result["recipe"]["data"]["mean"][c] == pytest.approx(seen.mean(), abs=1e-5)
        assert result["recipe"]["data"]["std"][c] == pytest.approx(seen.std(), abs=1e-5)
    assert Image.open(out.with_suffix(".png")).size[0] > 500
    made = load(str(out), ["backbone.name=vit_tiny_patch16_224"])
    assert made.backbone.in_chans == 5 and made.data.depth == 16 and len(made.data.value_range) == 5
    assert yaml.safe_load(out.read_text()) == result["recipe"]


def test_workers_and_samples_change_nothing_else(bands):
    root, _ = bands
    source = open_source(str(root), channels=5, config=DataConfig())
    chosen = np.array([0, 1, 2, 3, 5] * 7)
    alone, four = (stats.look(source, chosen, None, n) for n in (0, 2))
    assert [c.mean for c in alone.main.channels] == [c.mean for c in four.main.channels]
    assert all((a.counts == b.counts).all() for a, b in zip(alone.main.channels, four.main.channels, strict=True))


def test_what_is_read_is_what_training_sees(tmp_path):
    """Transparent PNGs count as composed, or with alpha as a channel; mean and std are those of the decoded levels."""
    for i, image in enumerate(photographs(4)):
        alpha = np.where(np.arange(40) < 8, 0, 255).astype(np.uint8)
        rgba = np.dstack([image, np.broadcast_to(alpha, (40, 40))])
        Image.fromarray(rgba).save(tmp_path / f"{i}.png")
    for options, channels in (({}, 3), ({"channels": 4}, 4), ({"channels": 1}, 1), ({"background": (0, 0, 255)}, 3)):
        made = stats.run(str(tmp_path), workers=0, as_json=True, **options)["recipe"]
        source = open_source(
            str(tmp_path), channels=channels, config=DataConfig(background=options.get("background", (255,) * 3))
        )
        levels = np.stack([np.asarray(source.read(i)).reshape(40, 40, channels) for i in range(4)]) / 255
        np.testing.assert_allclose(made["data"]["mean"], levels.mean((0, 1, 2)), atol=1e-5)
        np.testing.assert_allclose(made["data"]["std"], levels.std((0, 1, 2)), atol=1e-5)
        assert "depth" not in made["data"] and made["backbone"]["in_chans"] == channels


def test_refusals(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of 1 images can be read.*empty file"):
        stats.run(str(tmp_path), workers=0)
    with pytest.raises(UserError, match="two percentiles"):
        stats.run(str(tmp_path), clip=(90, 10))
    with pytest.raises(UserError, match="no such folder"):
        stats.run(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"--background 300 0 0: .* 0 to 255"):
        stats.run(str(tmp_path), background=(300, 0, 0))
    with pytest.raises(UserError, match=r"--out .*a.png cannot be written to"):
        stats.run(str(tmp_path), out=tmp_path / "a.png" / "b.yaml")
    with pytest.raises(UserError, match=r"--picture .*x.yaml: pictures are PNG"):
        stats.run(str(tmp_path), picture=tmp_path / "x.yaml")


def test_the_table_is_there_before_a_file_fails(tmp_path, capsys, monkeypatch):
    """A disk that is full at the end does not cost the measurement."""
    Image.fromarray(photographs(1)[0]).save(tmp_path / "a.png")

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stats.Path, "write_text", full)
    with pytest.raises(UserError, match=r"--out .*No space left"):
        stats.run(str(tmp_path), workers=0, out=tmp_path / "b.yaml")
    assert "to paste into a recipe" in capsys.readouterr().out
