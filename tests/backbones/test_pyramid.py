"""Strides 4, 8, 16 and 32 from ViTs (also of patch 14) and from nets with stages."""

from pathlib import Path

import pytest
import torch

from selfsup import load_backbone
from selfsup.backbones import export_timm
from selfsup.backbones.pyramid import Pyramid, pyramid_layers, resample
from tests.eval.segmentation import CONV, VIT, backbone


@pytest.mark.parametrize("patch", [8, 14, 16])
def test_a_vit_gives_four_strides_of_its_last_map(patch: int):
    size = 6 * patch
    net = backbone(**{**VIT, "patch_size": patch, "img_size": size})
    pyramid, x = Pyramid(net), torch.randn(2, 3, size, 2 * size)
    with torch.no_grad():
        maps, last = pyramid(x), net.feature_maps(x, [-1])[0]
    assert [tuple(m.shape) for m in maps] == [(2, 32, -(-size // s), -(-2 * size // s)) for s in (4, 8, 16, 32)]
    assert pyramid.layers == [3] * 4 and pyramid.channels == (32,) * 4
    for m, s in zip(maps, pyramid.strides):
        assert torch.equal(m, resample(last, (-(-size // s), -(-2 * size // s))))
    if patch in (8, 16):
        assert torch.equal(maps[1 if patch == 8 else 2], last)
    assert not [p for name, p in pyramid.named_parameters() if not name.startswith("backbone.")]


def test_downwards_is_the_mean_of_the_cells():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(resample(x, (2, 2))[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))
    assert resample(x, (8, 2)).shape == (1, 1, 8, 2)


def test_a_net_with_stages_gives_its_own():
    net = backbone(name="resnet18")
    assert pyramid_layers(net) == [1, 2, 3, 4]
    pyramid, x = Pyramid(net), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, own = pyramid(x), net.feature_maps(x, [1, 2, 3, 4])
    assert all(torch.equal(a, b) for a, b in zip(maps, own)) and pyramid.channels == (64, 128, 256, 512)
    short = Pyramid(backbone(**CONV))  # ends at stride 16: 32 is made from it
    assert short.layers[-1] == short.layers[-2] and [m.shape[-1] for m in short(x)] == [24, 12, 6, 3]


def test_load_backbone_with_a_pyramid(tmp_path: Path):
    net = backbone(**VIT)
    export_timm(net, tmp_path)
    pyramid, x = load_backbone(tmp_path, pyramid=True), torch.randn(1, 3, 48, 48)
    assert not pyramid.training
    with torch.no_grad():
        assert torch.equal(pyramid(x)[1], net.feature_maps(x, [-1])[0])
