"""What a user can mend is said before anything is there; two at once, a full disk and a stop leave a whole folder."""

import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from selfsup import augment
from selfsup.augment import folder
from selfsup.cli import app, main
from selfsup.errors import UserError
from selfsup.guard.processes import Process

WORDS = ["hflip=0.5", "workers=0"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six noise images of two sizes."""
    root, random = tmp_path / "photos", np.random.default_rng(0)
    root.mkdir()
    for n in range(6):
        Image.fromarray(random.integers(0, 256, (40 + n % 2, 50, 3), dtype=np.uint8)).save(root / f"{n}.png")
    return root


def deep(root: Path) -> Path:
    """An image of values 0 to 4000."""
    root.mkdir()
    Image.fromarray(np.linspace(0, 4000, 1600).astype(np.uint16).reshape(40, 40)).save(root / "a.png")
    return root


def masks(root: Path) -> Path:
    """Flat folders of masks in capitals and as .pgm, one of them without that of image 1; and boxes of no image."""
    (root / "few").mkdir(parents=True)
    for n in range(6):
        ids = Image.fromarray(np.full((40 + n % 2, 50), n, np.uint8))
        ids.save(root / (f"{n}.PNG" if n % 2 else f"{n}.pgm"))
    Image.fromarray(np.zeros((40, 50), np.uint8)).save(root / "few" / "a.png")
    coco = {"images": [{"id": 1, "file_name": "0.png"}], "categories": []}
    wrong = {"id": 3, "image_id": 9, "category_id": 1, "bbox": [1, 1, 2, 2]}
    (root / "boxes.json").write_text(json.dumps({**coco, "annotations": [wrong]}))
    return root


class NoWeights(nn.Module):
    """Whose file of weights is not there."""

    def __init__(self) -> None:
        raise FileNotFoundError("weights.pt")


class ProbeOnly(nn.Module):
    """Takes even sizes alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:2], x.shape[2] // 4, 4, x.shape[3] // 4, 4).reshape(x.shape)


class Bad(nn.Module):
    """NaN for grey as for all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 0 * 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([f"module={__name__}:NoWeights"], "FileNotFoundError: weights.pt"),
        ([f"module={__name__}:ProbeOnly"], r"\[1, 3, 40, 50\]"),
        ([f"module={__name__}:Bad"], "NaN"),
        (["module=no_such_thing:Net"], "PYTHONPATH"),
        (["transfer=no_such_run"], "no_such_run"),
        (["channels=13"], "none of the first 6 images can be read with channels=13; .*0.png: 3 channels"),
        (["style=fourier", "styles=nowhere"], "^styles=nowhere"),
        (["masks=MASKS", "ignore=999"], "ignore=999"),
        (["masks=MASKS/few"], r"masks=.*: 0.png: no mask .* \(and 5 more of 6\)"),
        (["boxes=MASKS/boxes.json"], "annotation 3 is of image_id=9"),
        (["data=DEEP"], r"holds uint16, .*value_range=\[low,high\] .*selfsup stats"),
        pytest.param(
            ["device=cuda", f"module={__name__}:Bad"],
            "device=cuda",
            marks=pytest.mark.skipif("torch.cuda.is_available()"),
        ),
    ],
)
def test_what_is_refused_leaves_nothing(photos: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    data = deep(tmp_path / "deep") if "data=DEEP" in words else photos
    flat = str(masks(tmp_path / "masks"))
    words = [w.replace("MASKS", flat) for w in words if w != "data=DEEP"]
    with pytest.raises(UserError, match=expected) as caught:
        augment.run(str(data), tmp_path / "out", [*WORDS, *words])
    assert len(str(caught.value).splitlines()) <= 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "expected"), [("x.yaml", "PNG"), ("0.png/x.png", "cannot be written"), ("", "folder")]
)
def test_a_picture_in_a_bad_place(photos: Path, name: str, expected: str) -> None:
    words = ["augment", "--show", "flips", f"data={photos}", "--picture", str(photos / name)]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError) and re.search(f"^--picture .*{expected}", str(done.exception))


def test_layers_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    from selfsup.augment import transfer
    from selfsup.backbones.backbone import Backbone

    model = timm.create_model("test_resnet", num_classes=0)
    net = Backbone(model, name="test_resnet", options={}, mean=[0.5] * 3, std=[0.5] * 3, input_size=160)
    monkeypatch.setattr(transfer, "load_backbone", lambda target: net)
    with pytest.raises(UserError, match=r"^transfer_layers=\[99\]: test_resnet has layers 0 to"):
        transfer.Transfer("net", 3, 1, 1.0, [99], torch.device("cpu"))


def test_a_recipe_alone_is_no_beginning(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("of something else\n")
    with pytest.raises(UserError, match="holds other things"):
        augment.run(str(photos), out, WORDS)
    (out / "recipe.yaml").write_text("# selfsup augment; data 0\nhflip: 0.1\n")
    (out / "manifest.jsonl").touch()
    assert augment.run(str(photos), out, WORDS)["files"] == 12


def test_masks_as_the_other_verbs_take_them(photos: Path, tmp_path: Path) -> None:
    """Other suffixes, capitals, and a flat folder where the images have class folders."""
    for n in range(6):
        (photos / f"c{n % 2}").mkdir(exist_ok=True)
        (photos / f"{n}.png").rename(photos / f"c{n % 2}" / f"{n}.png")
    flat = masks(tmp_path / "masks")
    augment.run(str(photos), tmp_path / "out", [*WORDS, f"masks={flat}"])
    for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert np.unique(Image.open(tmp_path / "out" / record["mask"])) == int(Path(record["source"]).stem)


def test_sixteen_bits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The range that is given becomes 0 to 255, what cannot be read is said, and a list may lie beside OUT."""
    root = deep(tmp_path / "deep")
    (root / "b.png").write_bytes(b"no image")
    (root / "list.txt").write_text("a.png\nb.png\n")
    augment.run(str(root / "list.txt"), root / "out", [*WORDS, "value_range=[0,4000]", "channels=1"])
    made = np.asarray(Image.open(next((root / "out" / "images").glob("a-*_0.png"))))
    assert made.min() == 0 and made.max() == 255 and len(np.unique(made)) == 256
    assert "1 images cannot be read; the first, " in capfd.readouterr().err


def child(err: Path, limit: int, words: list[str]) -> None:
    """The command line in a forked process, with stderr in a file and no file of more than `limit` bytes."""
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.stderr = open(err, "w")  # noqa: SIM115
    sys.argv = ["selfsup", "augment", *words, *WORDS]
    main()


def started(err: Path, *words: str | Path, limit: int = 0) -> multiprocessing.process.BaseProcess:
    """Such a process, running."""
    made = multiprocessing.get_context("fork").Process(target=child, args=(err, limit, [str(w) for w in words]))
    made.start()
    return made


def test_two_at_once(photos: Path, tmp_path: Path) -> None:
    """The second is refused at once while the first lives, and waits for what a killed one left running."""
    out = tmp_path / "out"
    with folder.alone(out):
        began = time.monotonic()
        with pytest.raises(UserError, match="another selfsup augment writes here"):
            augment.run(str(photos), out, WORDS)
        assert time.monotonic() - began < 5
    holder = subprocess.Popen(["sleep", "1"], pass_fds=[handle := os.open(out / ".lock", os.O_RDWR)])
    folder.fcntl.flock(handle, folder.fcntl.LOCK_EX)
    dead = replace(Process.current(), pid=999999999)
    os.pwrite(handle, json.dumps(asdict(dead)).encode(), 0)
    os.close(handle)  # the child has it still
    assert augment.run(str(photos), out, WORDS)["files"] == 12 and holder.wait() == 0


def test_a_full_disk_and_a_stop(photos: Path, tmp_path: Path) -> None:
    """A file that the disk does not take, then a stop signal, then --resume to the bytes of one run."""
    random = np.random.default_rng(1)
    Image.fromarray(random.integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(photos / "9.png")
    out, err = tmp_path / "out", tmp_path / "stderr"
    small = started(err, photos, out, limit=100_000)
    small.join()
    said = err.read_text()
    assert small.exitcode == 2 and "9-0000006_0.png: cannot be written: File too large; make room" in said, said
    assert len(said.splitlines()) <= 2
    assert augment.run(str(photos), out, WORDS, resume=True)["files"] == 14
    out = tmp_path / "stopped"
    stopped = started(err, photos, out, "copies=100")
    deadline = time.monotonic() + 60
    while not (out / "images" / "1-0000001_0.png").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert stopped.pid is not None
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.join()
    said = err.read_text()
    assert stopped.exitcode == 75 and "--resume goes on" in said and "Traceback" not in said, said
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert records and len(records) % 101 == 0 and len(records) < 7 * 101
    assert all((out / r["image"]).stat().st_size == r["bytes"] for r in records)
