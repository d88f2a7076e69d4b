"""Xavier initialisation: equation 16 of the paper, what it leaves alone, and that it is the seed's alone."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from selfsup import methods
from selfsup.backbones import create_backbone
from selfsup.backbones.export import export_timm
from selfsup.backbones.xavier import bound, xavier
from selfsup.config import BackboneConfig, load
from selfsup.errors import UserError
from tests.methods.tiny import tiny_config


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(300, 100), nn.Conv2d(16, 64, 3), nn.Conv1d(40, 30, 5), nn.Conv3d(8, 12, 3)],
    ids=lambda layer: type(layer).__name__,
)
def test_is_torchs(layer: nn.Module) -> None:
    torch.manual_seed(0)
    xavier(layer)
    torch.manual_seed(0)
    expected = nn.init.xavier_uniform_(torch.empty_like(layer.weight))
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-6, atol=0)
    assert not layer.bias.any()
    torch.testing.assert_close(layer.weight.std().item(), bound(layer.weight) / math.sqrt(3), rtol=0.05, atol=0)


def test_groups_and_stacked_matrices() -> None:
    """A depthwise convolution's unit goes to one other, not to all; q, k and v are three matrices, not a tall one."""
    depthwise = nn.Conv2d(64, 64, 3, groups=64)
    assert bound(depthwise.weight, groups=64) == pytest.approx(math.sqrt(6 / (9 + 9)))
    block = nn.ModuleDict({"qkv": nn.Linear(32, 96), "fc1": nn.Linear(32, 96)})
    xavier(block)
    joint, tall = block["qkv"].weight.abs().max().item(), block["fc1"].weight.abs().max().item()
    assert math.sqrt(6 / 64) * 0.95 < joint <= math.sqrt(6 / 64) and tall <= math.sqrt(6 / 128)


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(3)
    return create_backbone(BackboneConfig(name=name, **options), mean=(0.5,) * 3, std=(0.5,) * 3).model


@pytest.mark.parametrize(
    ("name", "options"),
    [("resnet10t", {}), ("vit_tiny_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 2})],
)
def test_of_a_backbone(name: str, options: dict[str, object]) -> None:
    """Every linear layer and convolution, and nothing else."""
    plain, other = build(name, **options), build(name, init="xavier", **options)
    mine = {
        f"{n}.{k}"
        for n, m in other.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d))
        for k in ("weight", "bias")
    }
    state = plain.state_dict()
    changed = {key for key, value in other.state_dict().items() if not torch.equal(value, state[key])}
    assert changed <= mine and {k for k in mine if k.endswith("weight")} <= changed
    assert not any(other.state_dict()[k].any() for k in mine if k.endswith("bias") and k in state)


def test_is_the_seeds_alone(tmp_path: Path) -> None:
    """Seeded as all weights are; student and teacher alike; nothing of it in what is exported."""
    config = methods.complete(tiny_config("dino", "backbone.init=xavier"))
    first = methods.create(config)
    torch.rand(7)
    second = methods.create(config)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    other = methods.create(config.model_copy(update={"seed": 1}))
    key = "student.backbone.model.blocks.0.mlp.fc1.weight"
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])
    assert torch.equal(first.state_dict()[key], first.state_dict()[key.replace("student", "teacher")])
    export_timm(first.export(), tmp_path)
    assert "init" not in json.loads((tmp_path / "config.json").read_text())["model_args"]


def test_not_with_pretrained_weights() -> None:
    for given in (["backbone.init=xavier", "backbone.pretrained=true"], ["backbone.init=glorot"]):
        with pytest.raises(UserError, match=r"backbone\.init"):
            load(None, given)


def test_zero_gamma_is_timms_default() -> None:
    """He et al., 2019, section 3.1: the last norm of a residual branch begins at zero, unless the option says otherwise."""
    gammas = {flag: build("resnet18", zero_init_last=flag).layer1[0].bn2.weight for flag in (True, False)}
    assert torch.equal(build("resnet18").layer1[0].bn2.weight, gammas[True])
    assert not gammas[True].any() and (gammas[False] == 1).all()
