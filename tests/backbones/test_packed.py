"""ViTs over crops of several sizes at once: the same embeddings and gradients as one forward a size."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import nn

from selfsup.backbones import Backbone, create_backbone, lean, packed
from selfsup.backbones.stochastic import key_stochastic_layers, strip_stochastic_layers
from selfsup.config import BackboneConfig

SIZES = ((3, 32), (5, 16))  # (images, pixels)
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def vit(name: str = "vit_tiny_patch16_224", pos_interp: str = "timm", **options: Any) -> Backbone:
    torch.manual_seed(0)
    config = BackboneConfig(name=name, pos_interp=pos_interp, **{**TINY, **options})
    backbone = create_backbone(config, mean=(0.5,) * 3, std=(0.5,) * 3, input_size=32).train()
    for p in backbone.parameters():  # so that no part is at a point where its gradient is special
        p.data += 0.1 * torch.randn_like(p)
    return backbone


def crops(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 3, size, size, dtype=dtype) for n, size in SIZES]


def results(backbone: Backbone, images: list[torch.Tensor], shortcuts: set[str], **given: Any):
    """(pooled embeddings of all images, gradients by name)."""
    backbone.zero_grad(set_to_none=True)
    backbone.shortcuts = frozenset(shortcuts)
    pooled = torch.cat(backbone.embed(images, **given))
    weights = torch.linspace(-1, 1, pooled.numel(), dtype=torch.float64).view_as(pooled)
    (pooled.double() * weights).sin().sum().backward()
    return pooled.detach(), {k: p.grad for k, p in backbone.named_parameters() if p.grad is not None}


def assert_same(a: Any, b: Any, tolerance: float) -> None:
    assert a[1].keys() == b[1].keys()
    assert (a[0] - b[0]).abs().max() <= tolerance * b[0].abs().max()
    largest = max(g.abs().max() for g in b[1].values())
    for name, g in b[1].items():
        floor = 1e-3 * largest if name.endswith("qkv.bias") else 0.0  # its key third is zero but for rounding
        assert (a[1][name] - g).abs().max() <= tolerance * max(g.abs().max(), floor), name


@pytest.mark.parametrize("shortcuts", [{"packed"}, {"packed", "cls"}])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_values": 0.3},
        {"qkv_bias": False},
        {"global_pool": "avg"},
        {"name": "vit_small_patch14_reg4_dinov2", "reg_tokens": 2},
        {"pre_norm": True, "pos_interp": "dino"},
        {"depth": 1, "num_heads": 4},
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_equals_one_forward_a_size(options: dict[str, Any], shortcuts: set[str]) -> None:
    backbone = vit(**options).double()
    assert packed.fits(backbone.model)
    assert_same(results(backbone, crops(), shortcuts), results(backbone, crops(), set()), 1e-11)


def test_float32() -> None:
    backbone, images = vit(), crops(torch.float32)
    assert_same(results(backbone, images, {"packed", "cls"}), results(backbone, images, set()), 2e-5)


def test_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last block's MLP sees one token an image, and the others' are not called."""
    backbone = vit().double()
    seen: list[tuple[int, ...]] = []
    plain = type(backbone.model.blocks[-1].mlp).forward
    monkeypatch.setattr(
        type(backbone.model.blocks[-1].mlp), "forward", lambda self, x: (seen.append(tuple(x.shape)), plain(self, x))[1]
    )
    results(backbone, crops(), {"packed", "cls"})
    assert seen == [(sum(n for n, _ in SIZES), 32)]


def test_keyed_drop_path() -> None:
    """Each image is dropped where it would be in a forward of its own size."""
    backbone = vit(drop_path_rate=0.5).double()
    keys = key_stochastic_layers(backbone, seed=3)
    samples = [torch.arange(3), torch.arange(7, 12)]
    given = {"samples": samples, "draw": lambda s: keys.at(4, s)}
    plain = results(backbone, crops(), set(), **given)
    assert_same(results(backbone, crops(), {"packed", "cls"}, **given), plain, 1e-11)
    assert_same(results(backbone, crops(), {"packed"}, **given), plain, 1e-11)
    other = results(backbone, crops(), {"packed", "cls"}, samples=samples, draw=lambda s: keys.at(5, s))
    assert not torch.equal(other[0], plain[0])


@pytest.mark.parametrize(
    "options", [{"proj_drop_rate": 0.1}, {"attn_drop_rate": 0.1}, {"pos_drop_rate": 0.1}, {"qk_norm": True}], ids=str
)
def test_other_models_keep_their_own_forward(options: dict[str, Any]) -> None:
    """What it does not know is left to timm: dropout, other attention; dropout that is off or stripped is no hindrance."""
    backbone = vit(**options).double()
    assert not packed.fits(backbone.model)
    keys = key_stochastic_layers(copy.deepcopy(backbone), seed=0)
    assert (keys is not None) == ("qk_norm" not in options)
    if keys is not None:
        assert packed.fits(strip_stochastic_layers(backbone).model)
        key_stochastic_layers(keyed := vit(**options), seed=0)
        assert not packed.fits(keyed.model)


def test_patched_hooked_or_convolutional_models_keep_their_own_forward() -> None:
    backbone = vit()
    handle = backbone.model.blocks[1].attn.register_forward_hook(lambda *a: None)
    assert not packed.fits(backbone.model)
    handle.remove()
    assert packed.fits(backbone.model)
    backbone.set_grad_checkpointing()
    assert not packed.fits(backbone.model)
    backbone.set_grad_checkpointing(False)
    assert packed.fits(backbone.model)
    torch.manual_seed(0)
    net = create_backbone(BackboneConfig(name="resnet10t"), mean=(0.5,) * 3, std=(0.5,) * 3)
    net.shortcuts = frozenset({"packed", "cls"})
    assert not packed.fits(net.model) and len(net.embed([torch.randn(2, 3, 32, 32), torch.randn(2, 3, 64, 64)])) == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"output_fmt": "NHWC", "strict_img_size": False},
        {"norm_layer": nn.LayerNorm, "bias": False},
        {"flatten": False},
        {"dynamic_img_pad": True, "strict_img_size": False},
    ],
    ids=str,
)
def test_patches_are_the_convolutions(options: dict[str, Any]) -> None:
    """Of rectangles too; what is no list of plain patches is left to timm."""
    torch.manual_seed(0)
    embed = PatchEmbed(img_size=(16, 24), patch_size=(8, 4), embed_dim=10, **options).double()
    size = (15, 23) if "dynamic_img_pad" in options else (16, 24)
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found = []
    for function in (embed, lambda x: packed._patches(embed, x)):
        y = function(x)
        gradients = torch.autograd.grad(y.sin().sum(), [x, *embed.parameters()])
        found.append([y, *gradients])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    if embed.strict_img_size:
        with pytest.raises(AssertionError, match="doesn't match model"):
            packed._patches(embed, torch.zeros(2, 3, 24, 24, dtype=torch.float64))


def test_wrong_sizes_are_named() -> None:
    from selfsup.errors import UserError

    backbone = vit()
    backbone.shortcuts = frozenset({"packed"})
    with pytest.raises(UserError, match="not a multiple of the patch"):
        backbone.embed([torch.zeros(1, 3, 30, 30)])


def test_bf16_is_as_near_to_float32_as_timm() -> None:
    backbone, images = vit(embed_dim=64, depth=6), crops(torch.float32)
    exact = results(backbone, images, set())
    off = []
    for shortcuts in ({"packed", "cls"}, set()):
        with torch.autocast("cpu", torch.bfloat16):
            found = results(backbone, images, shortcuts)
        assert all(g.dtype == torch.float32 for g in found[1].values())
        a, b = (torch.cat([r[1][k].flatten().double() for k in sorted(exact[1])]) for r in (found, exact))
        off.append(1 - F.cosine_similarity(a, b, dim=0).item())
    assert off[0] <= 1.2 * off[1]


def test_repeats_bit_for_bit() -> None:
    backbone, images = vit(), crops(torch.float32)
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            a, b = (results(backbone, images, {"packed", "cls"}) for _ in range(2))
        assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][k], b[1][k]) for k in b[1])


def test_parts_gradcheck() -> None:
    torch.manual_seed(0)
    norm, layer, act = nn.LayerNorm(5).double(), nn.Linear(5, 4).double(), nn.GELU()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    for p in norm.parameters():
        p.data.normal_()
    args = (x, norm.weight, norm.bias, 1e-6, layer.weight, layer.bias)
    assert torch.autograd.gradcheck(lean._NormLinear.apply, args)
    assert torch.autograd.gradcheck(lean._GeluLinear.apply, (x, "none", layer.weight, layer.bias))
    assert torch.autograd.gradcheck(lean._GeluLinear.apply, (x, "tanh", layer.weight, None))
    torch.testing.assert_close(
        lean.norm_linear(x, norm, layer), layer(F.layer_norm(x, (5,), norm.weight, norm.bias, norm.eps))
    )
    torch.testing.assert_close(lean.gelu_linear(x, act, layer), layer(F.gelu(x)))
    qkv = torch.randn(2 * 3 + 1 * 4, 12, dtype=torch.float64, requires_grad=True)
    spans = [(2, 3), (1, 4)]
    assert torch.autograd.gradcheck(lambda t: lean._PlainAttention.apply(t, spans, 2), qkv)
    torch.testing.assert_close(lean._PlainAttention.apply(qkv, spans, 2), torch.cat(lean.attention(qkv, spans, 2)))


def test_attention_in_bf16() -> None:
    """What a CPU gets in bfloat16 is as near to the exact result, gradients included, as timm's plain products."""
    torch.manual_seed(0)
    qkv, spans = torch.randn(4 * 37, 3 * 64).bfloat16(), [(4, 37)]

    def timm(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.view(4, 37, 3, 2, 32).permute(2, 0, 3, 1, 4)
        with torch.autocast("cpu", torch.bfloat16):
            return (((q * 32**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(4 * 37, 64)

    def distances(f: Any) -> list[float]:
        found = []
        for x in (qkv, qkv.double()):
            x = x.clone().requires_grad_()
            out = f(x) if x.dtype == torch.bfloat16 else lean.attention(x, spans, 2)[0]
            out.double().sin().sum().backward()
            found.append((out.detach().double(), x.grad.double()))
        return [(a - b).norm().item() for a, b in zip(*found)]

    ours, theirs = distances(lambda x: lean.attention(x, spans, 2)[0]), distances(timm)
    assert all(a <= 1.1 * b for a, b in zip(ours, theirs))
