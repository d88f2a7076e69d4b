"""Key layouts of published checkpoints; names and shapes as their projects write them."""

import pytest
import torch
from torch import Tensor

from selfsup.backbones.infer import infer
from selfsup.backbones.keys import convert
from selfsup.errors import UserError


def vit(dim: int = 64, depth: int = 2, patch: int = 16, grid: int = 14, prefix: int = 1) -> dict[str, Tensor]:
    """dino's vision_transformer.VisionTransformer(num_classes=0).state_dict(): the same names as timm's."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, grid * grid + prefix, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(depth):
        for name, shape in {
            "norm1.weight": (dim,),
            "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim),
            "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim),
            "attn.proj.bias": (dim,),
            "norm2.weight": (dim,),
            "norm2.bias": (dim,),
            "mlp.fc1.weight": (4 * dim, dim),
            "mlp.fc1.bias": (4 * dim,),
            "mlp.fc2.weight": (dim, 4 * dim),
            "mlp.fc2.bias": (dim,),
        }.items():
            shapes[f"blocks.{i}.{name}"] = shape
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) * 0.05 for key, shape in shapes.items()}


def dinov2(
    dim: int = 64, depth: int = 4, registers: int = 0, chunk: int = 0, swiglu: bool = False
) -> dict[str, Tensor]:
    """dinov2's DinoVisionTransformer.state_dict() at 518 pixels, patch 14."""
    state = vit(dim, depth, patch=14, grid=37)
    out: dict[str, Tensor] = {"cls_token": state.pop("cls_token"), "pos_embed": state.pop("pos_embed")}
    if registers:
        out["register_tokens"] = torch.randn(1, registers, dim) * 0.05
    out["mask_token"] = torch.zeros(1, dim)
    hidden = (int(4 * dim * 2 / 3) + 7) // 8 * 8
    for key, value in state.items():
        if swiglu and ".mlp." in key:
            block, _, kind = key.rpartition(".mlp.fc")
            rows = {"1.weight": (2 * hidden, dim), "1.bias": (2 * hidden,), "2.weight": (dim, hidden), "2.bias": (dim,)}
            key, value = f"{block}.mlp.w{'12' if kind[0] == '1' else '3'}{kind[1:]}", torch.randn(rows[kind]) * 0.05
        if key.startswith("blocks.") and chunk:
            number = int(key.split(".")[1])
            key = key.replace(f"blocks.{number}.", f"blocks.{number // chunk}.{number}.", 1)
        out[key] = value
    for i in range(depth):
        where = f"blocks.{i // chunk}.{i}" if chunk else f"blocks.{i}"
        out[f"{where}.ls1.gamma"] = torch.full((dim,), 0.1 * i)
        out[f"{where}.ls2.gamma"] = torch.full((dim,), 0.2 * i)
    return out


HEAD = {
    "mlp.0.weight": torch.zeros(8, 64),
    "mlp.0.bias": torch.zeros(8),
    "last_layer.weight_g": torch.ones(10, 1),
    "last_layer.weight_v": torch.zeros(10, 8),
}


def dino_checkpoint() -> dict[str, object]:
    """main_dino.py's save_dict: student under DistributedDataParallel, teacher without."""
    net = vit()
    return {
        "student": {f"module.backbone.{k}": v + 1 for k, v in net.items()}
        | {f"module.head.{k}": v for k, v in HEAD.items()},
        "teacher": {f"backbone.{k}": v for k, v in net.items()} | {f"head.{k}": v for k, v in HEAD.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "dino_loss": {"center": torch.zeros(1, 10)},
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.systems("Published checkpoints of dino, dinov2, timm: `load_backbone`, `init_from=`")
def test_dino():
    layout, state = convert(dino_checkpoint())
    assert layout == "dino" and equal(state, vit())
    layout, student = convert(dino_checkpoint(), "student")
    assert layout == "dino" and equal(student, {k: v + 1 for k, v in vit().items()})


@pytest.mark.parametrize("prefix", ["", "module.", "module.backbone.", "backbone.", "_orig_mod.", "model."])
def test_prefixes(prefix):
    _, state = convert({f"{prefix}{k}": v for k, v in vit().items()})
    assert equal(state, vit())


@pytest.mark.parametrize("key", ["state_dict", "model", "state_dict_ema", "model_ema"])
def test_nested_files(key):
    _, state = convert({key: {f"module.{k}": v for k, v in vit().items()}, "epoch": 3})
    assert equal(state, vit())


def test_averaged_weights_come_first():
    net = vit()
    file = {"state_dict": {k: v + 1 for k, v in net.items()}, "state_dict_ema": net}
    assert equal(convert(file)[1], net)
    assert equal(convert(file, "student")[1], file["state_dict"])


def test_selfsup_checkpoint():
    net = vit()
    file = {f"teacher.backbone.model.{k}": v for k, v in net.items()}
    file |= {f"student.backbone.model.{k}": v + 1 for k, v in net.items()}
    file |= {f"teacher.head.{k}": v for k, v in HEAD.items()} | {"center": torch.zeros(10)}
    layout, state = convert(file)
    assert layout == "selfsup" and equal(state, net)
    assert equal(convert(file, "student")[1], {k: v + 1 for k, v in net.items()})


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_dinov2(chunk):
    layout, state = convert(dinov2(chunk=chunk))
    assert layout == "dinov2"
    plain = dinov2()
    plain.pop("mask_token")
    state.pop("mask_token")  # a head: `load` leaves it out
    assert equal(state, plain)


def test_dinov2_training_checkpoint_with_heads():
    file = {f"backbone.{k}": v for k, v in dinov2(chunk=2).items()} | {f"dino_head.{k}": v for k, v in HEAD.items()}
    layout, state = convert({"teacher": file})
    assert layout == "dinov2" and "blocks.3.ls1.gamma" in state and not any("head" in k for k in state)


def test_dinov2_registers_fold_the_position_of_cls():
    file = dinov2(registers=4)
    layout, state = convert(file)
    assert layout == "dinov2" and state["reg_token"].shape == (1, 4, 64)
    assert torch.equal(state["cls_token"], file["cls_token"] + file["pos_embed"][:, :1])
    assert torch.equal(state["pos_embed"], file["pos_embed"][:, 1:])
    assert "register_tokens" not in state


def test_dinov2_swiglu():
    file = dinov2(swiglu=True)
    state = convert(file)[1]
    assert torch.equal(state["blocks.1.mlp.fc1.weight"], file["blocks.1.mlp.w12.weight"])
    assert torch.equal(state["blocks.1.mlp.fc2.bias"], file["blocks.1.mlp.w3.bias"])


def test_nested_convnet_blocks_are_not_taken_for_chunks():
    file = {"blocks.0.0.conv_dw.weight": torch.zeros(8, 1, 3, 3), "conv_stem.weight": torch.zeros(8, 3, 3, 3)}
    assert convert(file) == ("timm", file)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({}, "the file holds nothing"),
        ({"epoch": 3, "note": "x"}, "no tensors under teacher.*the file holds epoch, note"),
        ([1, 2], "holds a list"),
        ({"teacher": {"epoch": 1}}, "no tensors"),
    ],
)
def test_files_without_weights(file, message):
    with pytest.raises(UserError, match=message):
        convert(file)


def test_no_student():
    with pytest.raises(UserError, match="no student weights"):
        convert({f"teacher.backbone.model.{k}": v for k, v in vit().items()}, "student")


def test_infer_vits():
    name, options = infer(vit(dim=384, depth=12), {})
    assert name == "vit_small_patch16_224"
    assert (options["num_heads"], options["depth"], options["img_size"]) == (6, 12, [224, 224])
    name, options = infer(convert(dinov2(dim=384, registers=4))[1], {})
    assert name == "vit_small_patch14_reg4_dinov2" and options["reg_tokens"] == 4 and options["no_embed_class"]
    name, options = infer(convert(dinov2(dim=1536, depth=1, swiglu=True))[1], {})
    assert name == "vit_giant_patch14_dinov2" and int(1536 * options["mlp_ratio"]) == 8192


def test_infer_says_what_it_cannot_know():
    with pytest.raises(UserError, match=r"width 96 .*give num_heads"):
        infer(vit(dim=96), {})
    infer(vit(dim=96), {"num_heads": 3})
    broken = vit()
    broken["pos_embed"] = torch.zeros(1, 16, 64)
    with pytest.raises(UserError, match="no square grid; give img_size"):
        infer({k: v for k, v in broken.items() if k != "cls_token"} | {"pos_embed": torch.zeros(1, 15, 64)}, {})
    with pytest.raises(UserError, match="give name=TIMM_NAME"):
        infer({"stages.0.weight": torch.zeros(1)}, {})
    with pytest.raises(UserError, match="no plain ViT"):
        infer(vit() | {"blocks.0.gamma_1": torch.zeros(64)}, {})
