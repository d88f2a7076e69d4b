"""Exported backbones: programs of torch.export, also in a process that knows neither this package nor timm."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selfsup import cli
from selfsup.backbones.export import export_timm
from selfsup.backbones.program import export_program
from selfsup.errors import UserError

_ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("selfsup", "timm"):
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
import torch
images, pooled, patches = torch.load(sys.argv[2], weights_only=True)
found = torch.export.load(sys.argv[1]).module()(images)
print(max(float((a - b).abs().max()) for a, b in zip(found, (pooled, patches))))
"""


@pytest.mark.parametrize("kind", ["vit", "registers", "resnet"])
def test_program_equals_the_model(kind, small, tmp_path: Path):
    """On a batch of another length than the ones that it was traced and tried with."""
    backbone = small(kind).train()
    path = tmp_path / "out" / "model.pt2"
    assert export_program(backbone, path) < 1e-5
    assert backbone.training and [p.name for p in path.parent.iterdir()] == ["model.pt2"]
    images = torch.randn(5, 3, *backbone.image_size)
    with torch.no_grad():
        expected = backbone.eval()(images)
    if kind == "vit":
        torch.save((images, expected.pooled, expected.patches), tmp_path / "expected.pt")
        words = [sys.executable, "-c", _ALONE, str(path), str(tmp_path / "expected.pt")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr[-2000:]
        assert float(done.stdout.splitlines()[-1]) < 1e-5
    pooled, patches = torch.export.load(path).module()(images)
    torch.testing.assert_close(pooled, expected.pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(patches, expected.patches, rtol=1e-5, atol=1e-5)


@pytest.mark.systems("Export to timm, to transformers, to ONNX, to `torch.export`; torch.hub")
def test_the_command_and_its_faults(small, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    backbone = small("vit")
    export_timm(backbone, tmp_path / "backbone")
    words = ["export", str(tmp_path / "backbone"), str(tmp_path / "m.pt2"), "--format", "torch"]
    cli.app(words, standalone_mode=False)
    assert "m.pt2: largest difference to ours" in capsys.readouterr().out and (tmp_path / "m.pt2").stat().st_size > 1000
    with pytest.raises(UserError, match=r"ends in \.pt2"):
        export_program(backbone, tmp_path / "m.pt")
    with pytest.raises(UserError, match="not a multiple of the patch"):
        export_program(backbone, tmp_path / "m.pt2", size=30)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export_program(backbone, tmp_path / "file" / "m.pt2")
    with pytest.raises(UserError, match="known are timm, onnx and torch"):
        cli.app([*words[:-1], "jax"], standalone_mode=False)
