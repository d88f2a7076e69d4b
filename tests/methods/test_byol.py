"""BYOL: which view learns from which, what the teacher is, and batch norm that sees one view at a time."""

import math

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity

import selfsup
from selfsup import methods, schedules
from selfsup.config import BackboneConfig
from selfsup.methods.contract import ViewBatch
from selfsup.methods.network import each_view, embed_views
from tests.methods.tiny import tiny_config

BATCH = 8


def build(*overrides: str, convolutions: bool = False):
    """(method in float64, first step's views at random, values of the schedules)."""
    config = tiny_config("byol", "precision=fp64", "data.classes=4", *overrides)
    if convolutions:
        config = config.model_copy(
            update={"backbone": BackboneConfig(name="resnet10t", channels=[8, 8, 16, 16], stem_width=8)}
        )
    config = methods.complete(config)
    method = methods.create(config).double().train()
    g = torch.Generator().manual_seed(0)
    sizes = [(c.count, c.size) for c in (config.views.global_, config.views.local) if c.count]
    images = [torch.randn(n, BATCH, 3, s, s, generator=g, dtype=torch.float64) for n, s in sizes]
    places = torch.arange(BATCH)
    batch = ViewBatch(images, places, -torch.ones_like(places), places, step=0, global_batch=BATCH)
    return method, batch, schedules.evaluate(method.schedules(schedules.plan(config, 40)), 0)


@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize("convolutions", [False, True])
def test_views_one_by_one(local: int, convolutions: bool) -> None:
    """Each view through the modules alone, each pair through lightly's loss: batch norm too sees one view at a time."""
    method, batch, s = build(f"views.local.count={local}", convolutions=convolutions)
    state = {k: v.clone() for k, v in method.state_dict().items()}
    loss = method(batch, s)["loss"]
    method.load_state_dict(state)
    views = [view for kind in batch.images for view in kind]
    z = [method.teacher.head(method.teacher.backbone(view).pooled).detach() for view in views[:2]]
    p = [method.predictor(method.student.head(method.student.backbone(view).pooled)) for view in views]
    theirs = NegativeCosineSimilarity()
    pairs = [2 + 2 * theirs(p[b], z[a]) for a in range(2) for b in range(len(views)) if a != b]
    torch.testing.assert_close(loss, 2 * torch.stack(pairs).mean(), rtol=1e-9, atol=0)
    if not local:
        torch.testing.assert_close(loss, sum(pairs), rtol=1e-9, atol=0)  # equation 3: the sum of both directions


def test_embeddings_apart_are_the_same_without_batch_norm() -> None:
    """Drop path included: a view draws the same whichever way it is computed."""
    method, batch, _ = build("backbone.drop_path_rate=0.5", "backbone.norm_layer=layernorm")
    network = method.student
    together = embed_views(network.backbone, batch, method.random)
    apart = embed_views(network.backbone, batch, method.random, apart=True)
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-12)
    assert each_view(torch.nn.Identity(), apart, 5).shape == (5, BATCH, 32)


def test_teacher_learns_nothing_and_follows() -> None:
    method, batch, s = build()
    teacher = {k: v.clone() for k, v in method.teacher.named_parameters()}
    assert all(torch.equal(v, method.student.get_parameter(k)) for k, v in teacher.items())
    method(batch, s)["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(0.1)
    method.after_step({"momentum": 0.75}, torch.ones(()))
    for k, v in method.teacher.named_parameters():
        torch.testing.assert_close(v, 0.75 * teacher[k] + 0.25 * method.student.get_parameter(k), rtol=1e-12, atol=0)
    for k, b in method.teacher.named_buffers():
        assert torch.equal(b, method.student.get_buffer(k))


def test_momentum_is_the_papers() -> None:
    """Section 3.3: 1 - (1 - tau) (cos(pi k / K) + 1) / 2."""
    method, _, _ = build("steps=10")
    momentum = method.schedules(schedules.Plan(steps=10, images=40, global_batch=8))["momentum"]
    for k in range(10):
        assert momentum(k) == pytest.approx(1 - (1 - 0.996) * (math.cos(math.pi * k / 10) + 1) / 2, abs=1e-12)


def test_exports_the_student() -> None:
    method, _, _ = build()
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.zero_()
    assert any(p.abs().max() > 0 for p in method.export().parameters())


def test_too_few_views() -> None:
    plain = ("views.global.blur=0", "views.global.solarize=0")
    for counts in ((1, 0), (0, 4)):
        with pytest.raises(selfsup.UserError, match="compares different views"):
            build(f"views.global.count={counts[0]}", f"views.local.count={counts[1]}", *plain)
    with pytest.raises(selfsup.UserError, match="global_batch=1"):
        build("global_batch=1")
    build("views.global.count=1", "views.local.count=1", *plain)
