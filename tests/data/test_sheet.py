"""The sheet of augmented views: what it shows, and that a run is the same with and without it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup import config as configuration
from selfsup.config import Crops
from selfsup.data import sheet
from selfsup.data.batch import BatchMaker, Split
from selfsup.data.sources import open_source
from selfsup.data.views import View
from selfsup.errors import UserError
from selfsup.eval import augmentations
from selfsup.train import train

PLAIN = Crops(
    count=1, size=28, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0, jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0
)
TINY = ["backbone=vit_tiny_patch16_224", "backbone.in_chans=1", "backbone.img_size=28", "backbone.patch_size=7"]
TINY += ["backbone.embed_dim=24", "backbone.depth=1", "backbone.num_heads=2", "backbone.dynamic_img_size=true"]
TINY += [
    "views.global.size=28",
    "views.local.size=14",
    "views.local.count=1",
    "method.out_dim=32",
    "method.hidden_dim=16",
]
TINY += ["method.bottleneck_dim=8", "global_batch=8", "steps=3", "workers=0", "threads=1", "tensorboard=false"]
TINY += ["precision=fp32", "data=demo:val"]


def test_a_view_without_augmentation_is_the_image():
    source = open_source("demo:val", channels=1)
    maker = BatchMaker(source, [View("whole", PLAIN, 0, 0)], 0, Split(3))
    batch = maker(0, 0)
    originals = [Image.fromarray(np.asarray(source.read(int(i))).reshape(28, 28)) for i in batch.ids]
    made = np.asarray(sheet.sheet(batch, maker.groups, (0.3,), (0.4,), most=2, originals=originals))
    cell, gap, head = 112, 4, 16  # 28 x 4
    assert made.shape == (2 * (cell + gap) + gap + head, 2 * (cell + gap) + gap, 3)
    for row in range(2):
        top = row * (cell + gap) + gap + head
        left, right = (made[top : top + cell, x : x + cell] for x in (gap, cell + 2 * gap))
        assert np.array_equal(left, right)
        assert np.array_equal(left[::4, ::4, 0], np.asarray(originals[row]))


def test_a_run_draws_what_its_first_step_sees(tmp_path: Path):
    made = train(configuration.load(None, TINY), out=tmp_path / "a", quiet=True)
    file = tmp_path / "a" / "pictures" / "augmentations.png"
    image = np.asarray(Image.open(file))
    assert image.std() > 20 and not list(file.parent.glob(".*"))
    config = made.config
    maker = BatchMaker(open_source("demo:val", channels=1), _views(config), config.seed, Split(8))
    again = np.asarray(sheet.sheet(maker(0, 0), maker.groups, config.mean, config.std))
    assert np.array_equal(image, again)


def test_a_run_is_bit_for_bit_the_same_without(tmp_path: Path):
    weights, losses = [], []
    for name, words in (("with", []), ("without", ["pictures=false"])):
        out = tmp_path / name
        train(configuration.load(None, [*TINY, *words, "log_every=1"]), out=out, quiet=True)
        assert (out / "pictures").exists() == (name == "with")
        weights.append((out / "backbone" / "model.safetensors").read_bytes())
        losses.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert weights[0] == weights[1] and losses[0] == losses[1]


def test_a_picture_that_fails_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sheet, "write_sheet", fail)
    assert train(configuration.load(None, TINY), out=tmp_path / "a").steps == 3
    said = capsys.readouterr()
    assert "no picture of the augmentations" in said.out + said.err


def _views(config) -> list[View]:
    from selfsup.cli_eval import views_of

    return views_of(config)


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    made = augmentations.run("demo", ["images=3", "views.local.count=1"], views=_views)
    image = np.asarray(Image.open(made["picture"]))
    assert made["picture"] == "demo_augmentations.png"
    assert image.shape[1] == 4 * 116 + 4 and image.shape[0] == 3 * 116 + 20  # the image, two global views, one local
    recipe = "method: mae\ndata: {path: demo}\nviews: {global: {count: 1, size: 32, blur: 0.0, solarize: 0.0}, local: {count: 0}}"
    (tmp_path / "r.yaml").write_text(recipe + "\nbackbone: {img_size: 32, patch_size: 8}\n")
    assert augmentations.run("r.yaml", ["images=2"], tmp_path / "m.png", views=_views)
    with pytest.raises(UserError, match="demoo"):
        augmentations.run("demoo", [], views=_views)
    with pytest.raises(UserError, match=r"views\.global\.sizes"):
        augmentations.run("demo", ["views.global.sizes=3"], views=_views)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_channels(channels: int):
    levels = sheet._levels(torch.zeros(2, channels, 4, 4), [0.5] * channels, [0.2] * channels)
    assert levels.shape == (2, 4, 4, 3) and (levels == 128).all()
