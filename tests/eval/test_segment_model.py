"""The trained segmentation model: stopped and killed trainings, the folder, and what is done with it later."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.data.mask_files import read_ids
from selfsup.errors import EarlyStop, UserError
from selfsup.eval import segment, segment_model, segment_subject
from selfsup.eval.segment_crops import Crops
from selfsup.eval.settings import resolve
from tests.eval import segmentation


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return segmentation.build(tmp_path_factory.mktemp("composed"), train=8, val=4)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return segmentation.exported(tmp_path_factory.mktemp("vit"), **segmentation.VIT)


def words(data: Path, *more: str) -> list[str]:
    own = [f"data={data}/train/images", f"masks={data}/train/masks", f"data.val={data}/val/images"]
    own += [f"masks.val={data}/val/masks", f"classes={data}/classes.txt", "size=48", "workers=0", "batch=4", "width=16"]
    return [*own, "pictures=0", *more]


def evaluated(target: Path, given: list[str], out: Path | None = None):
    return segment.evaluate(str(target), resolve("segment", given), out)[0]


def weights(folder: Path) -> bytes:
    return (folder / "head.safetensors").read_bytes() + (folder / "backbone" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(data: Path, vit: Path, tmp_path_factory) -> tuple[Path, dict]:
    """(the folder of a frozen linear head, its result); ids 0, 1, 2, 3, 4 are read as ids 10, 20, ... of the masks."""
    root = tmp_path_factory.mktemp("trained")
    shutil.copytree(data, root / "set")
    for path in (root / "set").rglob("masks/*.png"):
        Image.fromarray((read_ids(path) * 10 + 10).astype(np.uint8)).save(path)
    given = words(root / "set", "ids=10,20,30,40,50", "head=linear", "augment=false", "steps=60", "lr=0.02")
    return root / "r", evaluated(vit, given, root / "r.json")


# ---------------------------------------------------------------------------------------------------- stopped and killed


def test_a_stopped_training_ends_as_an_undisturbed_one(data: Path, vit: Path, tmp_path: Path, monkeypatch):
    """SIGTERM in the middle, trunk and head moving, with dropout and crops."""
    given = words(data, "head=mlp", "trunk=finetune", "steps=8", "dropout=0.3")
    whole = evaluated(vit, given, tmp_path / "whole.json")
    made = Crops.__getitem__

    def item(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return made(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Crops, "__getitem__", item)
        with pytest.raises(EarlyStop, match="stopped at step 6 of 8"):
            evaluated(vit, given, tmp_path / "cut.json")
    assert not segment_model.is_model(tmp_path / "cut") and not (tmp_path / "cut.json").exists()
    (kept,) = (tmp_path / "cut").glob("training-*.safetensors")
    other = evaluated(vit, [*given, "steps=2"], tmp_path / "cut.json")  # other keys leave it alone
    assert other["protocol"]["training"]["steps"] == 2 and kept.is_file()
    seen = []
    monkeypatch.setattr(Crops, "__getitem__", lambda self, step: seen.append(step) or made(self, step))
    cut = evaluated(vit, given, tmp_path / "cut.json")
    assert seen == [6, 7] and not kept.exists()
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    assert cut["metrics"] == whole["metrics"] and cut["protocol"]["training"] == whole["protocol"]["training"]


def test_a_killed_training_goes_on(data: Path, vit: Path, tmp_path: Path, capsys):
    """SIGKILL between two saves; the features of a frozen trunk are computed again."""
    given = words(data, "head=multilayer", "augment=false", "steps=600", "save_every=20", "dropout=0.2")
    evaluated(vit, given, tmp_path / "whole.json")
    command = [sys.executable, "-c", "from selfsup.cli import main; main()", "eval", "segment", str(vit), *given]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "cut.json")], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not list((tmp_path / "cut").glob("training-*")) and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    capsys.readouterr()
    evaluated(vit, given, tmp_path / "cut.json")
    assert "goes on at step" in capsys.readouterr().err
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")
    assert not list((tmp_path / "cut").glob("training-*"))


def test_a_damaged_state_is_said_and_training_begins_anew(data: Path, vit: Path, tmp_path: Path, capsys):
    given = words(data, "head=linear", "steps=4", "save_every=2")
    evaluated(vit, given, tmp_path / "whole.json")
    key = segment_model.describe(tmp_path / "whole").key
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / f"training-{key[:16]}.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    evaluated(vit, given, tmp_path / "cut.json")
    assert "the training begins anew" in capsys.readouterr().err
    wanted = weights(tmp_path / "whole")
    assert wanted == weights(tmp_path / "cut")
    (tmp_path / "cut" / "head.safetensors").write_bytes(b"torn")
    evaluated(vit, given, tmp_path / "cut.json")
    assert "it is trained anew" in capsys.readouterr().err and wanted == weights(tmp_path / "cut")


def test_a_finished_training_is_not_repeated(trained: tuple[Path, dict], vit: Path, monkeypatch):
    folder, first = trained
    monkeypatch.setattr(segment_subject, "train_head", lambda *_: pytest.fail("trained again"))
    given = words(folder.parent / "set", "ids=10,20,30,40,50", "head=linear", "augment=false", "steps=60", "lr=0.02")
    again = evaluated(vit, given, folder.with_suffix(".json"))
    assert again["metrics"] == first["metrics"] and again["protocol"]["model"] == str(folder)
    averaged = evaluated(vit, [*given, "test_flip=true"], folder.with_suffix(".json"))
    assert averaged["protocol"]["settings"]["test_flip"]
    with pytest.raises(pytest.fail.Exception):
        evaluated(vit, [*given, "lr=0.03"], folder.with_suffix(".json"))


# ---------------------------------------------------------------------------------------------------------- used again


def test_the_python_call(trained: tuple[Path, dict]):
    folder, result = trained
    model = segment_model.load(folder, device="cpu")
    assert model.classes == result["protocol"]["class_names"] and model.ids == [10, 20, 30, 40, 50]
    assert model.colours.shape == (5, 3) and model.size == 48 and model.mean == (0.45,) * 3
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 48, 48))
    assert logits.shape == (2, 5, 48, 48) and not model.training
    image = np.asarray(Image.open(sorted((folder.parent / "set" / "val" / "images").iterdir())[0]).convert("RGB"))
    large = np.kron(image, np.ones((2, 3, 1), np.uint8))
    assert model.predict(image).shape == (48, 48) and model.predict(large).shape == (96, 144)
    x = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None] / 255 - 0.45) / 0.25
    with torch.no_grad():
        assert torch.equal(model(x)[0].argmax(0), model.predict(image))


@pytest.mark.systems("A trained segmentation model: kept, resumed, applied to other images")
def test_a_model_is_a_target(trained: tuple[Path, dict], tmp_path: Path, capsys):
    """The command line measures it as training did, writes masks, and needs none for them."""
    from selfsup import cli

    folder, result = trained
    val = folder.parent / "set" / "val"
    command = ["eval", "segment", str(folder), f"data={val}/images"]
    out = tmp_path / "again.json"
    more = [f"masks={val}/masks", f"predictions={tmp_path}/known", "--out", str(out)]
    cli.app([*command, *more], standalone_mode=False)
    stored = json.loads(out.read_text())
    assert stored["metrics"] == result["metrics"] and stored["per_class"] == result["per_class"]
    assert stored["protocol"]["model"] == str(folder) and "all pairs" in stored["protocol"]["split"]
    assert (tmp_path / "again.png").is_file() and "trouser" in capsys.readouterr().out

    cli.app([*command, f"predictions={tmp_path}/masks"], standalone_mode=False)
    assert "4 masks in" in capsys.readouterr().out
    files = sorted((tmp_path / "masks").glob("*.png"))
    assert [p.stem for p in files] == sorted(p.stem for p in (val / "images").iterdir())
    model = segment_model.load(folder, device="cpu")
    hits = total = 0
    for path in files:
        with Image.open(path) as picture:
            assert picture.mode == "P" and picture.getpalette()[30:33] == model.colours[0].tolist()
        ids, truth = read_ids(path), read_ids(val / "masks" / path.name)
        assert set(np.unique(ids)) <= {10, 20, 30, 40, 50} and np.array_equal(
            ids, read_ids(tmp_path / "known" / path.name)
        )
        hits, total = hits + int((ids == truth).sum()), total + ids.size
    assert hits / total == pytest.approx(result["metrics"]["pixel_accuracy"], abs=1e-6)


def test_predictions_go_on_and_leave_out_what_cannot_be_read(trained: tuple[Path, dict], tmp_path: Path, capsys):
    folder, _ = trained
    shutil.copytree(folder.parent / "set" / "val" / "images", tmp_path / "images" / "sub")
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no picture")
    given = [f"data={tmp_path}/images", f"predictions={tmp_path}/masks"]
    record = segment.run(str(folder), given)
    assert list(record["unreadable"]) == [str(tmp_path / "images" / "broken.jpg")] and record["images"] == 5
    files = sorted((tmp_path / "masks" / "sub").glob("*.png"))
    assert len(files) == 4
    times = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    segment.run(str(folder), given)
    assert [path for path in files if path.stat().st_mtime_ns != times[path]] == [files[1]]
    segment.run(str(folder), [*given, "test_flip=true"])  # other predictions: all anew
    assert all(path.stat().st_mtime_ns != times[path] for path in files)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["head=mlp", "masks={0}/masks"], "head: .* is a trained model, and nothing is trained"),
        ([], "no masks, so no figures"),
        (["predictions={0}/images"], "in the folder of the images"),
        (["predictions={0}/images/masks"], "in the folder of the images"),
        (["masks={0}/plain"], r"id 0, 1.* is no class; known are 10, 20, 30, 40, 50, 255 to be ignored"),
    ],
)
def test_bad_keys_of_a_model(given: list[str], said: str, trained: tuple[Path, dict], data: Path, tmp_path: Path):
    folder, _ = trained
    shutil.copytree(folder.parent / "set" / "val", tmp_path, dirs_exist_ok=True)
    shutil.copytree(data / "val" / "masks", tmp_path / "plain")
    with pytest.raises(UserError, match=said):
        segment.run(str(folder), [f"data={tmp_path}/images", *(word.format(tmp_path) for word in given)])


def test_a_damaged_folder_is_refused(trained: tuple[Path, dict], tmp_path: Path):
    for name, said in (
        ("head.safetensors", "differs from the sha256"),
        ("backbone/model.safetensors", "not the weights"),
    ):
        folder = shutil.copytree(trained[0], tmp_path / name.partition(".")[0].replace("/", "-"))
        content = bytearray((folder / name).read_bytes())
        content[-5] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=said):
            segment_model.load(folder)
    folder = shutil.copytree(trained[0], tmp_path / "newer")
    (folder / "head.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match="format 2; this version reads 1"):
        segment_model.load(folder)
    with pytest.raises(UserError, match="not a trained segmentation model"):
        segment_model.load(tmp_path)


def test_the_range_of_values_stays_with_the_model(data: Path, vit: Path, tmp_path: Path):
    """A model goes on seeing images as it was trained, unless it is told otherwise."""
    given = words(data, "head=linear", "augment=false", "steps=1", "data.value_range=[0,100]")
    evaluated(vit, given, tmp_path / "r.json")
    model = segment_model.load(tmp_path / "r")
    assert model.value_range == (0.0, 100.0)
    assert segment_model.describe(tmp_path / "r").value_range == (0.0, 100.0)
