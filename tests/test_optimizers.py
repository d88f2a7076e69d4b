"""Each optimizer against its paper's formulas, written here anew in float64, over steps whose rates differ."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from selfsup.config import load
from selfsup.errors import UserError
from selfsup.optim import create_optimizer, guarded_step, parameter_groups, set_hyperparameters

PEAK = 0.05
RATES = [0.0, 0.02, 0.05, 0.05, 0.03, 0.01, 0.002, 0.0, 0.01, 0.05]
DECAYS = [0.04 * (1 + t) for t in range(len(RATES))]
SHAPES = {"backbone.weight": (20, 24), "backbone.conv": (17, 18, 3, 3), "backbone.small": (3, 5), "head.bias": (7,)}

Update = Callable[[dict[str, Tensor], Tensor, Tensor, int, float, float], Tensor]
"""(state, weights, gradient, which step from 1 on, rate, decay) -> the weights after it."""


def lars(s: dict[str, Tensor], w: Tensor, g: Tensor, t: int, lr: float, wd: float) -> Tensor:
    """You et al., 2017, algorithm 1; nothing is adapted where nothing is decayed."""
    local = 0.001 * w.norm() / (g.norm() + wd * w.norm() + 1e-8) if w.ndim > 1 else 1.0
    s["v"] = 0.9 * s.get("v", torch.zeros_like(w)) + local * (g + wd * w)
    return w - lr * s["v"]


def lamb(s: dict[str, Tensor], w: Tensor, g: Tensor, t: int, lr: float, wd: float) -> Tensor:
    """You et al., 2020, algorithm 2, with phi the identity."""
    s["m"] = 0.9 * s.get("m", torch.zeros_like(w)) + 0.1 * g
    s["v"] = 0.999 * s.get("v", torch.zeros_like(w)) + 0.001 * g**2
    r = s["m"] / (1 - 0.9**t) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8) + wd * w
    return w - lr * (w.norm() / r.norm() if w.ndim > 1 else 1.0) * r


def adabound(s: dict[str, Tensor], w: Tensor, g: Tensor, t: int, lr: float, wd: float) -> Tensor:
    """Luo et al., 2019, algorithm 2 with the bounds of section 5, gamma = 1e-3; L2 as in the authors' code."""
    g = g + wd * w
    s["m"] = 0.9 * s.get("m", torch.zeros_like(w)) + 0.1 * g
    s["v"] = 0.999 * s.get("v", torch.zeros_like(w)) + 0.001 * g**2
    final = 0.1 * lr / PEAK
    low, high = final * (1 - 1 / (1e-3 * t + 1)), final * (1 + 1 / (1e-3 * t))
    rate = lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) / (s["v"].sqrt() + 1e-8)
    return w - rate.clamp(low, high) * s["m"]


def adafactor(s: dict[str, Tensor], w: Tensor, g: Tensor, t: int, lr: float, wd: float) -> Tensor:
    """Shazeer & Stern, 2018, algorithm 4, as Zhai et al., 2022, section 3.4, change it; decay as in AdamW."""
    decay = min(0.999, 1 - t**-0.8)
    square = g**2 + 1e-30
    large = sorted(range(w.ndim), key=lambda i: w.shape[i])[-2:]  # the two longest sides, if both are long
    if w.ndim > 1 and w.shape[large[0]] >= 16:
        for name, gone in (("row", large[1]), ("column", large[0])):
            mean = square.mean(gone, keepdim=True)
            s[name] = decay * s.get(name, torch.zeros_like(mean)) + (1 - decay) * mean
        second = s["row"] * s["column"] / s["row"].mean(large[0], keepdim=True)
    else:
        second = s["second"] = decay * s.get("second", torch.zeros_like(w)) + (1 - decay) * square
    s["m"] = 0.9 * s.get("m", torch.zeros_like(w)) + 0.1 * g / second.sqrt()
    return w * (1 - lr * wd) - lr * s["m"]


def decoupled(of: Update) -> Update:
    """Weights shrink by lr * wd, and the optimizer sees no decay."""
    return lambda s, w, g, t, lr, wd: of(s, w * (1 - lr * wd), g, t, lr, 0.0)


CASES: dict[str, tuple[list[str], Update, float]] = {
    "lars": (["optimizer=lars"], lars, 1e-10),
    "lamb": (["optimizer=lamb"], lamb, 1e-10),
    "lamb, decoupled": (["optimizer=lamb", "optimizer.decoupled=true"], decoupled(lamb), 1e-10),
    "adabound": (["optimizer=adabound"], adabound, 1e-10),
    "adabound, decoupled": (["optimizer=adabound", "optimizer.decoupled=true"], decoupled(adabound), 1e-10),
    "adafactor": (["optimizer=adafactor", "optimizer.momentum_dtype=float32"], adafactor, 1e-6),
    "adafactor, half": (["optimizer=adafactor"], adafactor, 2e-2),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_paper(case: str) -> None:
    """The rate of each step is the one that was set, the bounds of AdaBound follow it, and biases are not decayed."""
    overrides, update, tolerance = CASES[case]
    generator = torch.Generator().manual_seed(0)
    start = {n: torch.randn(*shape, generator=generator, dtype=torch.float64) for n, shape in SHAPES.items()}
    parameters = {n: nn.Parameter(v.clone()) for n, v in start.items()}
    optimizer = create_optimizer(load(None, overrides).optimizer, parameter_groups(list(parameters.items())), PEAK)
    expected, states = dict(start), {n: {} for n in start}
    for t, (lr, wd) in enumerate(zip(RATES, DECAYS), start=1):
        set_hyperparameters(optimizer, lr, wd)
        for n, p in parameters.items():
            g = torch.randn(*p.shape, generator=generator, dtype=torch.float64) * 10.0 ** (t % 3 - 1)
            p.grad = g.clone()
            expected[n] = update(states[n], expected[n], g, t, lr, wd if p.ndim > 1 else 0.0)
        guarded_step(optimizer, torch.ones(()))
    for n, p in parameters.items():
        error = (p - expected[n]).norm() / (expected[n] - start[n]).norm()
        assert error < tolerance, (n, float(error))


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_trust_ratio_without_decay(name: str) -> None:
    """weight_decay=0 does not turn the adaptation off, which in timm it would."""
    p = nn.Parameter(torch.full((4, 4), 100.0, dtype=torch.float64))
    optimizer = create_optimizer(load(None, [f"optimizer={name}"]).optimizer, parameter_groups([("w", p)]))
    set_hyperparameters(optimizer, 0.1, 0.0)
    p.grad = torch.ones_like(p)
    guarded_step(optimizer, torch.ones(()))
    moved = 0.1 * (0.001 if name == "lars" else 1.0) * 100.0
    torch.testing.assert_close(100.0 - p.detach(), torch.full((4, 4), moved, dtype=torch.float64), rtol=1e-6, atol=0)


def test_adabound_closes_on_sgd() -> None:
    """Between the bounds' limits every weight moves by final_lr, whatever the size of its gradients."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    config = load(None, ["optimizer=adabound", "optimizer.final_lr=0.5"]).optimizer
    optimizer = create_optimizer(config, parameter_groups([("w", p)]), PEAK)
    g = torch.tensor([[1e-3, 1.0], [10.0, 1e3]], dtype=torch.float64)
    p.grad = g.clone()
    guarded_step(optimizer, torch.ones(()))
    for group in optimizer.param_groups:
        group["step"] = 10**9
    for lr in (PEAK, PEAK / 5):
        before = p.detach().clone()
        set_hyperparameters(optimizer, lr, 0.0)
        p.grad = g.clone()
        guarded_step(optimizer, torch.ones(()))
        momentum = optimizer.state[p]["exp_avg"]
        torch.testing.assert_close(before - p.detach(), 0.5 * lr / PEAK * momentum, rtol=1e-5, atol=0)


def test_adabound_needs_its_peak() -> None:
    with pytest.raises(ValueError, match="peak"):
        create_optimizer(load(None, ["optimizer=adabound"]).optimizer, [{"params": [nn.Parameter(torch.ones(2))]}])


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optimizer=adam"], "optimizer.name='adam'"),
        (["optimizer=sgd", "optimizer.decoupled=true"], "weight decay of sgd is L2"),
        (["optimizer=adafactor", "optimizer.decoupled=false"], "weight decay of adafactor is decoupled"),
        (["optimizer=sgd", "optimizer.nesterov=true", "optimizer.momentum=0"], "optimizer.momentum"),
        (["optimizer.l1=-1"], "optimizer.l1=-1"),
        (["optimizer.head_weight_decay=-1"], "optimizer.head_weight_decay=-1"),
        (["optimizer.head_weight_decay_end=1"], "optimizer.head_weight_decay"),
        (["optimizer.final_lr=0"], "optimizer.final_lr=0"),
        (["optimizer.schedule=expo"], "optimizer.schedule='expo'"),
        (["optimizer.schedule=step"], "optimizer.milestones"),
        (["optimizer.milestones=['3 epochs']"], "optimizer.schedule=step"),
        (["optimizer.schedule=step", "optimizer.milestones=['3 eons']"], "3 eons"),
        (["optimizer.cooldown=10%"], "schedule=constant"),
        (["optimizer.cooldown=-10%", "optimizer.schedule=constant"], "optimizer.cooldown"),
        (["optimizer.warmup_kind=sudden"], "optimizer.warmup_kind='sudden'"),
        (["optimizer.warmup_factor=1.5"], "optimizer.warmup_factor=1.5"),
    ],
)
def test_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, overrides)
    assert named in str(caught.value), caught.value
    assert len(str(caught.value).splitlines()) <= 2
