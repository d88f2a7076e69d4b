"""The loop: resume, refusal, host syncs, periodic evaluation, collapse, refused steps, Python data sets."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import selfsup
from selfsup import EarlyStop, UserError
from selfsup.config import BackboneConfig, dump
from selfsup.log import read_metrics
from selfsup.methods.dino import DINO
from tests.methods.tiny import tiny_config, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def config_for(images: Path, *overrides: str) -> selfsup.Config:
    return tiny_config("dino", f"data={images}", "precision=fp32", *overrides)


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    keep = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("time", "img_per_s", "data_wait")} for line in keep]


def files(run: Path, step: int) -> dict[str, bytes]:
    folder = run / "checkpoints" / f"step_{step:08d}"
    names = ("model.safetensors", "optimizer.safetensors", "rank_00000.safetensors")
    weights = {name: (folder / name).read_bytes() for name in names}
    return {**weights, **{p.name: p.read_bytes() for p in (run / "backbone").iterdir()}}


@pytest.mark.parametrize(
    ("overrides", "backbone"),
    [
        (["precision=fp32"], None),
        (["precision=bf16"], None),
        (["optimizer=sgd"], "resnet10t"),
        ([], "efficientvit_b0"),
        (["optimizer=lars", "optimizer.lr=1", "optimizer.nesterov=true"], None),
        (["optimizer=lamb", "optimizer.lr=1e-2", "optimizer.l1=1e-4", "optimizer.head_weight_decay=0.5"], None),
        (["optimizer=adafactor", "optimizer.lr=1e-3", "optimizer.schedule=constant", "optimizer.cooldown=50%"], None),
        (["optimizer=adabound", "optimizer.lr=1e-3", "optimizer.warmup=0%"], None),
    ],
)
def test_stop_and_resume_is_bitwise(images: Path, tmp_path: Path, overrides: list[str], backbone: str | None) -> None:
    """Stopped twice, resumed with other worker counts: log, weights, optimizer and export are the same bytes."""
    config = config_for(images, "backbone.drop_path_rate=0.2", "accumulate=2", *overrides)
    if backbone:  # batch norm; convolutions, whose weights and moments are channels-last in memory
        config = config.model_copy(update={"backbone": BackboneConfig(name=backbone)})
    selfsup.train(config, out=tmp_path / "whole", quiet=True)
    for stop_at, workers in ((3, 0), (7, 2), (None, 1)):
        part = config.model_copy(update={"stop_at": stop_at, "workers": workers})
        if stop_at:
            with pytest.raises(EarlyStop, match="--resume"):
                selfsup.train(part, out=tmp_path / "parts", resume=True, quiet=True)
        else:
            selfsup.train(part, out=tmp_path / "parts", resume=True, quiet=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "parts")] == list(range(1, 11))
    assert files(tmp_path / "parts", 10) == files(tmp_path / "whole", 10)


def test_resume_refuses_another_run(images: Path, tmp_path: Path) -> None:
    config = config_for(images, "stop_at=2")
    with pytest.raises(EarlyStop):
        selfsup.train(config, out=tmp_path, quiet=True)
    with pytest.raises(UserError, match="already holds a run; add --resume"):
        selfsup.train(config, out=tmp_path, quiet=True)
    with pytest.raises(UserError, match=r"optimizer\.base_lr=0\.1 differs from the run's 0\.0005"):
        selfsup.train(config_for(images, "optimizer.base_lr=0.1"), out=tmp_path, resume=True, quiet=True)
    with pytest.raises(UserError, match="steps=5 differs"):
        selfsup.train(config_for(images, "steps=5"), out=tmp_path, resume=True, quiet=True)
    other = write_images(tmp_path / "other", count=30)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    (other / "image_000.png").rename(other / "renamed.png")
    with pytest.raises(UserError, match=r"data\.path"):
        selfsup.train(config_for(other), out=tmp_path, resume=True, quiet=True)


def test_steps_may_grow(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selfsup.train(config_for(images, "steps=4"), out=tmp_path, quiet=True)
    selfsup.train(config_for(images, "steps=6"), out=tmp_path, resume=True)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert "steps grows from 4 to 6" in capsys.readouterr().err


def test_resume_of_nothing_starts_at_zero(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selfsup.train(config_for(images, "steps=2"), out=tmp_path / "new", resume=True)
    assert "nothing to resume" in capsys.readouterr().err
    assert len(lines(tmp_path / "new")) == 2


def test_changed_files_are_refused(tmp_path: Path) -> None:
    """The list of images is part of the state."""
    data = write_images(tmp_path / "data")
    with pytest.raises(EarlyStop):
        selfsup.train(config_for(data, "stop_at=2"), out=tmp_path / "run", quiet=True)
    (data / "image_003.png").unlink()
    with pytest.raises(UserError, match="list of images"):
        selfsup.train(config_for(data), out=tmp_path / "run", resume=True, quiet=True)


class CountSyncs(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_no_host_sync_between_logging_steps(images: Path, tmp_path: Path, optimizer: str) -> None:
    """Twice the steps, as many logging steps: not one more look at a tensor's value."""
    counts = []
    for steps in (6, 12):
        config = config_for(
            images,
            *(f"steps={steps}", "log_every=100", f"optimizer={optimizer}", "optimizer.l1=1e-5"),
            "backbone.drop_path_rate=0.1",
        )
        with CountSyncs() as syncs:
            selfsup.train(config, out=tmp_path / str(steps), quiet=True)
        counts.append(syncs.count)
    assert counts[0] == counts[1] > 0


def test_periodic_evaluation(images: Path, tmp_path: Path) -> None:
    """Called with the exported backbone every eval.every steps and at the end; logged in that step's one line."""
    seen = []

    def evaluate(backbone: torch.nn.Module, step: int) -> dict[str, float]:
        seen.append((step, backbone.training))
        return {"knn_top1": step / 100}

    result = selfsup.train(config_for(images, "eval.every=4"), out=tmp_path, evaluate=evaluate, quiet=True)
    assert seen == [(4, False), (8, False), (10, False)]
    assert {x["step"]: x["eval"]["knn_top1"] for x in lines(tmp_path) if "eval" in x} == {4: 0.04, 8: 0.08, 10: 0.1}
    assert [x["step"] for x in lines(tmp_path)] == list(range(1, 11))
    assert result.evaluations == {"knn_top1": 0.1}


class InMemory(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A user's data set: arrays and labels."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(index)
        return rng.integers(0, 255, (36, 36, 3), dtype=np.uint8), index % 3


class Poisoned(DINO):
    """DINO whose loss is NaN at steps 3 and 4."""

    poisoned = (3, 4)

    def forward(self, batch, s):  # type: ignore[no-untyped-def]
        out = super().forward(batch, s)
        if batch.step in self.poisoned:
            out["loss"] = out["loss"] * float("nan")
        return out


class AlwaysPoisoned(Poisoned):
    """Never finite from step 3 on."""

    poisoned = tuple(range(3, 1000))


OUTSIDE = [
    "method=tests.test_train:Poisoned",
    "method.out_dim=64",
    "method.hidden_dim=48",
    "method.bottleneck_dim=16",
]


def test_dataset_and_method_from_outside(tmp_path: Path) -> None:
    """A torch Dataset and a class named package.module:Class; two refused steps are counted and training goes on."""
    config = tiny_config("dino", *OUTSIDE, "precision=fp32")
    selfsup.train(config, out=tmp_path, dataset=InMemory(), quiet=True)
    found = lines(tmp_path)
    assert [x["loss"] for x in found[3:5]] == ["nan", "nan"]
    assert [x.get("refused_in_row") for x in found] == [None, None, None, 1, 2] + [None] * 5
    assert all(isinstance(x["loss"], float) for x in found if x["step"] not in (4, 5))


def test_refused_steps_leave_weights_and_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Never finite again: weights stay those of step 3, and the run stops saying so."""
    base = tiny_config("dino", *OUTSIDE, "precision=fp32", "steps=40")
    with pytest.raises(EarlyStop):
        selfsup.train(base.model_copy(update={"stop_at": 3}), out=tmp_path, dataset=InMemory(), quiet=True)
    before = files(tmp_path, 3)
    method = base.method.model_copy(update={"name": "tests.test_train:AlwaysPoisoned"})
    broken = base.model_copy(update={"method": method, "stop_at": 8})
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("test_train:Poisoned", "test_train:AlwaysPoisoned"))
    with pytest.raises(EarlyStop):
        selfsup.train(broken, out=tmp_path, dataset=InMemory(), resume=True)
    assert "not finite" in capsys.readouterr().err
    after = files(tmp_path, 8)
    assert after["model.safetensors"] == before["model.safetensors"]
    assert after["optimizer.safetensors"] == before["optimizer.safetensors"]
    with pytest.raises(UserError, match=r"loss.* not finite for 1\d steps in a row"):
        selfsup.train(broken.model_copy(update={"stop_at": None}), out=tmp_path, dataset=InMemory(), resume=True)


COLLAPSES = {
    # no sharpening: every image gets the uniform distribution
    "collapse: uniform": ["method.teacher_temp=2.0", "method.warmup_teacher_temp=2.0"],
    # no centring: every image gets the same prototype
    "collapse: constant": [
        "method.center_momentum=1.0",
        "method.teacher_temp=0.01",
        "method.warmup_teacher_temp=0.01",
        "method.momentum=0.5",
        "method.freeze_last_layer=0 steps",
        "optimizer.lr=0.02",
        "optimizer.warmup=1 steps",
        "optimizer=sgd",
    ],
}


@pytest.mark.parametrize("kind", COLLAPSES)
def test_collapse_is_named(images: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_for(images, "steps=60", *COLLAPSES[kind])
    selfsup.train(config, out=tmp_path)
    named = [x["step"] for x in lines(tmp_path) if x["health"]["state"] == kind]
    assert named and named[0] <= 50
    assert kind in capsys.readouterr().err


def test_signal_saves_and_resumes_bitwise(images: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle, with loader workers: one checkpoint, exit 75; the resumed run is the undisturbed one."""
    config = config_for(images, "steps=150", "workers=2", "log_every=1")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config))
    selfsup.train(config, out=tmp_path / "whole", quiet=True)
    command = [sys.executable, "-m", "selfsup.cli", "train", str(recipe), "--out", str(tmp_path / "run"), "--resume"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while len(read_metrics(tmp_path / "run" / "metrics.jsonl")) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "SIGTERM" in err and "Traceback" not in err
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert files(tmp_path / "run", 150) == files(tmp_path / "whole", 150)


def test_grad_checkpointing_is_the_same_run(images: Path, tmp_path: Path) -> None:
    """Recomputing activations draws the same drop path masks, for crops of both sizes."""
    losses = []
    for option in ("false", "true"):
        config = config_for(images, f"grad_checkpointing={option}", "backbone.drop_path_rate=0.3")
        selfsup.train(config, out=tmp_path / option, quiet=True)
        losses.append([x["loss"] for x in lines(tmp_path / option)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.slow
def test_compile_is_the_same_run(images: Path, tmp_path: Path) -> None:
    losses = []
    for option in ("false", "true"):
        config = config_for(images, f"compile={option}", "backbone.drop_path_rate=0.3", "steps=4")
        selfsup.train(config, out=tmp_path / option, quiet=True)
        losses.append([x["loss"] for x in lines(tmp_path / option)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_run_folder_is_complete(images: Path, tmp_path: Path) -> None:
    """config.yaml is a recipe of the same run; the log holds what DESIGN.md lists; the manifest verifies."""
    config = config_for(images, "steps=4", "log_every=2")
    selfsup.train(config, out=tmp_path / "a", quiet=True)
    again = selfsup.load_config(str(tmp_path / "a" / "config.yaml"))
    selfsup.train(again, out=tmp_path / "b", quiet=True)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert (tmp_path / "a" / "config.yaml").read_text() == (tmp_path / "b" / "config.yaml").read_text()
    line = read_metrics(tmp_path / "a" / "metrics.jsonl")[-1]
    expected = "step epoch samples loss lr wd momentum teacher_temp health img_per_s data_wait grad_norm"
    assert set(expected.split()) <= line.keys()
    assert {"teacher_entropy", "feature_std", "kl", "state"} <= line["health"].keys()
    manifest = json.loads((tmp_path / "a" / "checkpoints" / "step_00000004" / "MANIFEST.json").read_text())
    assert manifest["format"] == 1 and "model.safetensors" in manifest["files"]
    assert (tmp_path / "a" / "checkpoints" / "latest").read_text().strip() == "step_00000004"
