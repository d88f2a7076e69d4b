"""Checkpoints written by earlier versions: read, and gone on with. One folder under tests/fixtures for each format.

tests/fixtures/format_1 was written by commit ac511e5, the last one of format 1's first writer, on one core:

    OMP_NUM_THREADS=1 python -m selfsup.cli train demo --out tests/fixtures/format_1 \\
        backbone=vit_tiny_patch16_224 backbone.in_chans=1 backbone.img_size=32 backbone.patch_size=8 \\
        backbone.embed_dim=16 backbone.depth=1 backbone.num_heads=2 backbone.dynamic_img_size=true \\
        views.global.size=32 views.local.size=16 method.out_dim=16 method.hidden_dim=16 method.bottleneck_dim=8 \\
        "method.freeze_last_layer=2 steps" global_batch=8 steps=10 stop_at=5 precision=fp32 device=cpu threads=1 \\
        workers=0 seed=3 eval.every=null log_every=4 checkpoint.every=3 tensorboard=false

and its backbone/ removed. LOSSES are those of steps 6 to 10 when the same commit went on with it.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import checkpoint
from selfsup.config import load
from selfsup.errors import UserError
from selfsup.log import read_metrics
from selfsup.methods import create
from selfsup.optim import create_optimizer, parameter_groups
from selfsup.optim_state import load_state_tensors, state_tensors

FIXTURES = Path(__file__).resolve().parent / "fixtures"
FORMATS = sorted(FIXTURES.glob("format_*"))
LOSSES = {"format_1": [0.8505745, 1.0178413, 0.8728390, 1.5380930, 1.6259550]}
STEP = "step_00000005"


@pytest.fixture(params=FORMATS, ids=lambda p: p.name)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the run folder."""
    return Path(shutil.copytree(request.param, tmp_path / request.param.name))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


def test_every_format_has_its_folder() -> None:
    """Whoever raises FORMAT adds a run folder of the former one, while its writer is still at hand."""
    assert [p.name for p in FORMATS] == sorted(LOSSES)
    assert {f"format_{n}" for n in range(1, checkpoint.FORMAT)} <= set(LOSSES)


@pytest.mark.parametrize("fixture", FORMATS, ids=lambda p: p.name)
def test_the_folder_is_small_and_knows_no_machine(fixture: Path) -> None:
    files = [p for p in fixture.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 120_000
    for path in files:
        assert not any(word in path.read_bytes() for word in (b"/home", b"/root", b"/tmp", b"/work")), path
    form = json.loads((fixture / "checkpoints" / STEP / "MANIFEST.json").read_text())["format"]
    assert fixture.name == f"format_{form}"


def test_verifies(run: Path) -> None:
    folder, problems = checkpoint.newest_valid(run / "checkpoints")
    assert folder == run / "checkpoints" / STEP and problems == []
    assert (run / "checkpoints" / "latest").read_text().strip() == STEP


def test_loads_what_is_in_the_files(run: Path) -> None:
    """Into the method and the optimizer of today, bit for bit, and out of them again."""
    folder = run / "checkpoints" / STEP
    state = checkpoint.load(folder, 0)
    written = load_file(folder / "model.safetensors")
    assert same(dict(state.model), written) and len(written) > 20
    config = load(str(run / "config.yaml"))
    method = create(config)
    fresh = {k: v.clone() for k, v in method.state_dict().items()}
    assert any(not torch.equal(v, written[k]) for k, v in fresh.items())  # or nothing below could fail
    method.load_state_dict(dict(state.model))
    assert same(dict(method.state_dict()), written)

    moments = load_file(folder / "optimizer.safetensors")
    trainable = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    optimizer = create_optimizer(config.optimizer, parameter_groups(trainable, config.optimizer.layer_decay))
    load_state_tensors(optimizer, state.optimizer)
    assert same(dict(state_tensors(optimizer)), moments) and any(v.abs().max() > 0 for v in moments.values())
    assert state.rank["rng.torch"].dtype == torch.uint8 and state.trainer["step"] == 5


def test_goes_on_to_the_end(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its five lines of the log stay as they are; the next five are those its own version wrote, but for rounding."""
    before = (run / "metrics.jsonl").read_bytes()
    result = selfsup.train(load(str(run / "config.yaml")), out=run, resume=True)
    assert "resuming at step 5" in capfd.readouterr().err
    assert result.steps == 10 and (run / "metrics.jsonl").read_bytes().startswith(before)
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))
    for line, expected in zip(lines[5:], LOSSES[run.name], strict=True):
        assert math.isclose(line["loss"], expected, rel_tol=1e-3), (line["step"], line["loss"], expected)
    folder, _ = checkpoint.newest_valid(run / "checkpoints")
    assert folder is not None and folder.name == "step_00000010"
    assert selfsup.load_backbone(str(run)) is not None


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "MANIFEST.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_newer_format_is_refused_in_words(run: Path) -> None:
    folder = run / "checkpoints" / STEP
    edit(folder, format=checkpoint.FORMAT + 1)
    with pytest.raises(
        checkpoint.InvalidCheckpoint, match=rf"format {checkpoint.FORMAT + 1} is newer than this version"
    ):
        checkpoint.verify(folder)
    with pytest.raises(
        UserError, match="update selfsup"
    ):  # and not passed over: what a later version did is not undone
        checkpoint.newest_valid(run / "checkpoints")
