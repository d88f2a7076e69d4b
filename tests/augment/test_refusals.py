"""What a user can mend is said before anything is there; two at once, a full disk and a stop leave a whole folder."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from selfsup import augment
from selfsup.augment import folder
from selfsup.cli import main
from selfsup.errors import UserError

WORDS = ["hflip=0.5", "workers=0"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six noise images of two sizes."""
    root, random = tmp_path / "photos", np.random.default_rng(0)
    root.mkdir()
    for n in range(6):
        Image.fromarray(random.integers(0, 256, (40 + n % 2, 50, 3), dtype=np.uint8)).save(root / f"{n}.png")
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
        pytest.param(
            ["device=cuda", f"module={__name__}:Bad"],
            "device=cuda",
            marks=pytest.mark.skipif("torch.cuda.is_available()"),
        ),
    ],
)
def test_what_is_refused_leaves_nothing(photos: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        augment.run(str(photos), tmp_path / "out", [*WORDS, *words])
    assert len(str(caught.value).splitlines()) <= 2 and not (tmp_path / "out").exists()


def test_a_recipe_alone_is_no_beginning(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("# of another one\n")
    (out / "manifest.jsonl").touch()
    assert augment.run(str(photos), out, WORDS)["files"] == 12


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
    os.pwrite(handle, f"{folder.socket.gethostname()} 999999999".encode(), 0)
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
