"""TimeSformer against `transformers`, against a plain reading of the paper, and as a backbone."""

import pytest
import timm
import torch
from torch import nn

import selfsup
from selfsup.backbones import create_backbone, export_timm, load_backbone, timm_difference
from selfsup.backbones.checkpointing import set_checkpointing
from selfsup.backbones.clips import ClipBackbone
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.backbones.timesformer import TimeSformer
from selfsup.backbones.timesformer_keys import from_transformers
from selfsup.config import BackboneConfig
from selfsup.errors import UserError

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8, "img_size": 32, "frames": 4}
ATTENTIONS = ("divided", "joint", "space")


def _shaken(model: nn.Module) -> nn.Module:
    """Every weight away from its start: zeros would hide what they multiply."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def tiny(attention: str = "divided", **options) -> ClipBackbone:
    values = {**TINY, "attention": attention, **options}
    made = create_backbone(BackboneConfig(name="timesformer", **values), mean=(0.5,) * 3, std=(0.5,) * 3)
    assert isinstance(made, ClipBackbone)
    return made


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))  # [B, C, T, H, W]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_equals_transformers(attention: str, clips: torch.Tensor) -> None:
    """The same weights in `transformers`: the same tokens; and all its keys are accepted, none is made up."""
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    kinds = {"divided": "divided_space_time", "joint": "joint_space_time", "space": "space_only"}
    config = TimesformerConfig(
        image_size=32, patch_size=8, num_frames=4, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=128, attention_type=kinds[attention], num_labels=5,
    )  # fmt: skip
    theirs = _shaken(TimesformerForVideoClassification(config))
    ours = TimeSformer(**TINY, attention=attention, num_classes=5).eval()
    ours.load_state_dict(from_transformers(theirs.state_dict()))  # strict
    with torch.no_grad():
        if (
            attention == "space"
        ):  # it gives one answer a frame; the published code has the mean over frames before the norm
            last = theirs(clips.transpose(1, 2), output_hidden_states=True).hidden_states[-1]
            cls = last.unflatten(0, (2, 4))[:, :, 0].mean(dim=1)
            expected = theirs.classifier(theirs.timesformer.layernorm(cls))
        else:
            expected = theirs(clips.transpose(1, 2)).logits
        torch.testing.assert_close(ours(clips), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_divided_block_is_the_papers() -> None:
    """Equations 10 and 11, token by token, with softmax written out."""
    block = _shaken(tiny().model.blocks[0])
    frames, places, width, heads = 3, 4, 32, 2
    x = torch.randn(1, 1 + frames * places, width, generator=torch.Generator().manual_seed(2))

    def attend(part: nn.Module, tokens: torch.Tensor) -> torch.Tensor:  # [N, D]
        q, k, v = part.qkv(tokens).reshape(len(tokens), 3, heads, -1).unbind(1)  # [N, heads, d]
        out = []
        for h in range(heads):
            scores = (q[:, h] @ k[:, h].T) / q.shape[-1] ** 0.5
            out.append(torch.exp(scores) / torch.exp(scores).sum(1, keepdim=True) @ v[:, h])
        return part.proj(torch.cat(out, 1))

    with torch.no_grad():
        at = {(t, n): 1 + t * places + n for t in range(frames) for n in range(places)}
        y = x[0].clone()
        for n in range(places):
            rows = [at[t, n] for t in range(frames)]
            y[rows] += block.temporal_fc(attend(block.temporal_attn, block.temporal_norm1(x[0, rows])))
        z, cls = y.clone(), []
        for t in range(frames):
            rows = [0, *(at[t, n] for n in range(places))]
            found = attend(block.attn, block.norm1(y[rows]))
            z[rows[1:]] += found[1:]
            cls.append(found[0])
        z[0] += torch.stack(cls).mean(0)
        z += block.mlp(block.norm2(z))
        torch.testing.assert_close(block(x, frames)[0], z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_features_layouts_and_other_sizes(attention: str, clips: torch.Tensor) -> None:
    backbone = _shaken(tiny(attention))
    f = backbone(clips)
    assert f.pooled.shape == f.cls.shape == (2, 32) and f.patches.shape == (2, 32, 4, 4, 4)
    packed = clips.transpose(1, 2).flatten(1, 2)  # as the loader moves them
    assert torch.equal(backbone(packed).pooled, f.pooled)
    wide = backbone(torch.randn(1, 3, 6, 48, 16))
    assert wide.patches.shape == (1, 32, 6, 6, 2)
    assert backbone(torch.randn(1, 3, 32, 32)).patches.shape == (1, 32, 1, 4, 4)  # an image
    last = backbone.feature_maps(clips, [-1])[0]
    assert torch.equal(last, f.patches)
    (cls, mean), *_ = backbone.tokens(clips, 2)[-1:]
    assert torch.equal(cls, f.cls) and torch.allclose(mean, f.patches.mean((2, 3, 4)))
    order = backbone(clips.flip(2)).pooled
    assert torch.allclose(order, f.pooled, atol=1e-5) == (attention == "space")  # who sees the order of frames
    with pytest.raises(UserError, match="not a multiple of the patch"):
        backbone(torch.zeros(1, 3, 4, 30, 32))
    with pytest.raises(UserError, match=r"takes \[B, 3, T, H, W\]"):
        backbone(torch.zeros(1, 4, 32, 32))


def test_export_loads_here_and_keeps_attention_and_frames(tmp_path, clips: torch.Tensor) -> None:
    backbone = _shaken(tiny("joint"))
    export_timm(backbone, tmp_path)
    again = selfsup.load_backbone(tmp_path)
    assert torch.equal(again(clips).pooled, backbone(clips).pooled)
    assert timm_difference(backbone, tmp_path) == 0.0  # with the names that this package adds to timm's
    assert again.frames == 4 and again.model.attention == "joint"
    other = selfsup.load_backbone(tmp_path, frames=8, img_size=48)
    assert other.model.time_embed.shape[1] == 8 and other.model.pos_embed.shape[1] == 37


def _published(depth: int, frames: int) -> dict[str, torch.Tensor]:
    """Names and shapes of TimeSformer_divST_8x32_224_K400.pyth; every tensor holds one number."""
    d, shapes = 768, {}
    shapes |= {"cls_token": (1, 1, d), "pos_embed": (1, 197, d), "time_embed": (1, frames, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,)}
    for i in range(depth):
        b = f"blocks.{i}."
        for norm in ("norm1", "temporal_norm1", "norm2"):
            shapes |= {f"{b}{norm}.weight": (d,), f"{b}{norm}.bias": (d,)}
        for part in ("attn", "temporal_attn"):
            shapes |= {f"{b}{part}.qkv.weight": (3 * d, d), f"{b}{part}.qkv.bias": (3 * d,)}
            shapes |= {f"{b}{part}.proj.weight": (d, d), f"{b}{part}.proj.bias": (d,)}
        shapes |= {f"{b}temporal_fc.weight": (d, d), f"{b}temporal_fc.bias": (d,)}
        shapes |= {f"{b}mlp.fc1.weight": (4 * d, d), f"{b}mlp.fc1.bias": (4 * d,)}
        shapes |= {f"{b}mlp.fc2.weight": (d, 4 * d), f"{b}mlp.fc2.bias": (d,)}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,), "head.weight": (400, d), "head.bias": (400,)}
    return {f"model.{key}": torch.full((1,), 0.01).expand(shape) for key, shape in shapes.items()}


def test_published_checkpoint_loads_in_full(tmp_path, capsys) -> None:
    path = tmp_path / "TimeSformer.pyth"
    torch.save({"epoch": 14, "model_state": _published(2, 8), "cfg": "TRAIN: {}"}, path)
    found = load_backbone(path)
    said = capsys.readouterr().err
    assert "matched 47/47" in said
    assert found.name.startswith("timesformer") and found.frames == 8 and found.model.attention == "divided"
    assert found.mean == (0.45, 0.45, 0.45) and found.embed_dim == 768
    assert all(bool((p == torch.tensor(0.01)).all()) for p in found.model.parameters())
    longer = load_backbone(path, frames=16)
    assert longer.model.time_embed.shape == (1, 16, 768)


def test_transformers_file_loads_by_its_keys(tmp_path, clips: torch.Tensor) -> None:
    from transformers import TimesformerConfig, TimesformerModel

    config = TimesformerConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
    )
    theirs = _shaken(TimesformerModel(config))
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    ours = load_backbone(tmp_path / "pytorch_model.bin")
    with torch.no_grad():
        expected = theirs(clips.transpose(1, 2)).last_hidden_state[:, 0]
        torch.testing.assert_close(ours(clips).cls, expected, rtol=1e-4, atol=1e-4)


def test_keyed_drop_path_and_recomputation_change_nothing(clips: torch.Tensor) -> None:
    """Masks are one a sample and a layer, also where places and frames lie in the batch; recomputed blocks draw the same."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = tiny(drop_path_rate=0.5).train()
        keys = key_stochastic_layers(model, 0)
        if recompute:
            set_checkpointing(model.model, True, "timesformer")
        with keys.at(3, torch.arange(2)):
            model(clips).pooled.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True)) and len(grads[0]) > 40


def test_names_and_bad_options() -> None:
    assert {"timesformer", "timesformer_small_patch16_224"} <= set(timm.list_models("timesformer*"))
    with pytest.raises(UserError, match="divided, joint or space"):
        tiny("both")
    with pytest.raises(UserError, match=r"backbone.frmes.*did you mean"):
        tiny(frmes=3)
