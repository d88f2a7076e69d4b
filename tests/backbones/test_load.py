"""`load_backbone` from runs, folders and files."""

import argparse
import json
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

import selfsup
from selfsup import config as configuration
from selfsup.backbones import create_backbone, export_timm, load_backbone, load_into
from selfsup.backbones.positions import resample_tokens
from selfsup.errors import UserError

OPTIONS = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}


def net(name: str = "vit_tiny_patch16_224", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **({**OPTIONS, "img_size": 32} if "vit" in name else {}), **options)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def same(backbone, model, size: int = 32) -> bool:
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        return torch.equal(backbone(images).pooled, model(images)) and not backbone.training


def matched(capsys) -> tuple[int, int]:
    n, m = re.search(r"matched (\d+)/(\d+) tensors", capsys.readouterr().err).groups()
    return int(n), int(m)


def test_exported_selfsup_attribute():
    assert selfsup.load_backbone is load_backbone


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_flat_files(suffix, tmp_path, capsys):
    model = net()
    path = tmp_path / f"weights{suffix}"
    torch.save(model.state_dict(), path) if suffix == ".pth" else save_file(model.state_dict(), path)
    backbone = load_backbone(path)
    assert same(backbone, model) and backbone.pos_interp == "timm"
    assert matched(capsys) == (len(model.state_dict()),) * 2


@pytest.mark.systems("Published checkpoints of dino, dinov2, timm: `load_backbone`, `init_from=`")
def test_dino_training_checkpoint(tmp_path, capsys):
    """Dicts, prefixes, heads, and the pickled Namespace that newer torch refuses by default."""
    model = net()
    state = model.state_dict()
    file = {
        "student": {f"module.backbone.{k}": v + 1 for k, v in state.items()},
        "teacher": {f"backbone.{k}": v for k, v in state.items()} | {"head.last_layer.weight_g": torch.ones(5, 1)},
        "args": argparse.Namespace(arch="vit_small", lr=5e-4, local_crops_scale=(0.05, 0.4)),
        "epoch": 3,
    }
    torch.save(file, tmp_path / "checkpoint.pth")
    backbone = load_backbone(tmp_path / "checkpoint.pth")
    assert same(backbone, model) and backbone.pos_interp == "dino"
    assert backbone.mean == (0.485, 0.456, 0.406)
    assert matched(capsys) == (len(state),) * 2
    student = load_backbone(f"{tmp_path / 'checkpoint.pth'}@student")
    assert torch.equal(student.model.norm.bias, model.norm.bias + 1)
    with torch.no_grad():  # another size, by DINO's scale factor
        images = torch.randn(1, 3, 56, 24)
        found = backbone(images).pooled
        model.pos_embed = torch.nn.Parameter(resample_tokens(model.pos_embed, (4, 4), (7, 3), "dino", 1))
        model.patch_embed.img_size, model.patch_embed.grid_size = (56, 24), (7, 3)
        assert torch.equal(found, model(images))


@pytest.mark.systems("Published checkpoints of dino, dinov2, timm: `load_backbone`, `init_from=`")
def test_dinov2_with_registers(tmp_path, capsys):
    """The published names (register_tokens, mask_token, ls1.gamma, chunks), from a timm model turned back."""
    model = net("vit_small_patch14_reg4_dinov2")
    state = model.state_dict()
    cls = torch.randn(1, 1, 64)
    file = {"mask_token": torch.zeros(1, 64), "register_tokens": state.pop("reg_token"), "cls_token": cls}
    pos = torch.cat([state.pop("cls_token") - cls, state.pop("pos_embed")], dim=1)
    file["pos_embed"] = pos
    file |= {re.sub(r"^blocks\.(\d)", r"blocks.0.\1", k): v for k, v in state.items()}
    torch.save(file, tmp_path / "dinov2.pth")
    backbone = load_backbone(tmp_path / "dinov2.pth")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(backbone(images).pooled, model(images), atol=1e-5)
        assert backbone(images).registers.shape == (2, 4, 64)
    assert matched(capsys) == (len(model.state_dict()),) * 2
    assert backbone.pos_interp == "timm"
    del file["register_tokens"]
    torch.save(file, tmp_path / "plain.pth")
    assert load_backbone(tmp_path / "plain.pth").pos_interp == "dino"
    assert load_backbone(tmp_path / "plain.pth", pos_interp="size").pos_interp == "size"


def test_resnet_and_xcit_by_their_keys(tmp_path, capsys):
    import torchvision

    torch.manual_seed(0)
    resnet = torchvision.models.resnet18().eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in resnet.state_dict().items()}}, tmp_path / "r.pth")
    backbone = load_backbone(tmp_path / "r.pth")
    resnet.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(backbone(images).pooled, resnet(images), atol=1e-4)
    assert backbone.name == "resnet18" and matched(capsys)[0] == matched_all(backbone)

    model = net("xcit_nano_12_p16_224", img_size=32)
    original = {
        k.replace("pos_embed.", "pos_embeder."): v for k, v in model.state_dict().items()
    }  # facebookresearch/xcit
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [original.pop(f"cls_attn_blocks.{i}.attn.{q}.{kind}") for q in "qkv"]
            original[f"cls_attn_blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    original |= {"head.weight": torch.zeros(1000, 128), "head.bias": torch.zeros(1000)}
    torch.save({"model": original}, tmp_path / "x.pth")
    backbone = load_backbone(tmp_path / "x.pth")
    assert backbone.name == "xcit_nano_12_p16_224" and same(backbone, model)


def matched_all(backbone) -> int:
    return len(backbone.model.state_dict())


def test_exported_folder(small, tmp_path, capsys):
    for kind, interp in (("vit", "dino"), ("swin", "timm"), ("registers", "size")):
        backbone = small(kind, channels=4, pos_interp=interp)
        export_timm(backbone, tmp_path / kind)
        for target in (tmp_path / kind, tmp_path / kind / "model.safetensors"):
            loaded = load_backbone(target)
            assert (loaded.pos_interp, loaded.mean, loaded.std) == (interp, (0.5,) * 4, (0.25,) * 4)
            assert (loaded.in_chans, loaded.image_size) == (4, backbone.image_size)
            images = torch.randn(2, 4, backbone.input_size + backbone.stride, backbone.input_size)
            with torch.no_grad():
                assert torch.equal(loaded(images).pooled, backbone(images).pooled)


def test_another_img_size_resamples_the_positions(tmp_path):
    """A plain timm folder, made for 32 pixels, loaded for 48x64."""
    model = net()
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {**OPTIONS, "img_size": [32, 32]}}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "mean": [0.1] * 3, "std": [0.2] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = load_backbone(tmp_path, img_size=(48, 64))
    assert backbone.mean == (0.1,) * 3 and backbone.image_size == (48, 64)
    expected = resample_tokens(model.pos_embed, (4, 4), (6, 8), "timm", 1)
    assert torch.equal(backbone.model.pos_embed, expected)
    export_timm(backbone, tmp_path / "out")  # a rectangle, recorded: resampled back from its own grid
    again = load_backbone(tmp_path / "out", img_size=(40, 40))
    assert torch.equal(again.model.pos_embed, resample_tokens(expected, (6, 8), (5, 5), "timm", 1))


@pytest.fixture
def run(tmp_path):
    """A run folder with a checkpoint of two steps, as the trainer writes it."""
    backbone_options = {"name": "vit_tiny_patch16_224", "pos_interp": "dino", **OPTIONS}
    values = {"backbone": backbone_options, "views": {"global": {"size": 32}, "local": {"count": 0}}, "steps": 4}
    config = configuration.load(extra=values)
    (tmp_path / "config.yaml").write_text(configuration.dump(config))
    for step in (2, 4):
        torch.manual_seed(step)
        state = {}
        for branch in ("student", "teacher"):
            backbone = create_backbone(config.backbone, mean=config.mean, std=config.std, input_size=32)
            state |= {f"{branch}.backbone.{k}": v for k, v in backbone.state_dict().items()}
            state[f"{branch}.head.last.weight"] = torch.zeros(3, 3)
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        save_file({**state, "center": torch.zeros(3)}, folder / "model.safetensors")
    (tmp_path / "checkpoints" / "latest").write_text("step_00000004\n")
    return tmp_path, state, backbone


def test_run_without_export(run, capsys):
    path, state, _ = run
    backbone = load_backbone(path)
    assert torch.equal(backbone.model.cls_token, state["teacher.backbone.model.cls_token"])
    assert backbone.pos_interp == "dino" and backbone.input_size == 32 and not backbone.training
    n, m = matched(capsys)
    assert n == m == len(backbone.state_dict())
    student = load_backbone(f"{path}@student")
    assert torch.equal(student.model.cls_token, state["student.backbone.model.cls_token"])
    early = load_backbone(path / "checkpoints" / "step_00000002")
    assert not torch.equal(early.model.cls_token, backbone.model.cls_token)
    by_file = load_backbone(path / "checkpoints" / "step_00000002" / "model.safetensors", branch="student")
    assert not torch.equal(by_file.model.cls_token, early.model.cls_token)
    (path / "checkpoints" / "latest").unlink()
    assert torch.equal(load_backbone(path).model.cls_token, backbone.model.cls_token)


def test_run_with_export(run):
    path, _, exported = run
    with torch.no_grad():
        exported.model.cls_token.fill_(7)
    export_timm(exported, path / "backbone")
    assert (load_backbone(path).model.cls_token == 7).all()
    assert not (load_backbone(path, branch="student").model.cls_token == 7).all()


def test_load_into_an_existing_backbone(run, small, tmp_path):
    path, state, _ = run
    backbone = small("vit", size=48, embed_dim=64, depth=2, num_heads=1).train()
    n, m = load_into(backbone, path, branch="student")
    assert n == m and backbone.training
    assert torch.equal(backbone.model.norm.weight, state["student.backbone.model.norm.weight"])
    pos = resample_tokens(state["student.backbone.model.pos_embed"], (4, 4), (6, 6), "timm", 1)
    assert torch.equal(backbone.model.pos_embed, pos)


def test_less_than_everything_is_refused(tmp_path, capsys):
    state = net().state_dict()
    path = tmp_path / "weights.pth"
    cut = {k: v for k, v in state.items() if not k.startswith("blocks.1.attn.proj")}
    torch.save(cut, path)
    with pytest.raises(UserError, match=rf"only {len(cut)} of {len(state)} tensors.*missing blocks.1.attn.proj.weight"):
        load_backbone(path)
    capsys.readouterr()
    backbone = load_backbone(path, allow_partial=True)
    assert matched(capsys) == (len(cut), len(state))
    assert torch.equal(backbone.model.norm.weight, state["norm.weight"])
    torch.save({**state, "blocks.1.extra.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"not part of it blocks\.1\.extra\.weight"):
        load_backbone(path)
    torch.save(state, path)
    with pytest.raises(UserError, match="only"):  # half of the file would be ignored
        load_backbone(path, depth=1)
    with pytest.raises(UserError, match=r"patch_embed.proj.weight is \(64, 3, 8, 8\), not \(64, 3, 16, 16\)"):
        load_backbone(path, patch_size=16)
    with pytest.raises(UserError, match="only 0 of"):
        load_backbone(path, name="resnet18", allow_partial=True)


def test_targets_that_cannot_be_read(tmp_path):
    def refused(target, message, **options):
        with pytest.raises(UserError, match=message) as caught:
            load_backbone(target, **options)
        assert str(caught.value).count("\n") <= 1

    refused(tmp_path / "nothing", "no such file or folder")
    refused(tmp_path, "neither a run .* nor an exported backbone")
    for suffix in (".pth", ".safetensors"):
        (tmp_path / f"noise{suffix}").write_bytes(b"not weights at all")
        refused(tmp_path / f"noise{suffix}", f"noise{suffix}: ")
    (tmp_path / "weights.txt").write_text("x")
    refused(tmp_path / "weights.txt", "weights are read from .safetensors, .pth")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json: cannot be read")
    (tmp_path / "config.json").write_text('{"architectures": ["Dinov2Model"]}')
    refused(tmp_path, "not timm's")
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    (tmp_path / "noise.safetensors").unlink()
    refused(tmp_path, "config.json without weights")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("steps: 1\n")
    refused(tmp_path / "run", "no checkpoint yet")
    torch.save({"epoch": 1}, tmp_path / "empty.pth")
    refused(tmp_path / "empty.pth", "empty.pth: no tensors")


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_pickles_are_never_run(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad.pth: not loaded: it holds a \S*print"):
        load_backbone(tmp_path / "bad.pth")
    assert "must not run" not in capsys.readouterr().out


def test_loading_leaves_the_generator_alone(tmp_path):
    torch.save(net().state_dict(), tmp_path / "w.pth")
    before = torch.get_rng_state()
    load_backbone(tmp_path / "w.pth")
    assert torch.equal(torch.get_rng_state(), before)
