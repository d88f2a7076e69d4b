"""Every kind of target, and what is said about those that are none."""

import shutil
from pathlib import Path

import pytest
import torch

from selfsup import config, methods
from selfsup.backbones import load_backbone
from selfsup.errors import UserError
from selfsup.eval.targets import open_target, run_config, weights_hash


def test_run_checkpoint_and_export_are_the_same_weights(run: Path):
    step = next((run / "checkpoints").glob("step_*"))
    targets = [
        str(run),
        str(step),
        f"{run}@teacher",
        str(run / "backbone"),
        str(run / "backbone" / "model.safetensors"),
    ]
    found = [open_target(t, device="cpu") for t in targets]
    assert len({t.checkpoint_hash for t in found}) == 1
    assert [t.kind for t in found] == ["run", "checkpoint", "run", "backbone", "backbone"]
    assert [t.run is not None for t in found] == [True, True, True, False, False]
    assert found[1].step == found[2].step == 6
    for t in found:
        assert not t.backbone.training and not any(p.requires_grad for p in t.backbone.parameters())
    assert found[0].facts()["checkpoint_hash"] == weights_hash(load_backbone(run).model)


def test_student_differs_from_teacher(run: Path):
    student, teacher = open_target(f"{run}@student", device="cpu"), open_target(str(run), device="cpu")
    assert student.kind == "student" and student.checkpoint_hash != teacher.checkpoint_hash
    step = next((run / "checkpoints").glob("step_*"))
    assert open_target(f"{step}@student", device="cpu").checkpoint_hash == student.checkpoint_hash


def test_random_is_what_the_run_started_from(run: Path):
    before = torch.random.get_rng_state()
    found = open_target(f"random:{run}", device="cpu")
    assert torch.equal(before, torch.random.get_rng_state())
    method = methods.create(methods.complete(config.load(str(run / "config.yaml"))))
    assert found.checkpoint_hash == weights_hash(method.student.backbone.model)
    assert found.kind == "random" and found.run == run
    assert open_target("random:demo", device="cpu").run is None


def test_pixels():
    found = open_target("pixels", device="cpu")
    assert found.backbone is None and found.facts() == {"name": "pixels", "kind": "pixels", "checkpoint_hash": "pixels"}


def test_refused(run: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    shutil.copy(run / "config.yaml", untrained)
    for target, words in [
        (f"{run}@studnet", "did you mean student"),
        (str(tmp_path / "nothing"), "no such file or folder"),
        (str(empty), "neither a run"),
        (f"{empty}@student", "not a run folder"),
        (f"random:{empty}", "not a run folder"),
        (f"{untrained}@student", "no complete checkpoint"),
    ]:
        with pytest.raises(UserError, match=words):
            open_target(target, device="cpu")
    with pytest.raises(UserError, match=r"no config.yaml"):
        run_config(empty)
