"""Maps between stages: in one pass with the features, alone without deeper stages, and with those cut off."""

import copy

import pytest
import torch

from selfsup.backbones import Backbone, create_backbone
from selfsup.backbones.stages import cut_after, forward_stages, map_after, map_shapes, resolve_layers, stage_layers
from selfsup.config import BackboneConfig
from selfsup.errors import UserError

MORE = {
    "resnetv2": (
        "resnetv2_50",
        {"layers": [1, 1, 1], "channels": [32, 48, 64], "stem_chs": 16, "norm_layer": "groupnorm1"},
    ),
    "regnet": ("regnety_002", {}),
    "pvt": ("pvt_v2_b0", {}),
    "efficientnet": ("efficientnet_b0", {}),
}


def images_for(backbone: Backbone, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, backbone.in_chans, *backbone.image_size, generator=generator)


def check(backbone: Backbone) -> None:
    """One pass gives the bits of two; an early stop gives the same maps; so does a net that ends there."""
    images, depth = images_for(backbone), len(backbone.model.feature_info)
    layers = list(range(depth))
    with torch.no_grad():
        whole, maps = backbone.forward_stages(images, layers)
        expected = backbone(images)
        assert torch.equal(whole.pooled, expected.pooled) and torch.equal(whole.patches, expected.patches)
        assert all(
            torch.equal(a, b) for a, b in zip(maps, backbone.feature_maps(images, layers, norm=False), strict=True)
        )
        for layer in {0, depth // 2, depth - 2}:
            assert torch.equal(map_after(backbone, images, layer), maps[layer])
            cut = cut_after(copy.deepcopy(backbone), layer)
            assert torch.equal(map_after(cut, images, layer), maps[layer])
            sizes = [sum(p.numel() for p in b.parameters()) for b in (cut, backbone)]
            assert sizes[0] < sizes[1]


def test_families(kind: str, small) -> None:
    backbone = small(kind)
    check(backbone)


@pytest.mark.parametrize("name", sorted(MORE))
def test_more_families(name: str) -> None:
    model, options = MORE[name]
    torch.manual_seed(0)
    config = BackboneConfig(name=model, **options)
    check(create_backbone(config, mean=(0.5,) * 3, std=(0.25,) * 3, input_size=64).eval())


def test_deeper_stages_are_not_computed(small) -> None:
    """A last stage that would raise is never reached; and is, where everything is asked for."""
    backbone = small("resnet")

    def explode(*args: object) -> None:
        raise AssertionError("computed")

    backbone.model.layer3.register_forward_pre_hook(explode)
    images = images_for(backbone)
    with torch.no_grad():
        map_after(backbone, images, 2)
        with pytest.raises(UserError, match="computed"):
            map_after(backbone, images, 3)
        with pytest.raises(UserError, match="computed"):
            forward_stages(backbone, images, [1])


def test_gradients_are_those_of_the_plain_forward(small) -> None:
    grads = []
    for through in (lambda b, x: b(x).pooled, lambda b, x: b.forward_stages(x, [0, 2])[0].pooled):
        backbone = small("convnext")
        through(backbone, images_for(backbone)).square().sum().backward()
        grads.append({k: p.grad for k, p in backbone.named_parameters()})
    assert all(torch.equal(grads[0][k], grads[1][k]) for k in grads[0])


def test_which_layers_are_stages(small) -> None:
    assert stage_layers(small("resnet")) == [1, 2, 3]  # 0 is the stem
    assert stage_layers(small("convnext")) == [0, 1, 2]
    assert stage_layers(small("swin")) == [0]
    assert stage_layers(small("vit")) == [0, 1]  # of three blocks
    torch.manual_seed(0)
    config = BackboneConfig(name="vit_tiny_patch16_224", depth=12, embed_dim=24, num_heads=2, patch_size=16)
    vit = create_backbone(config, mean=(0.5,) * 3, std=(0.25,) * 3, input_size=32)
    assert stage_layers(vit) == [2, 5, 8]


def test_shapes_leave_the_mode_alone(small) -> None:
    backbone = small("resnet").train()
    backbone.model.layer1.eval()
    before = copy.deepcopy(backbone.state_dict())
    deepest, maps = map_shapes(backbone, [1, 3])
    assert deepest == (512, 2, 2) and maps == [(64, 16, 16), (256, 4, 4)]
    assert backbone.model.layer2.training and not backbone.model.layer1.training
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


def test_layers_that_do_not_exist(small) -> None:
    backbone = small("resnet")
    assert resolve_layers(backbone, [-1, 0]) == [4, 0]
    with pytest.raises(UserError, match=r"method.exits=\[1, 5\]: the layers of resnet18 are 0 \(act1\), 1 \(layer1\)"):
        resolve_layers(backbone, [1, 5], "method.exits")
    with pytest.raises(UserError, match="layer"):
        backbone.forward_stages(images_for(backbone), [-6])
