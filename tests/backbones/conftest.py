"""Small members of every family, and a maker of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from selfsup.backbones import Backbone, create_backbone
from selfsup.config import BackboneConfig

VIT = {"patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}

# name in the tests -> (timm name, options, size)
SMALL: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", VIT, 32),
    "vit_avg": ("vit_tiny_patch16_224", {**VIT, "global_pool": "avg", "class_token": False}, 32),
    "registers": ("vit_small_patch14_reg4_dinov2", {**VIT, "patch_size": 14}, 56),
    "distilled": ("deit_tiny_distilled_patch16_224", VIT, 32),
    "eva": ("eva02_tiny_patch14_224", {**VIT, "patch_size": 8}, 32),
    "cait": ("cait_xxs24_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 64),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}, 64),
    "xcit": ("xcit_nano_12_p16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}, 64),
    "mixer": ("mixer_s32_224", {}, 96),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 64),
    "resnet": ("resnet18", {}, 64),
    "mobilenet": ("mobilenetv3_small_050", {}, 64),
}


def make(kind: str, size: int | None = None, channels: int = 3, pos_interp: str = "timm", **options: Any) -> Backbone:
    """The small backbone of this kind with random weights (none of them zero), in eval mode."""
    name, small, default = SMALL[kind]
    torch.manual_seed(0)
    config = BackboneConfig(name=name, in_chans=channels, pos_interp=pos_interp, **{**small, **options})
    backbone = create_backbone(config, mean=(0.5,) * channels, std=(0.25,) * channels, input_size=size or default)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return backbone.eval()


@pytest.fixture
def small() -> Callable[..., Backbone]:
    """`make`, see there."""
    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `kind` without saying which runs for every family."""
    named = any("kind" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "kind" in metafunc.fixturenames and not named:
        metafunc.parametrize("kind", list(SMALL))
