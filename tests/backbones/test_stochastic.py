"""Keyed drop path and dropout."""

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from selfsup.backbones import key_stochastic_layers, strip_stochastic_layers
from selfsup.backbones.stochastic import KeyedDropout, KeyedDropPath, KeyedLayer
from selfsup.errors import UserError


class Layers(nn.Module):
    """A stack of drop paths and dropouts; each adds its output to a list."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])  # [L, N, ...]


def test_rates_scale_and_independence_of_drop_path():
    """Each sample is kept with 1 - rate and then divided by it; layers, steps, seeds and samples are independent."""
    n, rates = 40_000, [0.1, 0.3, 0.5]
    module = Layers(*[DropPath(r) for r in rates])
    keys = key_stochastic_layers(module, seed=3)
    assert len(keys) == 3
    samples = torch.arange(n)
    with keys.at(7, samples):
        out = module(torch.ones(n, 2))
    assert torch.equal(out[..., 0], out[..., 1])  # a whole sample at once
    masks = []
    for layer, rate in zip(out[..., 0], rates):
        values = layer.unique()
        assert torch.allclose(values, torch.tensor([0.0, 1 / (1 - rate)]), rtol=1e-6)
        kept = (layer > 0).float()
        assert abs(kept.mean() - (1 - rate)) < 4 * (rate * (1 - rate) / n) ** 0.5
        masks.append(kept)
    with keys.at(8, samples):
        masks.append((module(torch.ones(n, 1))[0, :, 0] > 0).float())
    with key_stochastic_layers(Layers(DropPath(0.1)), seed=4).at(7, samples):
        pass
    masks.append(masks[0].roll(1))  # neighbouring samples
    centred = torch.stack([m - m.mean() for m in masks])
    correlation = torch.corrcoef(centred)
    assert (correlation - torch.eye(len(masks))).abs().max() < 4 / n**0.5
    other = Layers(DropPath(0.1), DropPath(0.3), DropPath(0.5))
    with key_stochastic_layers(other, seed=4).at(7, samples):
        assert not torch.equal(other(torch.ones(n, 2)), out)


def test_drop_path_matches_timm_where_nothing_is_random():
    """rate 0 stays timm's identity, and eval mode is the identity."""
    module = Layers(DropPath(0.0), DropPath(0.4), nn.Dropout(0.0), nn.Dropout(0.2))
    keys = key_stochastic_layers(module, seed=0)
    kinds = [type(layer) for layer in module.layers]
    assert kinds == [DropPath, KeyedDropPath, nn.Dropout, KeyedDropout] and len(keys) == 2
    x = torch.randn(4, 3)
    assert torch.equal(module.eval()(x), x.expand(4, 4, 3))
    assert key_stochastic_layers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), seed=0) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_drop_path_keeps_the_dtype(dtype):
    module = Layers(DropPath(0.1))
    with key_stochastic_layers(module, seed=0).at(0, torch.arange(64)):
        out = module(torch.ones(64, 1, dtype=dtype))
    assert out.dtype == dtype
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.9, dtype=dtype).item()}


def test_dropout_rates_and_elements():
    module = Layers(nn.Dropout(0.25), nn.Dropout(0.25))
    with key_stochastic_layers(module, seed=1).at(2, torch.arange(50) * 7):
        out = module(torch.ones(50, 40, 30))
    kept = (out > 0).float()
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(kept.mean() - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5
    flat = kept.flatten(1)
    pairs = [(flat[0], flat[1]), (flat[0], flat[0].roll(1)), (flat[0], flat[0].roll(30)), (flat[0], flat[0].roll(1200))]
    for a, b in pairs:  # layers, neighbours, rows, samples
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / flat.shape[1] ** 0.5


@pytest.mark.parametrize("kind", ["vit", "distilled", "registers", "swin", "mixer", "convnext", "cait"])
def test_draws_do_not_depend_on_how_a_batch_is_split(kind, small):
    options = {"drop_path_rate": 0.5}
    if kind in {"vit", "swin"}:
        options |= {"attn_drop_rate": 0.2, "proj_drop_rate": 0.2, "drop_rate": 0.2}
    backbone = small(kind, **options).train()
    keys = key_stochastic_layers(backbone, seed=5)
    images = torch.randn(8, 3, backbone.input_size, backbone.input_size)
    samples = torch.tensor([3, 11, 4, 90, 1, 7, 6, 1000])
    with torch.no_grad():
        with keys.at(9, samples):
            whole = backbone(images).pooled
            again = backbone(images).pooled  # a second forward inside: the same draws
        parts = []
        for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
            with keys.at(9, samples[part]):
                parts.append(backbone(images[part]).pooled)
        order = torch.randperm(8)
        with keys.at(9, samples[order]):
            shuffled = backbone(images[order]).pooled
        with keys.at(10, samples):
            next_step = backbone(images).pooled
        evaluated = backbone.eval()(images).pooled
    assert torch.equal(whole, again)
    assert torch.allclose(whole, torch.cat(parts), atol=1e-4)
    assert torch.allclose(whole[order], shuffled, atol=1e-4)
    assert (whole - next_step).abs().max() > 1e-3 and (whole - evaluated).abs().max() > 1e-3


def test_depth_wise_rates_are_timms(small):
    rates = [m.drop_prob for m in small("vit", drop_path_rate=0.3).modules() if type(m) is DropPath]
    backbone = small("vit", drop_path_rate=0.3)
    key_stochastic_layers(backbone, seed=0)
    assert [m.rate for m in backbone.modules() if isinstance(m, KeyedDropPath)] == rates
    assert rates == pytest.approx([0.15, 0.15, 0.3, 0.3])


def test_one_layer_called_twice_draws_twice(small):
    """Mixer's and XCiT's blocks call one drop path for each of their branches."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_path = DropPath(0.5)

        def forward(self, x):
            return torch.stack([self.drop_path(x), self.drop_path(x)])

    block = Block()
    keys = key_stochastic_layers(block, seed=0)
    x = torch.ones(1000, 1)
    with keys.at(0, torch.arange(1000)):
        a, b = block(x)
        assert torch.equal(torch.stack([a, b]), block(x))
    assert 300 < (a != b).sum() < 700


def test_training_outside_of_keys_is_a_defect_not_a_guess(small):
    backbone = small("vit", drop_path_rate=0.1).train()
    keys = key_stochastic_layers(backbone, seed=0)
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(RuntimeError, match=r"outside `with keys.at"):
        backbone(images)
    with keys.at(0, torch.arange(3)), pytest.raises(RuntimeError, match="3 samples for a batch of 2"):
        backbone(images)
    with keys.at(0, torch.arange(2)):
        first = backbone(images).pooled
        with keys.at(1, torch.arange(2)):
            backbone(images)
        assert torch.equal(backbone(images).pooled, first)  # nesting puts the outer draws back
    backbone.eval()(images)


def test_the_global_generator_is_left_alone(small):
    backbone = small("vit", drop_path_rate=0.3, drop_rate=0.1, attn_drop_rate=0.1).train()
    keys = key_stochastic_layers(backbone, seed=0)
    before = torch.get_rng_state()
    with keys.at(0, torch.arange(2)):
        backbone(torch.zeros(2, 3, 32, 32)).pooled.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_state_and_copies(small):
    backbone = small("vit", drop_path_rate=0.3)
    names = list(backbone.state_dict())
    keys = key_stochastic_layers(backbone, seed=0)
    assert list(backbone.state_dict()) == names

    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.keys = backbone, keys

    method = Method().train()
    other = copy.deepcopy(method)
    images = torch.randn(4, 3, 32, 32)
    results = []
    for m in (method, other):
        with m.keys.at(3, torch.arange(4)):
            results.append(m.student(images).pooled)
    assert torch.equal(*results)
    with method.keys.at(3, torch.arange(4)), pytest.raises(RuntimeError, match="outside"):
        other.student(images)


def test_strip(small):
    teacher = small("vit", drop_path_rate=0.3, drop_rate=0.2, attn_drop_rate=0.1)
    images = torch.randn(2, 3, 32, 32)
    expected = teacher(images).pooled
    key_stochastic_layers(teacher, seed=0)
    strip_stochastic_layers(teacher).train()
    assert not [m for m in teacher.modules() if isinstance(m, (KeyedLayer, DropPath, nn.Dropout))]
    assert torch.allclose(teacher(images).pooled, expected, atol=1e-5)
    assert key_stochastic_layers(teacher, seed=0) is None


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_recomputation_sees_the_masks_of_its_forward(kind, small):
    """Two forwards of unlike steps, then one backward, outside of `at`: as in a multi-crop step."""
    plain = small(kind, drop_path_rate=0.5, proj_drop_rate=0.2).train()
    gradients = []
    for saving in (False, True):
        backbone = copy.deepcopy(plain)
        backbone.set_grad_checkpointing(saving)
        keys = key_stochastic_layers(backbone, seed=1)
        images = torch.randn(4, 3, backbone.input_size, backbone.input_size, generator=torch.Generator().manual_seed(0))
        with keys.at(0, torch.arange(4)):
            loss = backbone(images).pooled.square().sum()
        with keys.at(1, torch.arange(4)):
            loss = loss + backbone(images).pooled.sum()
        loss.backward()
        gradients.append([p.grad for p in backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"drop_rate": 0.1}, "backbone.drop_rate=0.1: ResNet applies it before a classifier"),
        ("resnet18", {"drop_block_rate": 0.1}, "backbone.drop_block_rate"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.1, "depth": 1}, "backbone.patch_drop_rate"),
    ],
)
def test_what_cannot_be_keyed_is_refused(name, options, message):
    import timm

    with pytest.raises(UserError, match=message):
        key_stochastic_layers(timm.create_model(name, num_classes=0, **options), seed=0)


def test_compiled_training_steps_do_not_recompile(small):
    """Rates, steps and keys are no constants of the graph; eager and compiled draw the same masks."""
    from torch._dynamo.utils import counters

    backbone = small("vit", drop_path_rate=0.4, depth=4).train()
    keys = key_stochastic_layers(backbone, seed=0)
    images = torch.randn(4, 3, 32, 32)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(backbone, backend="aot_eager", fullgraph=True)
    for step in range(4):
        with keys.at(step, torch.arange(4) + step):
            found = compiled(images).pooled
            expected = backbone(images).pooled
        assert torch.allclose(found, expected, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_compiled_recomputation(kind, small):
    """Two resolutions, then backward, compiled and recomputed: the gradients of plain eager training."""
    backbone = small(kind, drop_path_rate=0.5).train()
    keys = key_stochastic_layers(backbone, seed=0)
    images = [torch.randn(4, 3, 64, 64), torch.randn(4, 3, 32, 32)]

    def gradients(function):
        backbone.zero_grad()
        loss = torch.zeros(())
        for i, part in enumerate(images):
            with keys.at(0, torch.arange(4) + 4 * i):
                loss = loss + function(part).pooled.square().sum()
        loss.backward()
        return [p.grad.clone() for p in backbone.parameters()]

    expected = gradients(backbone)
    backbone.set_grad_checkpointing(True)
    torch._dynamo.reset()
    found = gradients(torch.compile(backbone, backend="aot_eager"))
    torch._dynamo.reset()
    assert all(torch.allclose(a, b, atol=1e-4 * b.abs().max().item()) for a, b in zip(found, expected, strict=True))


def test_blocks_compiled_one_by_one_share_one_graph(small):
    from torch._dynamo.utils import counters

    backbone = small("vit", drop_path_rate=0.4, depth=12).train()
    keys = key_stochastic_layers(backbone, seed=0)
    images = torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    counters.clear()
    for block in backbone.model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for step in range(2):
        with keys.at(step, torch.arange(2)):
            backbone(images)
    assert counters["stats"]["unique_graphs"] <= 3  # the first block has no drop path; not one a rate
    torch._dynamo.reset()
