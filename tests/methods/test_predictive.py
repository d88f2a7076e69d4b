"""Barlow Twins, SimSiam and LeJEPA: what is theirs alone."""

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity

import selfsup
from selfsup import methods, schedules
from selfsup.config import load
from selfsup.methods.contract import ViewBatch
from selfsup.optim import create_optimizer, parameter_groups, set_hyperparameters
from tests.methods.tiny import tiny_config

BATCH = 8


def build(name: str, *overrides: str):
    """(method in float64, its configuration, a first step's views at random, the plan)."""
    config = methods.complete(tiny_config(name, "precision=fp64", "data.classes=4", *overrides))
    method = methods.create(config).double().train()
    g = torch.Generator().manual_seed(0)
    sizes = [(c.count, c.size) for c in (config.views.global_, config.views.local) if c.count]
    images = [torch.randn(n, BATCH, 3, s, s, generator=g, dtype=torch.float64) for n, s in sizes]
    places = torch.arange(BATCH)
    batch = ViewBatch(images, places, -torch.ones_like(places), places, step=3, global_batch=BATCH)
    return method, config, batch, schedules.plan(config, 40)


def one_by_one(method, batch: ViewBatch) -> list[torch.Tensor]:
    """Projections of each view, computed alone."""
    views = [view for kind in batch.images for view in kind]
    return [method.student.head(method.student.backbone(view).pooled) for view in views]


@pytest.mark.parametrize("local", [0, 2])
def test_barlow_twins(local: int) -> None:
    method, _, batch, _ = build("barlow_twins", f"views.local.count={local}", "method.redundancy=0.02")
    z = one_by_one(method, batch)
    theirs = BarlowTwinsLoss(lambda_param=0.02)
    pairs = [theirs(z[t], z[s]) for t in range(2) for s in range(2 + local) if s != t]
    torch.testing.assert_close(method(batch, {})["loss"], torch.stack(pairs).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("local", [0, 2])
def test_simsiam(local: int) -> None:
    """Value, and no gradient through the targets."""
    method, _, batch, _ = build("simsiam", f"views.local.count={local}")
    z = one_by_one(method, batch)
    p = [method.predictor(x) for x in z]
    theirs = NegativeCosineSimilarity()
    pairs = [theirs(p[s], z[t].detach()) for t in range(2) for s in range(2 + local) if s != t]
    expected, weights = torch.stack(pairs).mean(), [w for w in method.parameters() if w.requires_grad]
    loss = method(batch, {})["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for a, b in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected))):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def rates(method, config, plan, step: int) -> dict[str, float]:
    """Learning rate of every parameter at a step, as the trainer sets it."""
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    optimizer = create_optimizer(config.optimizer, parameter_groups(named, rate_of=method.rate_of))
    s = schedules.evaluate({**schedules.optimizer_schedules(config, plan), **method.schedules(plan)}, step)
    set_hyperparameters(optimizer, s["lr"], s["wd"], rates=s)
    return {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}


def test_the_predictors_rate_is_not_decayed() -> None:
    """Table 1 of SimSiam; the others follow the schedule. Without the option all do."""
    options = ("optimizer.lr=0.3", "optimizer.warmup=0 steps", "optimizer.min_lr=0")
    for fixed in (True, False):
        method, config, _, plan = build("simsiam", *options, f"method.fix_predictor_lr={fixed}")
        for step in (0, 5, 9):
            for name, rate in rates(method, config, plan, step).items():
                now = schedules.optimizer_schedules(config, plan)["lr"](step)
                assert rate == pytest.approx(0.3 if fixed and name.startswith("predictor.") else now), name


def test_biases_learn_more_slowly() -> None:
    method, config, _, plan = build("barlow_twins", "method.bias_lr=0.024", "optimizer.lr=0.2")
    shapes = dict(method.named_parameters())
    for name, rate in rates(method, config, plan, 4).items():
        now = schedules.optimizer_schedules(config, plan)["lr"](4)
        assert rate == pytest.approx(now * (0.024 if shapes[name].ndim == 1 else 1)), name


def test_directions_are_a_function_of_seed_and_step() -> None:
    method, _, _, _ = build("lejepa")
    other, _, _, _ = build("lejepa", "seed=5")
    like = torch.zeros((), dtype=torch.float64)
    first = method.directions(4, like)
    torch.rand(3)
    assert first.shape == (16, 32) and torch.equal(first, method.directions(4, like))
    assert not torch.equal(first, method.directions(5, like)) and not torch.equal(first, other.directions(4, like))
    torch.testing.assert_close(first.norm(dim=0), torch.ones(32, dtype=torch.float64), rtol=1e-6, atol=0)


def test_lejepa() -> None:
    """Algorithm 2: centres of the global views, a SIGReg for each view, weights lambda and 1 - lambda."""
    method, _, batch, _ = build("lejepa")
    out = method(batch, {})
    torch.testing.assert_close(out["loss"], 0.95 * out["invariance"] + 0.05 * out["sigreg"], rtol=1e-12, atol=0)
    assert all(p.grad is None for p in method.parameters())
    with pytest.raises(selfsup.UserError, match="odd number"):
        methods.complete(load(None, ["method=lejepa", "method.points=16"]))
