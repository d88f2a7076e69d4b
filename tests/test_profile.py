"""profile=true: a table whose parts are the steps' whole time, a trace, and a run that is the same to the last bit."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfsup import config
from selfsup.backbones import Backbone
from selfsup.profile import PARTS, TABLE, TRACE, WARM, Profile, table

training = importlib.import_module("selfsup.train")
WORDS = [
    "data=demo", "backbone=vit_tiny_patch16_224", "backbone.in_chans=1", "backbone.img_size=28", "backbone.patch_size=7",
    "backbone.embed_dim=24", "backbone.depth=2", "backbone.num_heads=3", "backbone.dynamic_img_size=true",
    "views.global.size=28", "views.local.size=14", "views.local.count=2", "method.out_dim=64", "method.hidden_dim=32",
    "method.bottleneck_dim=16", "global_batch=8", "workers=0", "threads=1", "device=cpu", "precision=fp32",
    "tensorboard=false",
]  # fmt: skip


def run(out: Path, *words: str) -> None:
    training.train(config.load(None, [*WORDS, *words]), out=out, quiet=True)


def test_table_and_trace(tmp_path: Path):
    embed = Backbone.embed
    steps = WARM + TABLE + TRACE + 2
    run(tmp_path / "a", f"steps={steps}", "profile=true")
    run(tmp_path / "b", f"steps={steps}")
    found = json.loads((tmp_path / "a/profile/table.json").read_text())
    assert found["steps"] == TABLE and set(found["ms_a_step"]) == set(PARTS)
    assert all(ms > 0 for ms in found["ms_a_step"].values()), found
    trace = json.loads((tmp_path / "a/profile/trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"]]
    assert {f"selfsup: {part}" for part in PARTS} <= set(names)
    assert sum(name == "selfsup: backward" for name in names) >= TRACE
    assert not (tmp_path / "b/profile").exists() and Backbone.embed is embed
    weights = [load_file(tmp_path / name / "backbone/model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_short_run_has_a_table_alone(tmp_path: Path):
    """With the checkpoint at its end as a part of its own."""
    run(tmp_path, f"steps={WARM + 3}", "profile=true", "accumulate=2")
    found = json.loads((tmp_path / "profile/table.json").read_text())
    assert found["steps"] == 3 and found["ms_a_step"]["checkpoint"] > 0
    assert not (tmp_path / "profile/trace.json").exists()


class Method(torch.nn.Module):
    """Student, teacher and a head that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher, self.head = (torch.nn.Linear(2, 2) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.student(x) + self.teacher(x))

    def backbones(self) -> dict[str, torch.nn.Module]:
        return {"student": self.student, "teacher": self.teacher}

    def after_step(self) -> None: ...


def test_every_moment_belongs_to_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a clock that ticks once a mark: each part gets as many ticks as it has marks, and hooks are gone at the end."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("selfsup.profile.time.perf_counter", lambda: next(ticks) / 1000)
    method, said = Method(), []
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    profile = Profile(method, optimizer, torch.device("cpu"), tmp_path, said.append)
    for _ in range(WARM + TABLE):
        profile.phase("data")
        optimizer.zero_grad()
        profile.phase("forward")
        loss = method(torch.ones(1, 2)).sum()
        profile.phase("backward")
        loss.backward()
        profile.phase("optimizer")
        method.after_step()
        profile.phase("agree")
    profile.finish()
    found = json.loads((tmp_path / "table.json").read_text())["ms_a_step"]
    # head + loss: around two backbones and after the method; optimizer: zero_grad and step; log: record and agree
    expected = {"head + loss": 4, "optimizer": 2, "log": 2}
    assert found == pytest.approx({part: expected.get(part, 1) for part in PARTS})
    assert "where a step goes" in said[0]
    assert not method._forward_hooks and "after_step" not in vars(method) and "zero_grad" not in vars(optimizer)


def test_table_adds_up():
    text = table({"data": 25.0, "backward": 75.0}, 4)
    assert "100.0 ms each" in text and "25.0%" in text and "75.0%" in text
