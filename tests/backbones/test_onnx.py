"""Exported backbones: ONNX."""

import importlib.util

import pytest
import torch

from selfsup.backbones import export_onnx, key_stochastic_layers
from selfsup.errors import UserError


@pytest.mark.systems("Export to timm, to transformers, to ONNX, to `torch.export`; torch.hub")
@pytest.mark.parametrize("kind", ["vit", "registers", "resnet"])
def test_onnx(kind, small, tmp_path):
    """Parity on a batch of another size than the one exported with."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    backbone = small(kind, drop_path_rate=0.1).train()
    key_stochastic_layers(backbone, seed=0)
    path = tmp_path / "out" / "model.onnx"
    assert export_onnx(backbone, path) < 1e-4
    assert backbone.training and sorted(p.name for p in path.parent.iterdir()) == ["model.onnx"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [o.name for o in session.get_outputs()] == ["pooled", "patches"]
    images = torch.randn(5, 3, *backbone.image_size)
    pooled, patches = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = backbone.eval()(images)
    assert (torch.from_numpy(pooled) - expected.pooled).abs().max() < 1e-4
    assert (torch.from_numpy(patches) - expected.patches).abs().max() < 1e-4


def test_onnx_at_another_size(small, tmp_path):
    pytest.importorskip("onnxscript")
    assert export_onnx(small("vit", pos_interp="dino"), tmp_path / "m.onnx", size=(48, 24)) < 1e-4


def test_onnx_extra_missing_is_said(small, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "onnxscript" else find(name, *a))
    with pytest.raises(UserError, match=r"needs onnxscript: pip install 'selfsup\[onnx\]'"):
        export_onnx(small("vit"), tmp_path / "m.onnx")


def test_onnx_path_and_size_are_checked(small, tmp_path):
    with pytest.raises(UserError, match=r"ends in \.onnx"):
        export_onnx(small("vit"), tmp_path / "out")
    with pytest.raises(UserError, match="not a multiple of the patch"):
        export_onnx(small("vit"), tmp_path / "m.onnx", size=30)
