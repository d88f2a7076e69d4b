"""The Gram teacher: when it becomes the teacher, refused steps among them, and its loss."""

import copy

import pytest
import torch

from selfsup.backbones.create import create_backbone
from selfsup.losses.gram import gram_loss
from selfsup.methods import gram
from selfsup.methods.gram import GramTeacher
from selfsup.schedules import Plan
from tests.methods.tiny import tiny_config


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
    patches = student(images).patches
    loss = anchor.loss(images, patches)
    loss.backward()
    by_hand = (x.flatten(2).transpose(1, 2) for x in (patches.detach(), teacher(images).patches))
    torch.testing.assert_close(loss.detach(), gram_loss(*by_hand).detach())
    assert loss > 0 and all(p.grad is None for p in anchor.parameters())
    assert anchor.loss(images, teacher(images).patches) < 1e-10
