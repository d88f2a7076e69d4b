"""Grey, RGBA, 13 bands and 16 bits from files to a backbone: statistics, training, bitwise resume, export, loading, k-NN.

No multispectral images can be had without a download. The 13 bands are mixtures of the red, green and blue of scikit-image's
photographs, each with a gain and an offset of its own: real textures, invented spectra.
"""

import colorsys
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage import data as samples
from typer.testing import CliRunner

import selfsup
from selfsup.cli import app
from selfsup.config import DataConfig, load
from selfsup.data import photometric
from selfsup.data.batch import BatchMaker, Split
from selfsup.data.colour import turn_hue_fine
from selfsup.data.sources import open_source, wrap_dataset
from selfsup.data.views import multicrop
from selfsup.errors import EarlyStop
from selfsup.methods import METHODS
from tests.methods.tiny import METHOD_OPTIONS, TINY_RUN

tifffile = pytest.importorskip("tifffile")

CHANNELS = {"grey": 1, "grey16": 1, "rgba": 4, "bands13": 13}


def _write(kind: str, path: Path, tile: np.ndarray) -> None:
    grey = tile @ np.array([0.299, 0.587, 0.114])
    if kind == "grey":
        Image.fromarray(np.rint(grey).astype(np.uint8)).save(path.with_suffix(".png"))
    elif kind == "grey16":
        Image.fromarray(np.rint(grey * 12 + 300).astype(np.uint16)).save(path.with_suffix(".png"))
    elif kind == "rgba":
        Image.fromarray(np.dstack([tile, np.rint(grey).astype(np.uint8)])).save(path.with_suffix(".png"))
    else:
        place = np.linspace(0, 1, 13)
        weights = np.stack([1 - place, 1 - np.abs(2 * place - 1), place])
        bands = tile @ weights * np.linspace(3, 30, 13) + 40 * np.arange(13)
        tifffile.imwrite(
            path.with_suffix(".tif"), np.rint(bands).astype(np.uint16), photometric="minisblack", planarconfig="contig"
        )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind a folder of two classes with 12 tiles of 40 pixels each."""
    out = {}
    for kind in CHANNELS:
        out[kind] = tmp_path_factory.mktemp(kind)
        for name, whole in (("astronaut", samples.astronaut()), ("coffee", samples.coffee())):
            (out[kind] / name).mkdir()
            for i in range(12):
                tile = whole[37 * i % 300 :, 53 * i % 350 :][:40, :40]
                _write(kind, out[kind] / name / f"{i:02d}", tile)
    return out


def _recipe(folder: Path, kind: str, path: Path) -> Path:
    """What `selfsup stats` writes."""
    done = CliRunner().invoke(
        app, ["stats", str(folder), "--channels", str(CHANNELS[kind]), "--out", str(path), "--workers", "0"]
    )
    assert done.exit_code == 0, done.output
    return path


def _train(recipe: Path, method: str, out: Path, *overrides: str, **options: Any) -> Path:
    run = [option for option in TINY_RUN if not option.startswith("steps")]
    config = load(
        str(recipe),
        ["precision=fp32", *run, "steps=2", f"method={method}", *METHOD_OPTIONS.get(method, []), *overrides],
    )
    selfsup.train(config, out=out, quiet=True, **options)
    return out


@pytest.mark.systems("Grey, RGBA, multispectral, 16-bit and medical images; statistics of each channel")
@pytest.mark.parametrize("kind", CHANNELS)
def test_from_files_to_a_backbone(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    channels = CHANNELS[kind]
    recipe = _recipe(folders[kind], kind, tmp_path / "recipe.yaml")
    written = load(str(recipe))
    assert written.backbone.in_chans == channels == len(written.mean)
    assert written.data.depth == (16 if kind in ("grey16", "bands13") else 8)

    whole = _train(recipe, "dino", tmp_path / "whole")
    with pytest.raises(EarlyStop):
        _train(recipe, "dino", tmp_path / "parts", "stop_at=1")
    _train(recipe, "dino", tmp_path / "parts", resume=True)
    name = "checkpoints/step_00000002/model.safetensors"
    first, second = load_file(whole / name), load_file(tmp_path / "parts" / name)
    assert all(torch.equal(first[key], second[key]) for key in first)
    recorded = load(str(whole / "config.yaml")).data
    assert (recorded.depth, recorded.value_range, recorded.mean) == (
        written.data.depth,
        written.data.value_range,
        written.data.mean,
    )

    backbone = selfsup.load_backbone(whole)
    images = torch.randn(2, channels, 32, 32)
    bare = timm.create_model(f"local-dir:{whole / 'backbone'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(bare(images), backbone(images).pooled)
    assert (
        backbone.in_chans == channels
        and backbone.mean == pytest.approx(written.mean)
        and backbone.std == pytest.approx(written.std)
    )
    exported = CliRunner().invoke(app, ["export", str(whole), str(tmp_path / "exported")])
    assert exported.exit_code == 0 and "difference to ours 0" in exported.output
    assert selfsup.load_backbone(tmp_path / "exported").in_chans == channels

    for task, options in (("knn", ["k=3"]), ("linear", ["epochs=1", "lr=[0.1]"])):
        result = tmp_path / f"{task}.json"
        words = ["eval", task, str(whole), *options, "workers=0", "device=cpu", "--out", str(result)]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (done.output, done.exception)
        assert 0 <= json.loads(result.read_text())["metrics"]["top1"] <= 1


@pytest.mark.parametrize("method", ["mae", "simmim"])
@pytest.mark.parametrize("kind", ["grey16", "rgba", "bands13"])
def test_masked_images(method: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Reconstruction of pixels has as many outputs as there are channels."""
    assert method in METHODS
    recipe = _recipe(folders[kind], kind, tmp_path / "recipe.yaml")
    run = _train(recipe, method, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(lines[-1]["loss"]) and selfsup.load_backbone(run).in_chans == CHANNELS[kind]


def test_16_bits_are_more_than_8(tmp_path: Path) -> None:
    """Of values within one 256th of the range 8 bits leave nothing; 16 bits keep them through crops and photometry."""
    ramp = np.broadcast_to(np.arange(48, dtype=np.uint16) * 5 + 30_000, (48, 48))  # 235 of 65535
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a.png")
    config = load(
        "demo", ["views.global.size=32", "views.local.count=0", "views.global.blur=1", "views.global.jitter=1"]
    )
    seen = {}
    for depth in (8, 16):
        source = open_source(str(tmp_path), channels=1, config=DataConfig(depth=depth))
        batch = BatchMaker(source, multicrop(config.views), 0, Split(1))(0, 0)
        assert batch.crops[0].dtype == (torch.uint8 if depth == 8 else torch.uint16)
        seen[depth] = photometric.apply(batch.crops[0], batch.params[0], [0.0], [1.0], "cpu")
    assert len(seen[8].unique()) <= 4 and len(seen[16].unique()) > 100
    assert (seen[8] - seen[16]).abs().max() < 4 / 255


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_photometry_of_16_bits_is_that_of_8_bits_without_rounding(channels: int) -> None:
    """The same draws on the same image: levels differ by what 8 bits round away."""
    whole = np.concatenate([samples.coffee()[40:104, 60:124]] * 5, axis=2)[:, :, :channels]
    options = [
        "size=64",
        "count=8",
        "jitter=1",
        "blur=0.5",
        "solarize=0.3",
        "grayscale=0.3",
        "saturation=0.4",
        "hue=0.1",
    ]
    config = load("demo", ["views.local.count=0", *(f"views.global.{option}" for option in options)])
    results = []
    for depth, image in ((8, whole), (16, whole.astype(np.uint16) * 257)):
        source = wrap_dataset([image], channels=channels, config=DataConfig(depth=depth))
        batch = BatchMaker(source, multicrop(config.views), 0, Split(1))(0, 0)
        seen = photometric.apply(batch.crops[0], batch.params[0], [0.0] * channels, [1.0] * channels, "cpu")
        results.append(seen.flatten(1) * 255)
    difference = (results[0] - results[1]).abs()
    solarized = difference > 200  # one side of the threshold, and the other
    assert solarized.float().mean() < 0.02 and difference[~solarized].mean() < (
        2.5 if channels == 3 else 1.2
    )  # hue in 256 steps


def test_hue_of_levels_with_fractions() -> None:
    """Against Python's own colorsys."""
    colours = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 255
    colours[0, :, 0, :3] = torch.tensor([[0.0, 255, 80], [0, 255, 80], [0, 255, 80]])  # grey has no hue
    for turn in (-0.3, 0.0, 0.1, 0.45):
        made = turn_hue_fine(colours.clone(), torch.full((1, 1, 1, 1), turn))[0].flatten(1).T
        for colour, seen in zip((colours[0].flatten(1).T / 255).tolist(), made.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*colour)
            want = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
            assert [v / 255 for v in seen] == pytest.approx(want, abs=1e-4)
