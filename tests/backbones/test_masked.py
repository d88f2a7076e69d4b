"""Masked patches and left-out patches, against timm's own forward and a transformer in plain steps."""

import contextlib

import pytest
import timm
import torch

from selfsup.backbones import Backbone, create_backbone
from selfsup.backbones.create import wrap
from selfsup.backbones.stochastic import key_stochastic_layers
from selfsup.config import BackboneConfig
from selfsup.errors import UserError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "dynamic_img_size": True}
VARIANTS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "fixed": ("vit_tiny_patch16_224", {"dynamic_img_size": False}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "average": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
}


def build(variant: str, interp: str = "timm", **more: object) -> Backbone:
    name, options = VARIANTS[variant]
    options = {**TINY, **options, **more}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).double()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    mean = (0.5,) * 3
    return wrap(model, name, options, mean=mean, std=mean, input_size=32, pos_interp=interp).double()


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_hidden_is_the_forward_pass(variant: str) -> None:
    backbone = build(variant)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    plain = backbone(images)
    token = torch.full((24,), 7.0, dtype=torch.float64)
    same = backbone.forward_masked(images, torch.zeros(3, 16, dtype=torch.bool), token)
    for a, b in zip(plain, same):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    tokens = backbone.encode_visible(images, torch.arange(16).expand(3, 16))
    whole = backbone.model.fc_norm(backbone.model.forward_features(images))
    torch.testing.assert_close(tokens, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interp", ["timm", "dino"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "fixed"])
def test_hidden_patches_do_not_matter(variant: str, interp: str) -> None:
    """At another size: what is under the mask changes nothing; the mask token and what is beside it do."""
    backbone = build(variant, interp)
    assert backbone.token_grid((16, 24)) == (2, 3)
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    hidden = torch.tensor([[True, False, False, True, False, False], [False, False, True, True, True, False]])
    token = torch.randn(24, dtype=torch.float64)
    out = backbone.forward_masked(images, hidden, token)
    pixels = hidden.reshape(2, 1, 2, 3).repeat_interleave(8, 2).repeat_interleave(8, 3)
    same = backbone.forward_masked(torch.where(pixels, 5.0, images), hidden, token)
    assert torch.equal(out.patches, same.patches) and torch.equal(out.pooled, same.pooled)
    assert out.patches.shape == (2, 24, 2, 3)
    assert not torch.allclose(out.pooled, backbone.forward_masked(images, hidden, token.flip(0)).pooled)
    assert not torch.allclose(out.pooled, backbone(images).pooled)


@pytest.mark.parametrize("variant", VARIANTS)
def test_visible_patches_alone(variant: str) -> None:
    """Equals the model run on the tokens that were kept, in their order."""
    backbone = build(variant)
    model = backbone.model
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    keep = torch.tensor([[3, 1, 12, 7], [0, 5, 6, 15]])
    out = backbone.encode_visible(images, keep)
    x = model._pos_embed(model.patch_embed(images))
    prefix = model.num_prefix_tokens
    rows = [torch.cat([x[b : b + 1, :prefix], x[b : b + 1, prefix:][:, keep[b]]], 1) for b in range(2)]
    expected = torch.cat([model.fc_norm(model.norm(model.blocks(row))) for row in rows])
    assert out.shape == (2, prefix + 4, 24)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_keyed_drop_path_and_recomputation(checkpointing: bool) -> None:
    """What is dropped goes by sample, not by its company, and recomputed blocks give the same gradients."""
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    hidden = torch.rand(4, 16) < 0.5
    token = torch.randn(24, dtype=torch.float64, requires_grad=True)
    grads = []
    for switch in {False, checkpointing}:
        backbone = build("plain", drop_path_rate=0.5).train()
        keys = key_stochastic_layers(backbone, seed=3)
        assert keys is not None
        if switch:
            backbone.set_grad_checkpointing()
        with keys.at(5, torch.arange(4)):
            out = backbone.forward_masked(images, hidden, token).pooled
        with keys.at(5, torch.arange(4)):
            seen = backbone.encode_visible(images, torch.arange(8).expand(4, 8))
        with keys.at(5, torch.arange(2, 4)):
            part = backbone.forward_masked(images[2:], hidden[2:], token).pooled
        torch.testing.assert_close(out[2:], part, rtol=1e-12, atol=1e-12)
        (out.square().sum() + seen.square().sum()).backward()
        grads.append([p.grad for p in backbone.parameters()])
    for a, b in zip(grads[0], grads[-1]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "reason"), [("resnet18", "ResNet"), ("swin_tiny_patch4_window7_224", "Swin")])
def test_others_are_refused(name: str, reason: str) -> None:
    with contextlib.suppress(RuntimeError):
        backbone = create_backbone(BackboneConfig(name=name), mean=(0.5,) * 3, std=(0.5,) * 3, input_size=224)
    with pytest.raises(UserError, match=f"(?s){name}.*{reason}.*plain ViT"):
        backbone.token_grid(224)
