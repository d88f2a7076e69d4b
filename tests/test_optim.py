"""Parameter groups, clipping, and optimizer steps that can be refused without the host looking."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from selfsup.config import load
from selfsup.optim import (
    LossScale,
    add_l1,
    clip_gradients,
    create_optimizer,
    guarded_step,
    parameter_groups,
    set_hyperparameters,
)
from selfsup.optim_state import state_tensors

OPTIMIZERS = {
    "adamw": [],
    "adamw coupled": ["optimizer.decoupled=false"],
    "sgd": [],
    "sgd without momentum": ["optimizer.momentum=0"],
    "sgd nesterov": ["optimizer.nesterov=true"],
    "lars": [],
    "lars without momentum": ["optimizer.momentum=0"],
    "lamb": [],
    "adafactor": [],
    "adafactor in float32": ["optimizer.momentum_dtype=float32"],
    "adafactor without momentum": ["optimizer.betas=[0, 0.999]"],
    "adabound": [],
    "adabound decoupled": ["optimizer.decoupled=true"],
}
PEAK = 0.1


class Small(nn.Module):
    """Names as a method has them: a backbone with blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])})
        self.backbone["norm"] = nn.LayerNorm(16)
        self.backbone["patch_embed"] = nn.Linear(3, 16)
        self.head = nn.Linear(16, 2)
        self.unused = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone["patch_embed"](x)
        for block in self.backbone["blocks"]:
            x = x + block(x).tanh()
        return self.head(self.backbone["norm"](x))


def build(
    name: str, dtype: torch.dtype = torch.float32, layer_decay: float = 1.0
) -> tuple[Small, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Small().to(dtype)
    config = load(None, [f"optimizer={name.split()[0]}", *OPTIMIZERS[name]]).optimizer
    optimizer = create_optimizer(config, parameter_groups(list(model.named_parameters()), layer_decay), PEAK)
    return model, optimizer


def step(model: Small, optimizer: torch.optim.Optimizer, seed: int, ok: float = 1.0) -> None:
    """One step on a random batch; a refused one has gradients of NaN and infinity."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    set_hyperparameters(optimizer, lr=PEAK, weight_decay=0.05)
    optimizer.zero_grad(set_to_none=True)
    model(torch.randn(8, 3, generator=generator).to(dtype)).pow(2).mean().backward()
    if not ok:
        for i, p in enumerate(p for p in model.parameters() if p.grad is not None):
            p.grad.fill_(torch.nan if i % 2 else torch.inf)
    guarded_step(optimizer, torch.tensor(ok))


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {**model.state_dict(), **{f"state {k}": v for k, v in state_tensors(optimizer).items()}}
    copies = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    return {k: v.view(torch.uint8) if v.ndim else v for k, v in copies.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refused_step_leaves_everything_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """Weights, moments and step counters, in the middle of a run."""
    model, optimizer = build(name, dtype)
    for seed in range(3):
        step(model, optimizer, seed)
    before = bits(model, optimizer)
    for _ in range(2):
        step(model, optimizer, 9, ok=0.0)
    after = bits(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
    step(model, optimizer, 3)
    assert not torch.equal(bits(model, optimizer)["head.weight"], before["head.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_very_first_steps_refused(name: str) -> None:
    """The run that follows is bit for bit the run without them, step counters included."""
    (plain, a), (late, b) = build(name), build(name)
    weights = copy.deepcopy(late.state_dict())
    step(late, b, 99, ok=0.0)
    step(late, b, 98, ok=0.0)
    assert all(torch.equal(v, weights[k]) for k, v in late.state_dict().items())
    for seed in range(3):
        step(plain, a, seed)
        step(late, b, seed)
    first, second = bits(plain, a), bits(late, b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    "name, reference",
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.999), weight_decay=0.05, foreach=False)),
        ("adamw coupled", lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.999), weight_decay=0.05, foreach=False)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05, foreach=False)),
        (
            "sgd nesterov",
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05, foreach=False),
        ),
        ("sgd without momentum", lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.05, foreach=False)),
    ],
)
def test_equals_plain_torch(name: str, reference: Callable[[list], torch.optim.Optimizer]) -> None:
    """The fused, guarded optimizer with zeroed buffers is torch's plain one; biases and norms undecayed."""
    model, optimizer = build(name, torch.float64)
    other = copy.deepcopy(model)
    plain = reference([p for p in other.parameters() if p.ndim > 1])
    rest = reference([p for p in other.parameters() if p.ndim <= 1])
    for group in rest.param_groups:
        group["weight_decay"] = 0.0
    for seed in range(5):
        step(model, optimizer, seed)
        generator = torch.Generator().manual_seed(seed)
        other.zero_grad()
        other(torch.randn(8, 3, generator=generator).double()).pow(2).mean().backward()
        plain.step()
        rest.step()
    for k, v in model.state_dict().items():
        torch.testing.assert_close(v, other.state_dict()[k], rtol=1e-10, atol=1e-12)


def test_parameter_without_gradient_is_left_alone() -> None:
    """Frozen prototypes: no decay, no moments, and a state only from their first gradient on."""
    model, optimizer = build("adamw")
    step(model, optimizer, 0)
    assert torch.equal(model.unused, torch.ones(2, 2))
    assert not any(k.startswith("unused|") for k in state_tensors(optimizer))


# ---------------------------------------------------------------------------------------------------------------- groups


def test_groups_hold_each_parameter_once() -> None:
    model = Small()
    model.backbone["norm"].weight.requires_grad_(False)
    groups = parameter_groups(list(model.named_parameters()))
    names = [n for g in groups for n in g["names"]]
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(names) == sorted(trainable)
    for group in groups:
        for name, p in zip(group["names"], group["params"]):
            assert p is model.get_parameter(name)
            assert group["wd_scale"] == (0.0 if p.ndim == 1 else 1.0), name
            assert group["backbone"] == name.startswith("backbone."), name
            assert group["lr_scale"] == 1.0


def test_layer_decay() -> None:
    """Clark et al., 2020: each layer below the last gets 0.5 of the rate; head and final norm all of it."""
    groups = parameter_groups(list(Small().named_parameters()), 0.5)
    scale = {n: g["lr_scale"] for g in groups for n in g["names"]}
    assert scale["head.weight"] == scale["unused"] == scale["backbone.norm.bias"] == 1
    assert scale["backbone.blocks.2.weight"] == 0.5
    assert scale["backbone.blocks.1.weight"] == 0.25
    assert scale["backbone.blocks.0.bias"] == 0.125
    assert scale["backbone.patch_embed.weight"] == 0.0625


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_layer_decay_is_monotone_in_timm_models(name: str) -> None:
    """In timm's own order of parameters no later block learns more slowly than an earlier one."""
    import re

    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    groups = parameter_groups([(f"student.backbone.model.{n}", p) for n, p in model.named_parameters()], 0.7)
    scale = {n: g["lr_scale"] for g in groups for n in g["names"]}
    assert min(scale.values()) < 0.7**3 and max(scale.values()) <= 1
    numbered: dict[int, float] = {}
    for full, value in scale.items():
        if match := re.search(r"model\.(?:blocks|layers|layer|stages)[._]?(\d+)", full):
            assert numbered.setdefault(int(match.group(1)), value) == value
    order = [numbered[k] for k in sorted(numbered)]
    assert order == sorted(order) and len(set(order)) == len(order) > 2
    stem = [v for n, v in scale.items() if re.search(r"model\.(patch_embed|cls_token|pos_embed|stem|conv1|bn1)", n)]
    assert stem and max(stem) < order[0]


def test_hyperparameters_and_frozen_backbone() -> None:
    model, optimizer = build("adamw", layer_decay=0.5)
    set_hyperparameters(optimizer, lr=0.2, weight_decay=0.3)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.2 * group["lr_scale"] and group["weight_decay"] == 0.3 * group["wd_scale"]
    set_hyperparameters(optimizer, lr=0.2, weight_decay=0.3, freeze_backbone=True)
    for group in optimizer.param_groups:
        assert group["lr"] == (0.0 if group["backbone"] else 0.2)
    before = copy.deepcopy(model.backbone.state_dict())
    generator = torch.Generator().manual_seed(0)
    model(torch.randn(8, 3, generator=generator)).pow(2).mean().backward()
    head = model.head.weight.clone()
    guarded_step(optimizer, torch.ones(()))
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())
    assert not torch.equal(model.head.weight, head)


def test_weight_decay_of_heads_and_of_norms() -> None:
    """A head of its own decay, which follows its own schedule; biases and norms only if asked for."""
    _, optimizer = build("adamw")
    set_hyperparameters(optimizer, 0.2, 0.03, 3.0)
    seen = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["names"]}
    assert seen["head.weight"] == seen["unused"] == 3.0 and seen["backbone.blocks.0.weight"] == 0.03
    assert seen["head.bias"] == seen["backbone.norm.weight"] == seen["backbone.blocks.0.bias"] == 0
    groups = parameter_groups(list(Small().named_parameters()), decay_all=True)
    assert {g["wd_scale"] for g in groups} == {1.0} and len(groups) == 2


@pytest.mark.parametrize("name", ["sgd without momentum", "adamw", "adafactor"])
def test_l1_is_the_gradient_of_the_absolute_values(name: str) -> None:
    """As if l1 * sum |w| over the decayed weights were in the loss; zeros stay where the loss leaves them."""
    (model, optimizer), (other, reference) = build(name, torch.float64), build(name, torch.float64)
    for network in (model, other):
        network.head.weight.data[0] = 0.0
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(3)).double()
    for _ in range(3):
        for network, opt, inside in ((model, optimizer, False), (other, reference, True)):
            set_hyperparameters(opt, PEAK, 0.0)
            opt.zero_grad(set_to_none=True)
            loss = network(x)[:, 1].pow(2).mean()
            if inside:
                used = [p for n, p in network.named_parameters() if p.ndim > 1 and n != "unused"]
                loss = loss + 0.01 * sum(p.abs().sum() for p in used)
            loss.backward()
            if not inside:
                add_l1(opt, 0.01)
            guarded_step(opt, torch.ones(()))
    assert torch.equal(model.head.weight[0], torch.zeros(16).double()) and torch.equal(model.unused, torch.ones(2, 2))
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[key], rtol=1e-9, atol=1e-11)


# -------------------------------------------------------------------------------------------------------------- clipping


def gradients(scale: float) -> list[nn.Parameter]:
    torch.manual_seed(1)
    parameters = [nn.Parameter(torch.randn(*s)) for s in ((3, 4), (5,), (2, 2, 2), (7,))]
    for i, p in enumerate(parameters[:-1]):  # the last one gets none
        p.grad = torch.randn_like(p) * scale * (i + 1)
    return parameters


@pytest.mark.parametrize("scale", [1e-3, 0.3, 100.0])
def test_clip_global_is_torch(scale: float) -> None:
    ours, theirs = gradients(scale), gradients(scale)
    norm = clip_gradients(ours, 1.0, "global")
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(norm, expected)
    for p, q in zip(ours[:-1], theirs[:-1]):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)
    assert ours[-1].grad is None


@pytest.mark.parametrize("scale", [1e-3, 0.3, 100.0])
def test_clip_per_parameter_is_torch_one_by_one(scale: float) -> None:
    """DINO's code clips each parameter's gradient by itself; the norm returned is still the global one."""
    ours, theirs = gradients(scale), gradients(scale)
    total = nn.utils.get_total_norm([p.grad for p in theirs if p.grad is not None])
    norm = clip_gradients(ours, 1.0, "parameter")
    torch.testing.assert_close(norm, total)
    for p, q in zip(ours[:-1], theirs[:-1]):
        nn.utils.clip_grad_norm_([q], 1.0)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)


def test_no_clipping_and_no_gradients() -> None:
    parameters = gradients(50.0)
    before = [p.grad.clone() for p in parameters[:-1]]
    assert clip_gradients(parameters, None, "global") > 1
    assert all(torch.equal(p.grad, b) for p, b in zip(parameters, before))
    assert clip_gradients([nn.Parameter(torch.ones(3))], 1.0, "parameter") == 0


@pytest.mark.parametrize("mode", ["parameter", "global"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_shows_what_is_not_finite(mode: str, bad: float) -> None:
    parameters = gradients(1.0)
    parameters[1].grad[2] = bad
    assert not torch.isfinite(clip_gradients(parameters, 1.0, mode))


def test_clip_keeps_float64() -> None:
    parameters = [nn.Parameter(p.detach().double()) for p in gradients(1.0)]
    for p in parameters:
        p.grad = torch.randn_like(p) * 10
    theirs = [nn.Parameter(p.detach().clone()) for p in parameters]
    for p, q in zip(parameters, theirs):
        q.grad = p.grad.clone()
    norm = clip_gradients(parameters, 1.0, "global")
    nn.utils.clip_grad_norm_(theirs, 1.0)
    assert norm.dtype == torch.float64
    for p, q in zip(parameters, theirs):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)


def test_loss_scale() -> None:
    """Halves after a refused step, doubles after `interval` good ones in a row, and unscales exactly."""
    scale = LossScale(initial=8.0, interval=3)
    good, bad = torch.ones(()), torch.zeros(())
    seen = []
    for ok in (good, good, bad, good, good, good, good, good, good, bad, bad):
        scale.update(ok)
        seen.append(scale.scale.item())
    assert seen == [8, 8, 4, 4, 4, 8, 8, 8, 16, 8, 4]
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.full((3,), 8.0)
    scale.unscale_([p, nn.Parameter(torch.ones(1))])
    assert p.grad.tolist() == [2, 2, 2]
