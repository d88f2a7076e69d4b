"""Which timm model a state dict fits, for files that come without a configuration."""

import math
import re
from typing import Any

from timm.models import is_model
from torch import Tensor

from selfsup.backbones import mit
from selfsup.backbones.timesformer_keys import from_transformers, infer_timesformer
from selfsup.errors import UserError

_VIT_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}
_RESNETS = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_XCITS = {(128, 12): "nano", (192, 12): "tiny", (192, 24): "tiny", (384, 12): "small", (384, 24): "small"}
_XCITS |= {(512, 24): "medium", (768, 24): "large"}


def infer(state: dict[str, Tensor], options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(timm name, options) of the model whose state dict (timm's keys) this is.

    options: what the user knows better; they win. Raises UserError for anything but plain ViTs, ResNets, XCiTs, MiTs and
    PVT v2, and where the number of heads, which no tensor shows, is not one a 64 channels.
    """
    if "cls_attn_blocks.0.norm1.weight" in state and "patch_embed.proj.0.0.weight" in state:
        return _xcit(state, options)
    clips = from_transformers(state)
    if "time_embed" in clips and "patch_embed.proj.weight" in clips:
        name, found = infer_timesformer(clips)
        return name, {**found, **options}
    if (kernel := state.get("patch_embed.proj.weight")) is not None and (kernel.ndim == 5 or (kernel.ndim == 2)):
        raise UserError(
            "weights of a model of volumes do not tell its patches and grid; give the folder with config.json"
        )
    if {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"} <= state.keys():
        return _vit(state, options)
    if "layer1.0.conv1.weight" in state and "conv1.weight" in state:
        return _resnet(state, options)
    if mit.is_pvt(state):
        known, found = mit.infer(state)
        if known is None:
            raise UserError(
                "a PVT v2 or MiT of other depths or widths than those published; give name=, depths=, embed_dims="
            )
        return known, found
    raise UserError(
        f"the architecture cannot be told from the keys ({', '.join(list(state)[:3])}, ...); give name=TIMM_NAME"
    )


def _depth(state: dict[str, Tensor], prefix: str) -> int:
    found = [re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in state]
    return 1 + max((int(m.group(1)) for m in found if m), default=-1)


def _vit(state: dict[str, Tensor], given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    for key in ("blocks.0.attn.q_bias", "blocks.0.gamma_1", "blocks.0.attn.relative_position_bias_table"):
        if key in state:
            raise UserError(f"{key} is of no plain ViT (BEiT or EVA?); give name=TIMM_NAME")
    width, channels, *patch = state["patch_embed.proj.weight"].shape  # [D, C, p, p]
    if width % 64 and "num_heads" not in given:
        raise UserError(f"width {width} is no multiple of 64: how many heads? give num_heads=N")
    hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    gated = state["blocks.0.mlp.fc2.weight"].shape[1] * 2 == hidden  # SwiGLU, both halves in fc1
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    prefix = int("cls_token" in state) + registers + int("dist_token" in state)
    options: dict[str, Any] = {
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "in_chans": channels,
        "embed_dim": width,
        "depth": _depth(state, "blocks"),
        "num_heads": max(1, width // 64),
        "mlp_ratio": _ratio(hidden, width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }
    if "blocks.0.ls1.gamma" in state:
        options["init_values"] = 1e-5  # the value is loaded; this makes the parameter
    if "blocks.0.attn.q_norm.weight" in state:
        options["qk_norm"] = True
    if "norm_pre.weight" in state:
        options["pre_norm"] = True
    if "cls_token" not in state:
        options |= {"class_token": False, "global_pool": "avg"}
    elif "fc_norm.weight" in state:
        options["global_pool"] = "avg"
    if registers:
        options["reg_tokens"] = registers
    if "pos_embed" in state:
        cells = state["pos_embed"].shape[1]
        grid = next((math.isqrt(n) for n in (cells - prefix, cells) if n > 0 and math.isqrt(n) ** 2 == n), None)
        if grid is None and "img_size" not in given:
            raise UserError(f"pos_embed has {cells} entries, no square grid; give img_size=(H, W)")
        if grid is not None:
            options["no_embed_class"] = prefix > 0 and grid * grid == cells
            options.setdefault("img_size", [grid * patch[0], grid * patch[1]])
    if "dist_token" in state:
        name = "deit_small_distilled_patch16_224"
    elif gated:
        name = "vit_giant_patch14_dinov2"  # the one plain ViT of timm's with a packed SwiGLU
    else:
        size = _VIT_SIZES.get(width, "base")
        likely = (
            [f"vit_{size}_patch{patch[0]}_{'reg4_' if registers else ''}dinov2"] if "init_values" in options else []
        )
        likely.append(f"vit_{size}_patch{patch[0]}_224")
        name = next((n for n in likely if is_model(n)), "vit_base_patch16_224")
    return name, options


def _ratio(hidden: int, width: int) -> float:
    """The ratio from which int(width * ratio) gives `hidden` again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _resnet(state: dict[str, Tensor], given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    bottleneck = "layer1.0.conv3.weight" in state
    a, b, c, d = (_depth(state, f"layer{i}") for i in range(1, 5))
    depths = (a, b, c, d)
    name = _RESNETS.get((bottleneck, depths))
    width = state["layer1.0.conv1.weight"].shape[0]
    if name is None or width not in (64, 128) or "layer1.0.conv2.weight" not in state:
        raise UserError(f"a residual net of depths {depths}, width {width}: no ResNet this knows; give name=TIMM_NAME")
    if width == 128:
        name = f"wide_{name}_2"
    return name, {"in_chans": state["conv1.weight"].shape[1]}


def _xcit(state: dict[str, Tensor], given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    stem = [key for key in state if re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", key)]
    patch = 16 if len(stem) == 4 else 8
    depth = _depth(state, "blocks")
    width = state["blocks.0.norm1.weight"].shape[0]
    size = _XCITS.get((width, depth))
    name = f"xcit_{size}_{depth}_p{patch}_224"
    if size is None or not is_model(name):
        raise UserError(f"an XCiT of width {width} and depth {depth}: none that timm knows; give name=TIMM_NAME")
    return name, {"in_chans": state["patch_embed.proj.0.0.weight"].shape[1]}
