"""The interface of `Backbone`, for every family of models."""

import copy

import pytest
import torch

from selfsup.backbones import Backbone, count, create_backbone
from selfsup.config import BackboneConfig
from selfsup.errors import UserError

FIXED = {"mixer", "cait"}
WITH_CLS = {"vit", "registers", "distilled", "eva", "cait", "xcit"}
ATTENTION = WITH_CLS | {"vit_avg"}


def noise(backbone: Backbone, h: int | None = None, w: int | None = None, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    height, width = h or backbone.image_size[0], w or backbone.image_size[1]
    return torch.randn(batch, backbone.in_chans, height, width, generator=generator)


def test_features_at_any_size(kind, small):
    backbone = small(kind)
    s = backbone.input_size
    sizes = [(s, s)]
    if not backbone.fixed_size:
        step = backbone.stride
        sizes += [(s + step, s + step), (s + 2 * step, s), (s, s + step)]
    for h, w in sizes:
        backbone.check_size((h, w))
        images = noise(backbone, h, w)
        with torch.no_grad():
            f = backbone(images)
            assert torch.equal(f.pooled, backbone.model(images))
        assert f.pooled.shape == (2, backbone.embed_dim)
        assert f.patches.shape[0] == 2 and f.patches.shape[2:] == (h // backbone.stride, w // backbone.stride)
        assert (f.cls is not None) == (kind in WITH_CLS)
        assert f.cls is None or f.cls.shape == f.pooled.shape
        assert f.registers.shape == (2, 4 if kind == "registers" else 0, f.patches.shape[1])
    assert backbone.fixed_size == (kind in FIXED)


def test_patch_map_is_laid_out_as_the_image(small):
    """A mark in one corner of the image moves the patch features of that corner most."""
    for kind in ("vit", "registers", "distilled", "swin", "resnet", "xcit"):
        backbone = small(kind)
        h, w = backbone.input_size, backbone.input_size + 2 * backbone.stride
        images = torch.zeros(1, 3, h, w)
        marked = images.clone()
        marked[..., : backbone.stride, -backbone.stride :] = 5.0  # top right
        with torch.no_grad():
            change = (backbone(marked).patches - backbone(images).patches).norm(dim=1)[0]  # [h, w]
        assert change.argmax().item() % change.shape[1] == change.shape[1] - 1, kind
        if kind in {"vit", "registers", "distilled"}:
            assert change.argmax().item() == change.shape[1] - 1, kind


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_channels(channels, small):
    for kind in ("vit", "resnet", "swin"):
        backbone = small(kind, channels=channels)
        with torch.no_grad():
            assert backbone(noise(backbone)).pooled.shape == (2, backbone.embed_dim)
        with pytest.raises(UserError, match=rf"takes \[B, {channels}, H, W\]"):
            backbone(torch.zeros(1, channels + 1, backbone.input_size, backbone.input_size))


def test_feature_maps(kind, small):
    backbone = small(kind)
    images = noise(backbone)
    with torch.no_grad():
        maps = backbone.feature_maps(images, layers=(-1, 0, 1))
        features = backbone(images)
        last = backbone.feature_maps(images, layers=2)
    assert all(m.ndim == 4 and m.shape[0] == 2 for m in maps)
    assert torch.equal(maps[0], last[-1]) and len(last) == 2
    assert maps[1].shape[-1] >= maps[0].shape[-1]
    if kind in {"vit", "registers", "distilled", "vit_avg"}:  # final norm, prefix tokens removed: the same features
        assert torch.equal(maps[0], features.patches)
    if kind in {"vit", "registers", "distilled"}:
        assert not torch.equal(backbone.feature_maps(images, layers=(-1,), norm=False)[0], maps[0])
    with pytest.raises(UserError, match="has layers 0 to"):
        backbone.feature_maps(images, layers=(99,))


def test_tokens_of_the_last_layers(small):
    backbone = small("registers")
    images = noise(backbone)
    with torch.no_grad():
        tokens = backbone.tokens(images, n_last=3)
        f = backbone(images)
    assert len(tokens) == 3
    cls, patches = tokens[-1]
    assert torch.equal(cls, f.cls)
    assert torch.allclose(patches, f.patches.mean(dim=(2, 3)), atol=1e-6)
    assert not torch.allclose(tokens[0][0], cls)
    pyramid = small("convnext").tokens(noise(small("convnext")), n_last=2)
    assert [c for c, _ in pyramid] == [None, None] and pyramid[-1][1].shape == (2, 32)


def test_attention_against_a_softmax_by_hand(small):
    for kind, prefix in (("vit", 1), ("registers", 5), ("distilled", 2), ("vit_avg", 0)):
        backbone = small(kind)
        images = noise(backbone, backbone.input_size, backbone.input_size + backbone.patch_size)
        inputs = []
        block = backbone.model.blocks[-1]
        handle = block.register_forward_pre_hook(lambda _m, args, inputs=inputs: inputs.append(args[0]))
        with torch.no_grad():
            f = backbone(images)
        handle.remove()
        x = block.norm1(inputs[0])  # [B, T, D]
        batch, tokens, width = x.shape
        heads = block.attn.num_heads
        qkv = torch.nn.functional.linear(x, block.attn.qkv.weight, block.attn.qkv.bias)
        q, k, _ = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-2, -1) / (width // heads) ** 0.5, dim=-1)  # [B, heads, T, T]
        rows = weights[:, :, 0] if prefix else weights.mean(dim=2)
        expected = rows[:, :, prefix:].reshape(batch, heads, *f.patches.shape[2:])
        found = backbone.attention(images)
        assert torch.allclose(found, expected, atol=1e-6), kind
        assert (found.sum(dim=(2, 3)) < 1).all() or prefix == 0
        assert getattr(block.attn, "fused_attn", False)  # left as it was


def test_attention_of_many_images_in_parts(small, monkeypatch):
    backbone = small("vit")
    images = noise(backbone, batch=5)
    whole = backbone.attention(images)
    monkeypatch.setattr("selfsup.backbones.backbone._ATTENTION_ELEMENTS", 1)
    assert torch.allclose(backbone.attention(images), whole, atol=1e-7)


def test_who_has_attention(kind, small):
    backbone = small(kind)
    assert backbone.has_attention == (kind in ATTENTION)
    if backbone.has_attention:
        h, w = backbone(noise(backbone)).patches.shape[2:]
        assert backbone.attention(noise(backbone)).shape[2:] == (h, w)
    else:
        with pytest.raises(UserError, match="attention"):
            backbone.attention(noise(backbone))


def test_sizes_that_do_not_fit_say_which_do(small):
    with pytest.raises(UserError, match=r"size 30 is not a multiple of the patch \(8\).*use 24 or 32"):
        small("vit").check_size(30)
    with pytest.raises(UserError, match=r"size 30x32 .*use 24x32 or 32"):
        small("vit")(torch.zeros(1, 3, 30, 32))
    with pytest.raises(UserError, match="bound to 96: make all crops that size"):
        small("mixer").check_size(64)
    with pytest.raises(UserError, match=r"size 64: mixer_s32_224"):
        small("mixer")(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="sizes that work: 32, 48, 64, 80"):
        small("swin", patch_size=8, depths=[1, 1]).check_size(30)
    small("resnet").check_size((33, 70))
    padded = small("vit", dynamic_img_pad=True)  # timm's option: pads to whole patches
    padded.check_size((30, 45))
    assert padded(torch.zeros(1, 3, 30, 45)).patches.shape[2:] == (4, 6)


def test_a_trial_of_sizes_changes_nothing(small):
    backbone = small("resnet").train()
    backbone.model.layer1.eval()
    before = copy.deepcopy(backbone.state_dict())
    backbone.check_size(96)
    assert not backbone.fixed_size
    assert all(torch.equal(before[k], v) for k, v in backbone.state_dict().items())
    assert backbone.training and not backbone.model.layer1.training and backbone.model.layer2.training


def test_copies_are_independent_and_equal(small):
    for kind in ("vit", "distilled", "swin"):
        backbone = small(kind)
        other = copy.deepcopy(backbone)
        images = noise(backbone, backbone.input_size + backbone.stride, backbone.input_size)
        with torch.no_grad():
            assert torch.equal(backbone(images).pooled, other(images).pooled)
            next(other.parameters()).zero_()
            assert not torch.equal(backbone(images).pooled, other(images).pooled)


@pytest.mark.parametrize("kind", ["vit", "swin", "convnext", "resnet", "xcit"])
def test_recomputing_activations_changes_no_number(kind, small):
    plain = small(kind, drop_path_rate=0.0).train()  # Swin's default is 0.1
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    recomputed = copy.deepcopy(saving)  # wrappers must follow their own copy
    images = noise(plain)
    results = []
    for backbone in (plain, saving, recomputed):
        backbone(images).pooled.square().sum().backward()
        results.append(([p.grad for p in backbone.parameters()], list(backbone.buffers())))
    for gradients, buffers in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, results[0][0], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(buffers, results[0][1], strict=True))
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t.numel()) or t, lambda t: t):
        saving(images)
        few = sum(stored)
        stored.clear()
        saving.set_grad_checkpointing(False)
        saving(images)
    assert few < 0.8 * sum(stored)


def test_unsupported_recomputation_is_said(small):
    with pytest.raises(UserError, match="grad_checkpointing=true"):
        create("poolformer_s12", size=64).set_grad_checkpointing(True)


def create(name: str, size: int = 32, **options: object) -> Backbone:
    return create_backbone(BackboneConfig(name=name, **options), mean=(0.5,) * 3, std=(0.5,) * 3, input_size=size)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, r"backbone.name='resnet81'.*did you mean resnet18"),
        ("vit_tiny_patch16_224.nonsense", {}, "has no weights 'nonsense'"),
        ("vit_tiny_patch16_224", {"drop_pth_rate": 0.1}, "backbone.drop_pth_rate.*did you mean drop_path_rate"),
        ("resnet18", {"drop_pth_rate": 0.1}, "backbone.drop_pth_rate.*did you mean drop_path_rate"),
        ("vit_tiny_patch16_224", {"depth": "many"}, "timm refuses the options"),
        ("mixer_s32_224", {"num_blocks": 2}, "backbone.num_blocks: timm fixes it"),
        ("vit_tiny_patch16_224", {"num_classes": 10}, "backbone.num_classes=10"),
        ("resnet18", {"global_pool": ""}, "backbone.global_pool"),
        ("xcit_nano_12_p16_224", {"pos_interp": "dino"}, "backbone.pos_interp=dino: only plain ViTs"),
        ("crossvit_tiny_240", {}, "crossvit_tiny_240"),
    ],
)
def test_names_and_options_that_are_wrong(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        backbone = create(name, size=240 if "cross" in name else 32, **options)
        backbone.check_size(240)
    assert str(caught.value).count("\n") <= 1


def test_mean_and_std_are_one_a_channel():
    config = BackboneConfig(name="resnet18", in_chans=4)
    with pytest.raises(UserError, match="in_chans=4; give one a channel"):
        create_backbone(config, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_count_parameters(small):
    backbone = small("vit")
    total = sum(p.numel() for p in backbone.parameters())
    backbone.model.cls_token.requires_grad_(False)
    assert count(backbone) == (total, total - 48)


def test_same_seed_same_weights_whatever_the_number_of_attempts(small):
    """Options that timm refuses at first (dynamic sizes) leave no trace in what is drawn."""
    first = small("swin").state_dict()
    assert all(torch.equal(first[k], v) for k, v in small("swin").state_dict().items())
