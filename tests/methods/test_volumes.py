"""MAE and DINO on volumes by the command line: real scans, a bitwise resume, a backbone that loads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import selfsup
from selfsup.cli import app
from selfsup.errors import EarlyStop
from tests import volumes

MAE = ["views.global.size=16", "method.decoder_dim=24", "method.decoder_depth=1", "method.decoder_heads=2"]
DINO = [
    "views.global.size=16", "views.global.slices=12", "views.local.size=8", "views.local.count=2", "method.out_dim=32",
    "method.hidden_dim=16", "method.bottleneck_dim=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return volumes.build(tmp_path_factory.mktemp("brain")) / "train" / "images"


def run(words: list[str]) -> None:
    app(words, standalone_mode=False)


@pytest.mark.systems("3-D ViT on volumes")
@pytest.mark.parametrize(("recipe", "words"), [("mae_vit3d", MAE), ("dino_vit3d", DINO)])
def test_training_resumes_bitwise_and_exports(tmp_path: Path, data: Path, recipe: str, words: list[str]):
    given = ["train", recipe, f"data={data}", *volumes.RUN, *words, "optimizer.lr=0.01", "checkpoint.every=1"]
    run([*given, "--out", str(tmp_path / "whole")])
    with pytest.raises(EarlyStop, match="stopped at step 1 of 2"):
        run([*given, "stop_at=1", "--out", str(tmp_path / "halves")])
    run([*given, "--resume", "--out", str(tmp_path / "halves")])
    whole, halves = (load_file(tmp_path / run / "backbone" / "model.safetensors") for run in ("whole", "halves"))
    assert whole.keys() == halves.keys() and all(torch.equal(whole[k], halves[k]) for k in whole)
    backbone = selfsup.load_backbone(tmp_path / "whole")
    first = selfsup.load_backbone(tmp_path / "halves" / "checkpoints" / "step_00000001")
    assert not torch.equal(first.model.blocks[0].mlp.fc1.weight, backbone.model.blocks[0].mlp.fc1.weight)
    f = backbone(torch.zeros(1, 1, 16, 16, 16))
    assert f.patches.shape == (1, 24, 4, 4, 4) and f.pooled.shape == (1, 24)
    assert (tmp_path / "whole" / "pictures" / "augmentations.png").is_file()
