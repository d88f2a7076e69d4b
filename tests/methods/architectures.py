"""Tiny members of every family that README names: timm's constructors with small numbers, for images of 32 pixels."""

import functools
from typing import Any, NamedTuple

import pytest
from timm.models import convmixer, mlp_mixer, mvitv2

_VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
_PVT: dict[str, Any] = {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_heads": [1, 2, 3, 4]}
_PVT |= {"sr_ratios": [2, 2, 1, 1]}
_RESNET: dict[str, Any] = {"layers": [1, 1, 1, 1], "channels": [4, 8, 8, 16]}


class Architecture(NamedTuple):
    """How one is built, the stride of its last map, and what it can do."""

    name: str
    options: dict[str, Any]
    stride: int = 32
    masks: bool = False
    """Whether MAE trains it."""
    local: int = 16
    """Pixels of local views: those of the global ones where it is bound to a size, or takes none below its stride."""


ARCHITECTURES = {
    "vit": Architecture("vit_tiny_patch16_224", _VIT, 8, True),
    "vit_registers": Architecture("vit_small_patch14_reg4_dinov2", _VIT, 8, True),
    "vit_gap": Architecture("vit_base_patch16_gap_224", _VIT, 8, True),
    "vit_map": Architecture("vit_base_patch16_siglip_224", _VIT, 8),
    "deit": Architecture("deit_tiny_distilled_patch16_224", _VIT, 8, True),
    "swin": Architecture(
        "swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}, 8
    ),
    "pvt_v2": Architecture("pvt_v2_b0", _PVT),
    "pvt_v2_linear": Architecture("pvt_v2_b2_li", _PVT),
    "pvt_v1_attention": Architecture("twins_pcpvt_small", {**_PVT, "mlp_ratios": [2, 2, 2, 2]}, local=32),
    "mit": Architecture("mit_b0", _PVT),
    "xcit": Architecture(
        "xcit_nano_12_p16_224", {"embed_dim": 16, "depth": 1, "num_heads": 2, "cls_attn_layers": 1}, 16
    ),
    "mvit_v2": Architecture("mvitv2_tiny", {}),
    "convmixer": Architecture("convmixer_768_32", {}, 4),
    "mlp_mixer": Architecture("mixer_s32_224", {}, 8, local=32),
    "resnet_b": Architecture("resnet50", {**_RESNET, "stem_width": 8}),
    "resnet_c": Architecture("resnet50c", {**_RESNET, "stem_width": 8}),
    "resnet_d": Architecture("resnet18d", {**_RESNET, "stem_width": 8}),
    "se_resnet": Architecture("seresnet50", {**_RESNET, "stem_width": 8}),
    "resnet_deformable": Architecture("resnet50", {**_RESNET, "stem_width": 8, "deformable": [3, 4]}),
    "convnext": Architecture("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [4, 8, 12, 16]}, local=32),
    "efficientnet": Architecture("test_efficientnet", {}),
}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small MViT, ConvMixer and MLP-Mixer: of these timm fixes the widths by name, for bare timm as well."""
    monkeypatch.setitem(mvitv2.model_cfgs, "mvitv2_tiny", mvitv2.MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=8))
    small: dict[str, Any] = {"dim": 16, "depth": 2, "kernel_size": 3, "patch_size": 4}
    _with(monkeypatch, convmixer, "_create_convmixer", small)
    _with(monkeypatch, mlp_mixer, "_create_mixer", {"patch_size": 8, "num_blocks": 2, "embed_dim": 16})


def _with(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, numbers: dict[str, Any]) -> None:
    create = getattr(module, name)
    monkeypatch.setattr(
        module, name, functools.wraps(create)(lambda *args, **given: create(*args, **(given | numbers)))
    )
