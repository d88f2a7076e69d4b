"""Deformable convolutions in ResNets: equal to the plain net at first, to a sum over sampled taps later; saved and loaded."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F

from selfsup.backbones import Backbone, create_backbone, export_timm, load_backbone, load_into, timm_difference
from selfsup.backbones.deformable import Deformable
from selfsup.config import BackboneConfig
from selfsup.errors import UserError

SMALL = {"layers": [1, 1, 2, 1], "channels": [4, 8, 8, 16], "stem_width": 8}


def make(name: str = "resnet50", **options) -> Backbone:
    torch.manual_seed(0)
    config = BackboneConfig(name=name, **{**SMALL, "zero_init_last": False, **options})
    return create_backbone(config, mean=(0.5,) * 3, std=(0.25,) * 3, input_size=64).eval()


def stir(backbone: Backbone) -> Backbone:
    """Offsets of about a pixel."""
    for module in backbone.modules():
        if isinstance(module, Deformable):
            torch.nn.init.normal_(module.offset.weight, std=0.3)
            torch.nn.init.normal_(module.offset.bias, std=0.5)
    return backbone


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["resnet50", "resnet18", "seresnext50_32x4d"])
def test_begins_as_the_plain_net(name: str, images: torch.Tensor) -> None:
    options = {"channels": [32, 32, 32, 32]} if "next" in name else {}
    plain = make(name, **options)
    for modulated in (True, False):
        net = make(name, deformable=[4, 3], deformable_modulated=modulated, **options)
        layers = [key for key, m in net.model.named_modules() if isinstance(m, Deformable)]
        assert layers == ["layer3.0.conv2", "layer3.1.conv2", "layer4.0.conv2"] and net.options["deformable"] == [3, 4]
        missing, unknown = net.model.load_state_dict(plain.model.state_dict(), strict=False)
        assert not unknown and all(".conv2.offset." in key for key in missing)
        with torch.no_grad():
            torch.testing.assert_close(net(images).pooled, plain(images).pooled)


def test_layer_by_hand() -> None:
    """y(p) = sum_k w_k 2 sigmoid(m_k) x(p + p_k + dp_k), each x read bilinearly, zero outside (DCNv2, equation 1)."""
    torch.manual_seed(0)
    layer = Deformable(torch.nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), modulated=True)
    torch.nn.init.normal_(layer.offset.weight, std=0.3)
    x = torch.randn(1, 4, 9, 9)
    told = layer.offset(x)  # [1, 27, 5, 5]
    y, out = torch.zeros(1, 6, 5, 5), torch.arange(5) * 2 - 1
    for k in range(9):
        rows = out[:, None] + k // 3 + told[0, 2 * k]  # [5, 5]
        columns = out[None, :] + k % 3 + told[0, 2 * k + 1]
        grid = torch.stack([columns, rows], -1)[None] / 4 - 1  # of 9 cells, corners aligned: 0 -> -1, 8 -> 1
        read = F.grid_sample(x, grid, align_corners=True, padding_mode="zeros")  # [1, 4, 5, 5]
        y += torch.einsum("oc,bchw->bohw", layer.weight[:, :, k // 3, k % 3], read * 2 * told[0, 18 + k].sigmoid())
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert layer.offset.weight.grad.abs().amax(dim=(1, 2, 3)).min() > 0  # each offset and each weight learns
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(layer(x)).all()


def test_export_and_load(tmp_path: Path, images: torch.Tensor) -> None:
    backbone = stir(make(deformable=[4]))
    export_timm(backbone, tmp_path / "out")
    loaded = load_backbone(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(images).pooled, backbone(images).pooled)
        assert loaded.feature_maps(images, (1, 2, 3, 4))[-1].shape == (2, 64, 2, 2)
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())
    assert recorded["selfsup"]["loads_with"] == "selfsup.load_backbone alone: timm has no deformable convolution"
    with pytest.raises(TypeError, match="deformable"):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    with pytest.raises(
        UserError, match=r"bare timm cannot load it: timm has no deformable convolution; use selfsup.load_backbone"
    ):
        timm_difference(backbone, tmp_path / "out")


def test_weights_of_a_plain_net(tmp_path: Path, images: torch.Tensor, capsys) -> None:
    plain = make()
    export_timm(plain, tmp_path / "plain")
    net = stir(make(deformable=[3, 4]))
    n, m = load_into(net, tmp_path / "plain")
    assert n == m and "convolutions do not deform: offsets begin at zero" in capsys.readouterr().err
    with torch.no_grad():
        torch.testing.assert_close(net(images).pooled, plain(images).pooled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deformable": [5]}, r"backbone.deformable=\[5\]: give the stages .* of 1 to 4, as in \[3, 4\]"),
        ({"deformable": True}, "backbone.deformable=True: give the stages"),
        ({"deformable": "all"}, "backbone.deformable=all: give the stages"),
        ({"deformable": []}, r"backbone.deformable=\[\]: give the stages"),
        ({"deformable": 4, "deformable_modulated": 2}, "deformable_modulated=2: give true or false"),
        ({"deformable_modulated": True}, r"give backbone.deformable=\[3, 4\]"),
    ],
)
def test_bad_options(options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


def test_other_nets_refuse_it() -> None:
    with pytest.raises(
        UserError, match="for timm's ResNets, and convnext_atto is a ConvNeXt; leave it out, or use resnet50"
    ):
        config = BackboneConfig(name="convnext_atto", deformable=[3])
        create_backbone(config, mean=(0.5,) * 3, std=(0.5,) * 3)
