"""Exported backbones: folders that timm loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from selfsup.backbones import export_timm, key_stochastic_layers, load_backbone, timm_difference
from selfsup.errors import UserError


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.systems("Export to timm, to transformers, to ONNX, to `torch.export`; torch.hub")
def test_bare_timm_gives_the_same_bits(kind, small, tmp_path):
    channels = 13 if kind in {"vit", "swin", "convnext"} else 3
    backbone = small(kind, channels=channels)
    export_timm(backbone, tmp_path)
    bare = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(3, channels, *backbone.image_size)
    with torch.no_grad():
        assert torch.equal(bare(images), backbone(images).pooled)
        assert torch.equal(bare(images), load_backbone(tmp_path)(images).pooled)
    assert timm_difference(backbone, tmp_path) == 0.0
    assert sorted(files(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", ["vit", "registers", "swin", "convnext", "resnet"])
def test_transformers_reads_the_same_folder(kind, small, tmp_path):
    """As TimmWrapperModel, with the same bits; its image processor has the normalisation and the size."""
    from transformers import AutoImageProcessor, AutoModel

    backbone = small(kind)
    export_timm(backbone, tmp_path)
    images = torch.randn(3, 3, *backbone.image_size)
    wrapped = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found, expected = wrapped(images), backbone(images)
    assert type(wrapped).__name__ == "TimmWrapperModel" and torch.equal(found.pooler_output, expected.pooled)
    if kind in ("vit", "registers"):
        skipped = found.last_hidden_state.shape[1] - expected.patches[0, 0].numel()
        patches = found.last_hidden_state[:, skipped:].mT.unflatten(2, expected.patches.shape[2:])  # [B, D, h, w]
        assert torch.equal(patches, expected.patches)
    described = AutoImageProcessor.from_pretrained(tmp_path).data_config
    assert described["mean"] == pytest.approx(backbone.mean) and described["std"] == pytest.approx(backbone.std)
    assert list(described["input_size"]) == [3, *backbone.image_size]


def test_other_sizes_too(small, tmp_path):
    """With timm's own resampling, bare timm agrees at any size."""
    backbone = small("vit")
    export_timm(backbone, tmp_path)
    assert timm_difference(backbone, tmp_path, size=(48, 24)) == 0.0


def test_options_of_the_architecture_are_recorded(small, tmp_path):
    export_timm(small("vit", drop_path_rate=0.2, drop_rate=0.1), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    wanted = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 32, "in_chans": 3}
    assert config["model_args"] == {**wanted, "dynamic_img_size": True}
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["selfsup"] == {"pos_interp": "timm"}
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7)  # timm's own fine-tuning
    assert tuned(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_identical_weights_give_identical_files(small, tmp_path):
    """Whatever the folder, the mode, the training options and the layers made for training."""
    first = small("vit")
    export_timm(first, tmp_path / "a")
    second = small("vit", drop_path_rate=0.3).train()
    second.load_state_dict(first.state_dict())
    key_stochastic_layers(second, seed=1)
    second.set_grad_checkpointing(True)
    second.model.blocks[0].mlp.fc1.weight.data = second.model.blocks[0].mlp.fc1.weight.data.t().contiguous().t()
    export_timm(second, tmp_path / "deep" / "folder")
    assert files(tmp_path / "a") == files(tmp_path / "deep" / "folder")
    export_timm(load_backbone(tmp_path / "a"), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    export_timm(first.double(), tmp_path / "a")  # over an old one, from float64
    assert files(tmp_path / "a") == files(tmp_path / "b")
    text = (tmp_path / "a" / "model.safetensors").read_bytes()[:4096] + (tmp_path / "a" / "config.json").read_bytes()
    assert str(tmp_path).encode() not in text
    assert second.training


def test_identical_files_from_another_process(small, tmp_path):
    export_timm(small("swin"), tmp_path / "a")
    code = (
        "from selfsup.backbones import load_backbone, export_timm; "
        f"export_timm(load_backbone({str(tmp_path / 'a')!r}), {str(tmp_path / 'b')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_no_permission_is_said(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the backbone cannot be written"):
        export_timm(small("vit"), tmp_path / "file" / "out")


def test_pretrained_without_network_is_one_line():
    code = (
        "from selfsup.config import BackboneConfig; from selfsup.backbones import create_backbone\n"
        "try: create_backbone(BackboneConfig(name='resnet18', pretrained=True), mean=(0.5,) * 3, std=(0.5,) * 3)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
    assert out.startswith("UserError backbone.pretrained=true: the weights of resnet18 could not be fetched")
    assert out.count("\n") <= 2
