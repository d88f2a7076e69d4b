"""`selfsup eval segment` from end to end on composed pictures: figures, files, bad input, the head that learns by heart."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.errors import UserError
from selfsup.eval import segment
from selfsup.eval.descent import steps_of
from selfsup.eval.segment_figures import interval
from selfsup.eval.segment_heads import Trunk, create_head
from selfsup.eval.segment_settings import SegmentSettings
from selfsup.eval.segment_train import EPOCHS, Segmenter, class_weights, segmentation_loss
from selfsup.eval.settings import resolve
from tests.eval import segmentation


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return segmentation.build(tmp_path_factory.mktemp("composed"), train=12, val=6)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return segmentation.exported(tmp_path_factory.mktemp("vit"), **segmentation.VIT)


@pytest.fixture(scope="module")
def conv(tmp_path_factory) -> Path:
    return segmentation.exported(tmp_path_factory.mktemp("conv"), **segmentation.CONV)


def words(data: Path, *more: str) -> list[str]:
    own = [f"data={data}/train/images", f"masks={data}/train/masks", f"data.val={data}/val/images"]
    own += [f"masks.val={data}/val/masks", f"classes={data}/classes.txt", "size=48", "workers=0", "batch=4", "width=16"]
    return [*own, *more]


def evaluated(target: Path, given: list[str], out: Path):
    settings = resolve("segment", given)
    assert isinstance(settings, SegmentSettings)
    return segment.evaluate(str(target), settings, out)


def test_overfits_eight_images(tmp_path: Path, vit: Path):
    data = segmentation.build(tmp_path / "set", train=8, val=1)
    given = words(data, f"data.val={data}/train/images", f"masks.val={data}/train/masks", "batch=8", "pictures=0")
    given += ["head=unetr", "trunk=finetune", "augment=false", "steps=160", "lr=0.004", "dropout=0", "loss=ce+dice"]
    result, counts = evaluated(vit, given, tmp_path / "r.json")
    assert result["metrics"]["miou"] > 0.97 and len(counts) == 8
    assert result["metrics"]["boundary_miou"] > 0.9 and result["metrics"]["mdice"] > 0.98


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("vit", ["head=linear", "test_scales=0.5,1", "test_flip=true"]),
        ("vit", ["head=upernet", "trunk=finetune", "inference=whole", "loss=focal"]),
        ("conv", ["head=mlp", "class_weights=balanced", "loss=dice"]),
        ("conv", ["head=multilayer", "augment=false", "precision=bf16"]),
    ],
)
def test_every_way_gives_a_result(kind: str, more: list[str], data: Path, vit: Path, conv: Path, tmp_path: Path):
    out = tmp_path / "r.json"
    result, counts = evaluated({"vit": vit, "conv": conv}[kind], words(data, "steps=4", "pictures=3", *more), out)
    stored = json.loads(out.read_text())
    assert stored["metrics"] == pytest.approx(result["metrics"]) and set(stored["metrics"]) == {
        "miou", "mdice", "boundary_miou", "pixel_accuracy",
    }  # fmt: skip
    protocol = stored["protocol"]
    low, high = protocol["miou_interval_95"]
    assert low <= stored["metrics"]["miou"] <= high and len(counts) == protocol["val_images"] == 6
    assert [row["class"] for row in stored["per_class"]] == protocol["class_names"] == [
        "background", "trouser", "sandal", "bag", "ankle-boot",
    ]  # fmt: skip
    assert protocol["training"]["cached_features"] == ("augment=false" in more)
    assert counts.truth.sum() == 6 * 48 * 48  # every pixel, at the masks' own size
    with Image.open(tmp_path / "r.png") as sheet:
        assert sheet.width > 500 and sheet.height > 500
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 500


def test_counts_are_of_the_original_size(vit: Path, tmp_path: Path):
    """Images of two shapes, larger than `size`; some pixels ignored."""
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(60, 100), (110, 70), (64, 64), (80, 90)]):
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
        mask = np.zeros(shape, np.uint8)
        mask[10:30, 10:30], mask[:5] = 1, 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    given = [
        f"data={tmp_path}/images",
        f"masks={tmp_path}/masks",
        "val_fraction=0.5",
        "size=48",
        "steps=2",
        "batch=2",
        "workers=0",
    ]
    result, counts = evaluated(vit, given, tmp_path / "r.json")
    sizes = {6000 - 500, 7700 - 350, 4096 - 320, 7200 - 450}
    assert set(counts.truth.sum(1).tolist()) <= sizes and counts.truth[:, 1].tolist() == [400, 400]
    assert "seeded 2/2" in result["protocol"]["split"]


def test_the_same_again_and_cached_features_are_equal(data: Path, conv: Path, tmp_path: Path, monkeypatch):
    given = words(data, "steps=6", "augment=false", "pictures=0", "head=linear")
    first, counts = evaluated(conv, given, tmp_path / "a.json")
    again, _ = evaluated(conv, given, tmp_path / "b.json")
    assert first["metrics"] == again["metrics"]
    monkeypatch.setattr("selfsup.eval.segment_train._CACHE_BYTES", 0)  # every step computes them
    slow, other = evaluated(conv, given, tmp_path / "c.json")
    assert not slow["protocol"]["training"]["cached_features"]
    assert slow["protocol"]["training"]["final_loss"] == pytest.approx(
        first["protocol"]["training"]["final_loss"], abs=2e-5
    )
    assert np.abs(interval(counts, 0, other)).max() < 0.01


def test_frozen_means_frozen(vit: Path):
    from selfsup import load_backbone

    for frozen in (True, False):
        net = load_backbone(vit)
        trunk = Trunk(net, "linear")
        head = create_head("linear", trunk.channels, 3, stride=8, in_chans=3, width=None, dropout=None)
        model = Segmenter(trunk, head, frozen).train()
        loss = segmentation_loss(
            model(torch.randn(2, 3, 48, 48)), torch.ones(2, 48, 48).long(), resolve("segment", []).loss, None
        )
        loss.backward()
        moved = [p.grad is not None for p in net.parameters() if p.requires_grad]
        assert (not moved and not net.training) if frozen else (any(moved) and net.training)
        assert head.out.weight.grad.abs().sum() > 0


def test_balanced_weights_and_lengths():
    settings = resolve("segment", ["class_weights=balanced"])
    assert class_weights(settings, np.array([80, 0, 20, 40])).tolist() == pytest.approx([0.5, 0.0, 2.0, 1.0])
    assert class_weights(resolve("segment", ["class_weights=1,2"]), np.array([1, 1])).tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match="2 for 3 classes"):
        class_weights(resolve("segment", ["class_weights=1,2"]), np.ones(3))
    assert steps_of(settings, 10, EPOCHS) == 300 and steps_of(settings, 1600, EPOCHS) == 4000
    assert steps_of(resolve("segment", ["epochs=2"]), 160, EPOCHS) == 20


def test_the_command_line(data: Path, conv: Path, tmp_path: Path, monkeypatch, capsys):
    from selfsup import cli

    out = tmp_path / "mine.json"
    monkeypatch.setattr(
        sys, "argv", ["selfsup", "eval", "segment", str(conv), *words(data, "steps=3"), "--out", str(out)]
    )
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    assert end.value.code == 0 and "ankle-boot" in said.out and "mine.json" in said.out and "mine.png" in said.out
    assert "training head=linear" in said.err and out.is_file() and (tmp_path / "mine.png").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["classes=3"], "00002.png: id 3"),
        (["masks=/nowhere"], "masks=/nowhere"),
        (["size=50"], "50"),
        (["hed=mlp"], "did you mean head"),
        (["head=unetr", "trunk=froze"], "did you mean frozen"),
    ],
)
def test_bad_input_exits_2(more: list[str], said: str, data: Path, vit: Path, tmp_path: Path, monkeypatch, capsys):
    from selfsup import cli

    out = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["selfsup", "eval", "segment", str(vit), *words(data, *more), "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    text = capsys.readouterr().err
    assert end.value.code == 2 and said in text and "Traceback" not in text and not out.exists()
