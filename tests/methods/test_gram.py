"""The Gram teacher: when it becomes the teacher, refused steps among them, and its loss."""

import copy
from pathlib import Path

import pytest
import torch

from selfsup.backbones.create import create_backbone
from selfsup.losses.gram import gram_loss
from selfsup.methods import gram
from selfsup.methods.gram import GramTeacher
from selfsup.methods.patches import tokens_of
from selfsup.schedules import Plan
from tests.methods.test_contract import build
from tests.methods.tiny import tiny_config, write_images


def tiny():
    config = tiny_config("dino")
    return create_backbone(config.backbone, mean=config.mean, std=config.std, input_size=32)


def test_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """One before step 3 and one every 4 steps; one whose step was refused is taken at the next, if that is soon."""
    monkeypatch.setattr(gram, "LATE", 2)
    plan = Plan(steps=20, images=100, global_batch=10)
    s = gram.schedules(2.0, "3 steps", "4 steps", plan)
    assert [s["gram_weight"](step) for step in (0, 2, 3, 19)] == [0, 0, 2, 2]
    assert [s["gram_copies"](step) for step in range(8)] == [0.5, 0.5, 1, 1, 1.5, 1.5, 2, 2]
    assert gram.schedules(1.0, "0 steps", "50%", plan)["gram_copies"](0) == 1

    teacher = tiny()
    anchor = GramTeacher(teacher)
    assert all(not p.requires_grad for p in anchor.parameters())
    weight = teacher.model.blocks[0].attn.qkv.weight
    taken = []
    for step in range(16):
        with torch.no_grad():
            weight.fill_(float(step + 1))
        before = copy.deepcopy(anchor.state_dict())
        ok = torch.tensor(float(step not in (6, 10, 11, 12)))
        anchor.after_step(teacher, s["gram_copies"](step), ok)
        after = anchor.state_dict()
        if not ok:
            assert all(torch.equal(before[k], after[k]) for k in before)
        if anchor.backbone.model.blocks[0].attn.qkv.weight[0, 0] == step + 1:
            taken.append(step)
    assert taken == [2, 7, 14] and anchor.copies == 4


def test_loss() -> None:
    student, teacher = tiny(), tiny()
    anchor = GramTeacher(teacher)
    images = torch.randn(2, 3, 32, 32)
    tokens = tokens_of(student, student(images))
    loss = anchor.loss(images, tokens)
    loss.backward()
    mine, other = (tokens_of(x, x(images)).detach().unflatten(0, (2, 16)) for x in (student, teacher))
    torch.testing.assert_close(loss.detach(), gram_loss(mine, other))
    assert loss > 0 and all(p.grad is None for p in anchor.parameters())
    assert anchor.loss(images, tokens_of(teacher, teacher(images))) < 1e-10


def test_start_at_once() -> None:
    """A run that goes on from another: its teacher is loaded after the copy was made, so step 0 goes without."""
    s = gram.schedules(2.0, "0 steps", "50 steps", Plan(steps=100, images=100, global_batch=10))
    assert [s["gram_weight"](step) for step in (0, 1)] == [0, 2] and s["gram_copies"](0) == 1


def test_in_dinov2(tmp_path: Path) -> None:
    """From its first step on it is in the loss, once; the log has it then, and the Gram teacher is of the step before."""
    images = write_images(tmp_path / "images")
    options = ["method.gram_weight=2", "method.gram_start=2 steps", "method.gram_every=3 steps"]
    method, batch, s = build("dinov2", images, *options)
    without, _, _ = build("dinov2", images, "method.gram_weight=0")
    for step, weight in ((1, 0.0), (2, 2.0)):
        s = {**s, "gram_weight": weight, "gram_copies": 0.5}
        with torch.no_grad():
            for block in method.gram.backbone.model.blocks:
                block.attn.qkv.weight.mul_(1.5)
        out, plain = method(batch, s), without(batch, s)
        assert (out["gram_loss"] > 0) == (step == 2)
        torch.testing.assert_close(out["loss"], plain["loss"] + weight * out["gram_loss"])
    method.after_step({**s, "momentum": 0.5, "gram_copies": 1}, torch.tensor(1.0))
    taught = method.teacher.backbone.state_dict()
    assert all(torch.equal(v, taught[k]) for k, v in method.gram.backbone.state_dict().items())
