"""SegFormer's encoders against segmentation_models_pytorch's and transformers'; published files; PVT v1's attention."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models.twins import GlobalSubSampleAttn
from torch import Tensor, nn

from selfsup.backbones import create_backbone, export_timm, load_backbone
from selfsup.backbones.mit import MIT
from selfsup.config import BackboneConfig
from selfsup.errors import UserError

SMALL = {"embed_dims": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "num_heads": [1, 2, 3, 4]}


def stirred(model: nn.Module) -> nn.Module:
    """In eval mode, no weight zero or one."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def matched(capsys) -> tuple[int, int, str]:
    err = capsys.readouterr().err
    n, m = re.search(r"matched (\d+)/(\d+) tensors", err).groups()
    return int(n), int(m), err


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_a_file_of_the_authors_computes_what_theirs_does(tmp_path: Path, images: Tensor, capsys) -> None:
    """Weights of segmentation_models_pytorch's mit_b0, which keeps NVlabs' code and keys; as published, heads and all."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    theirs = stirred(smp.encoders.get_encoder("mit_b0", weights=None))
    state = theirs.state_dict()
    torch.save(
        {**state, "head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}, tmp_path / "mit_b0.pth"
    )
    whole = {f"backbone.{key}": value for key, value in state.items()}
    whole |= {"decode_head.linear_c4.proj.weight": torch.zeros(8, 256), "decode_head.conv_seg.bias": torch.zeros(19)}
    torch.save({"state_dict": whole, "meta": {"epoch": 1}}, tmp_path / "segformer.b0.512x512.ade.160k.pth")
    for file in ("mit_b0.pth", "segformer.b0.512x512.ade.160k.pth"):
        ours = load_backbone(tmp_path / file)
        n, m, err = matched(capsys)
        assert n == m == len(state) and "pvt keys, mit_b0" in err and ours.mean == (0.485, 0.456, 0.406)
        with torch.no_grad():
            found, expected = ours.feature_maps(images, (0, 1, 2, 3)), theirs(images)[2:]
        for mine, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4)
    export_timm(ours, tmp_path / "out")  # bare timm, without a word of ours
    bare = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(bare(images), ours(images).pooled)
    assert load_backbone(tmp_path / "out").name == "pvt_v2_b0"


@pytest.mark.parametrize("name", MIT)
def test_all_six_have_the_numbers_of_theirs(name: str) -> None:
    table = pytest.importorskip("segmentation_models_pytorch.encoders.mix_transformer").mix_transformer_encoders
    theirs = table[name]["params"]
    with torch.device("meta"):
        stages = create_backbone(BackboneConfig(name=name), mean=(0.5,) * 3, std=(0.5,) * 3).model.stages
    first = [stage.blocks[0] for stage in stages]
    assert [len(stage.blocks) for stage in stages] == theirs["depths"]
    assert [block.norm1.normalized_shape[0] for block in first] == theirs["embed_dims"]
    assert [block.attn.num_heads for block in first] == theirs["num_heads"]
    ratios = [block.mlp.fc1.out_features // block.mlp.fc1.in_features for block in first]
    assert ratios == theirs["mlp_ratios"]
    assert [block.attn.sr.stride[0] if block.attn.sr else 1 for block in first] == theirs["sr_ratios"]
    assert first[0].norm1.eps == theirs["norm_layer"].keywords["eps"] == 1e-6
    assert stages[1].downsample.norm.eps == first[0].attn.norm.eps == 1e-5  # these keep torch's


@pytest.mark.parametrize("published", [True, False], ids=["published", "in_memory"])
def test_files_of_transformers(published: bool, tmp_path: Path, images: Tensor, capsys) -> None:
    """Its blocks' norms have an epsilon of 1e-5, not the authors' 1e-6: the features differ by some 1e-5."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": SMALL["embed_dims"], "depths": SMALL["depths"], "num_attention_heads": SMALL["num_heads"]}
    config = transformers.SegformerConfig(**sizes, decoder_hidden_size=8)
    theirs = stirred(transformers.SegformerForSemanticSegmentation(config))
    file = tmp_path / "hf" / "weights.safetensors"
    if published:
        theirs.save_pretrained(tmp_path / "hf")  # the names of nvidia/segformer-b0-finetuned-ade-512-512
        (tmp_path / "hf" / "model.safetensors").rename(file)
    else:
        file = tmp_path / "weights.pth"
        torch.save(theirs.state_dict(), file)
    ours = load_backbone(file, name="mit_b0", **SMALL)
    n, m, err = matched(capsys)
    assert n == m == len(ours.model.state_dict()) and "segformer keys" in err
    with torch.no_grad():
        expected = theirs.segformer(images, output_hidden_states=True).hidden_states
        found = ours.feature_maps(images, (0, 1, 2, 3))
    for mine, wanted in zip(found, expected[-4:], strict=True):
        torch.testing.assert_close(mine, wanted, rtol=2e-3, atol=5e-4)


def test_names(tmp_path: Path) -> None:
    def build(**options):
        return create_backbone(BackboneConfig(**options), mean=(0.5,) * 3, std=(0.5,) * 3)

    with torch.device("meta"):
        assert build(name="mit_b1").embed_dim == 512
        assert build(name="mit_b0", mlp_ratios=[2, 2, 2, 2]).model.stages[0].blocks[0].mlp.fc1.out_features == 64
    with pytest.raises(UserError, match=r"no such model; did you mean .*mit_b0"):
        build(name="mitb0")
    with pytest.raises(UserError, match="timm has no weights for mit_b0; give a published file with init_from"):
        build(name="mit_b0", pretrained=True)
    odd = timm.create_model("pvt_v2_b0", num_classes=0, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4))
    torch.save(odd.state_dict(), tmp_path / "odd.pth")
    with pytest.raises(UserError, match="other depths or widths than those published"):
        load_backbone(tmp_path / "odd.pth")
    for name in ("pvt_v2_b0", "pvt_v2_b2_li"):
        torch.save(timm.create_model(name, num_classes=0).state_dict(), tmp_path / f"{name}.pth")
        assert load_backbone(tmp_path / f"{name}.pth").name == name


def test_twins_attention_is_that_of_pvt_v1() -> None:
    """SRA (Wang et al., 2021, "Pyramid Vision Transformer", equations 1 to 3) by hand: a reduction of R x R, a norm, heads."""
    torch.manual_seed(0)
    layer = stirred(GlobalSubSampleAttn(12, num_heads=3, sr_ratio=2))
    x = torch.randn(2, 4 * 6, 12)
    cells = x.reshape(2, 2, 2, 3, 2, 12).permute(0, 1, 3, 5, 2, 4).flatten(3)  # [B, h/R, w/R, C*R*R]
    reduced = layer.norm(cells.flatten(1, 2) @ layer.sr.weight.flatten(1).T + layer.sr.bias)  # SR(x): [B, 6, C]
    q = layer.q(x).reshape(2, 24, 3, 4).transpose(1, 2)
    k, v = (part.reshape(2, 6, 3, 4).transpose(1, 2) for part in layer.kv(reduced).chunk(2, dim=-1))
    heads = torch.softmax(q @ k.transpose(2, 3) / 4**0.5, dim=-1) @ v
    torch.testing.assert_close(layer(x, (4, 6)), layer.proj(heads.transpose(1, 2).flatten(2)))
