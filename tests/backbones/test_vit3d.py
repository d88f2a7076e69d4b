"""The 3-D ViT: its patches are a convolution's, its positions trilinear, its files ours; what it does not take."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from selfsup.backbones import Backbone, create_backbone, load_backbone
from selfsup.backbones.export import export_onnx, export_timm, timm_difference
from selfsup.backbones.masked import check_maskable
from selfsup.backbones.positions import resample_tokens, sincos_positions
from selfsup.backbones.program import export_program
from selfsup.config import BackboneConfig
from selfsup.errors import UserError
from selfsup.losses.reconstruction import patchify

OPTIONS = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": [2, 4, 4], "img_size": [4, 12, 8], "in_chans": 2}


def made(**changes) -> Backbone:
    torch.manual_seed(0)
    spec = BackboneConfig(name="vit3d_tiny", **{**OPTIONS, **changes})
    return create_backbone(spec, mean=(0.5,) * spec.in_chans, std=(0.25,) * spec.in_chans).eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_patches_are_those_of_a_convolution_in_either_layout():
    embed, x = made().model.patch_embed, noise(3, 2, 4, 12, 8)
    kernel = embed.proj.weight.unflatten(1, (2, 2, 4, 4))
    expected = F.conv3d(x, kernel, embed.proj.bias, stride=(2, 4, 4)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(embed(x), expected)
    slices = torch.cat([x[:, :, d] for d in range(4)], dim=1)  # slice after slice, its channels together
    assert torch.equal(embed(slices), embed(x))


def test_features_of_any_size_and_layout():
    backbone = made()
    for size in ((4, 12, 8), (6, 8, 16)):
        x, grid = noise(2, 2, *size), (size[0] // 2, size[1] // 4, size[2] // 4)
        f = backbone(x)
        assert torch.equal(f.pooled, backbone.model(x)) and f.cls.shape == (2, 24) and f.registers.shape == (2, 0, 24)
        assert f.patches.shape == (2, 24, *grid)
        last = backbone.feature_maps(x, (0, 3))[1]
        torch.testing.assert_close(last, f.patches)
        every = torch.arange(f.patches[0, 0].numel()).expand(2, -1)
        torch.testing.assert_close(backbone.encode_visible(x, every)[:, 0], f.cls)
        assert backbone.tokens(x, 2)[-1][1].shape == (2, 24)
    registers = made(reg_tokens=2)(noise(1, 2, 4, 12, 8))
    assert registers.registers.shape == (1, 2, 24) and registers.patches.shape == (1, 24, 2, 3, 2)
    mean = made(class_token=False, global_pool="avg")(noise(1, 2, 4, 12, 8))
    assert mean.cls is None and mean.pooled.shape == (1, 24)


def test_positions_are_resampled_as_torch_interpolates_trilinearly():
    pos = noise(1, 1 + 2 * 3 * 4, 5)
    found = resample_tokens(pos, (2, 3, 4), (3, 2, 7), "timm", 1)
    volume = pos[:, 1:].reshape(1, 2, 3, 4, 5).permute(0, 4, 1, 2, 3)
    expected = F.interpolate(volume, size=(3, 2, 7), mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[:, 1:], expected)
    assert torch.equal(found[:, :1], pos[:, :1])


def test_fixed_positions_tell_all_places_apart():
    pos = sincos_positions(26, (3, 4, 5))
    assert pos.shape == (60, 26) and (pos[:, 24:] == 0).all()
    assert torch.cdist(pos, pos).add(torch.eye(60, dtype=pos.dtype)).min() > 0.1


def test_patchify_goes_through_slices_rows_columns_channels():
    x = noise(1, 2, 4, 4, 6)
    patches = patchify(x, (2, 4, 3))
    assert patches.shape == (1, 2 * 1 * 2, 2 * 4 * 3 * 2)
    assert torch.equal(patches[0, 3], x[0, :, 2:4, 0:4, 3:6].permute(1, 2, 3, 0).flatten())


def test_a_folder_gives_the_same_again_and_says_whose_it_is(tmp_path: Path):
    backbone, x = made(), noise(2, 2, 4, 12, 8)
    export_timm(backbone, tmp_path)
    again = load_backbone(tmp_path)
    assert torch.equal(again(x).pooled, backbone(x).pooled) and timm_difference(backbone, tmp_path) == 0
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert "bare timm does not know" in recorded["selfsup"]["note"] and recorded["model_args"]["img_size"] == [4, 12, 8]
    other = load_backbone(tmp_path, img_size=[8, 12, 4])
    assert other.volume_size == (8, 12, 4)
    y = noise(1, 2, 8, 12, 4)
    torch.testing.assert_close(other(y).pooled, backbone(y).pooled)


def test_kernels_of_a_convolution_load(tmp_path: Path):
    from safetensors.torch import save_file

    backbone = made()
    state = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    key = "patch_embed.proj.weight"
    save_file({**state, key: state[key].unflatten(1, (2, 2, 4, 4)).contiguous()}, tmp_path / "w.safetensors")
    options = {**OPTIONS, "name": "vit3d_tiny"}
    again = load_backbone(tmp_path / "w.safetensors", **options)
    assert torch.equal(again.model.patch_embed.proj.weight, state[key])
    with pytest.raises(UserError, match=r"do not tell its patches and grid; give the folder"):
        load_backbone(tmp_path / "w.safetensors")


def test_a_program_and_onnx_give_the_same_for_other_batches(tmp_path: Path):
    backbone = made()
    assert export_program(backbone, tmp_path / "v.pt2") < 1e-5
    assert export_onnx(backbone, tmp_path / "v.onnx") < 1e-5


def test_bad_input():
    backbone = made()
    with pytest.raises(
        UserError, match=r"size 4x10x8 is not a multiple of the patch \(2x4x4\) of vit3d_tiny; use 4x12x8"
    ):
        backbone(noise(1, 2, 4, 10, 8))
    with pytest.raises(UserError, match=r"takes volumes \[B, 2, D, H, W\], or slice after slice \[B, D\*2, H, W\]"):
        backbone(noise(1, 3, 8, 8))
    with pytest.raises(UserError, match=r"iBOT hides blocks of images; of volumes method=mae does"):
        check_maskable(backbone, "iBOT")
    with pytest.raises(UserError, match=r"img_size \[4, 10, 8\] is no multiple of patch_size \[2, 4, 4\]"):
        made(img_size=[4, 10, 8])
    with pytest.raises(UserError, match="give a number, or"):
        made(img_size=[4, 8])
