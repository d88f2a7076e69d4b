"""What every method must fulfil: one test for all of them, parametrised over the table of names."""

import copy
import re
from pathlib import Path

import pytest
import torch

import selfsup
from selfsup import methods, schedules
from selfsup.config import Config, dump
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.log import read_metrics
from selfsup.methods.contract import ViewBatch
from selfsup.train import _moved_by_forward, _put_back
from tests.methods.tiny import METHOD_OPTIONS, cli, tiny_config, write_images

pytestmark = pytest.mark.parametrize("name", sorted(methods.METHODS))


CLASSES = 4


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=CLASSES)


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("unlabelled"))


def build(name: str, images: Path, *overrides: str):
    """(method, first batch, values of the schedules after every freeze)."""
    return built(tiny_config(name, f"data={images}", f"data.classes={CLASSES}", "precision=fp32", *overrides))


def built(config: Config):
    """The same of any configuration with batches of 8."""
    config = methods.complete(config)
    method = methods.create(config).train()
    source = open_source(config.data.path, channels=3, config=config.data)
    loader = Loader(source, method.views(), seed=0, global_batch=8, accumulate=1, rank=0, world=1, workers=0, pin=False)
    ((batch,),) = list(loader.stream(0, 1))
    crops = [
        photometric.apply(c, p, config.mean, config.std, torch.device("cpu"), torch.float32)
        for c, p in zip(batch.crops, batch.params)
    ]
    views = ViewBatch(crops, batch.positions, batch.labels, batch.ids, step=5, global_batch=8)
    s = schedules.evaluate(method.schedules(schedules.plan(config, len(source))), 5)
    return method, views, s


def test_has_options_for_this_test(name: str) -> None:
    assert name in METHOD_OPTIONS, f"give {name} a row in tests/methods/tiny.py"


def test_gradients_reach_every_parameter(name: str, images: Path) -> None:
    """Each parameter is declared frozen or gets a gradient that is finite and, over the whole tensor, not zero."""
    method, views, s = build(name, images)
    out = method(views, s)
    assert out["loss"].shape == () and torch.isfinite(out["loss"])
    assert all(v.shape == () for v in out.values())
    out["loss"].backward()
    for key, p in method.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{key} has no gradient: freeze it, or use it"
            assert torch.isfinite(p.grad).all(), key
            assert p.grad.abs().max() > 0, f"{key} has a gradient of zero"
        else:
            assert p.grad is None, f"{key} is frozen and has a gradient"


def test_labels(name: str, images: Path, unlabelled: Path, tmp_path: Path) -> None:
    """Without labels a method trains as with them, or it is refused; what tells classes tells as many as there are."""
    use = methods.find(methods.METHODS[name]).labels
    if use == "needed":
        with pytest.raises(selfsup.UserError, match="have no label"):
            selfsup.train(tiny_config(name, f"data={unlabelled}", "steps=1"), out=tmp_path / "run", quiet=True)
    else:
        method, views, s = build(name, unlabelled)
        assert (views.labels == -1).all()
        assert torch.isfinite(method(views, s)["loss"])
    method, views, _ = build(name, images)
    assert (views.labels >= 0).all()
    for classifier in method.eval().classifiers().values():
        with torch.no_grad():
            assert classifier(views.images[0][0]).shape == (8, CLASSES)


def test_nothing_is_aliased(name: str, images: Path) -> None:
    """No two parameters or buffers share memory: a teacher that is its student would never show in a loss."""
    method, _, _ = build(name, images)
    pointers = [t.data_ptr() for t in [*method.parameters(), *method.buffers()] if t.numel()]
    assert len(pointers) == len(set(pointers))


def test_same_seed_same_weights(name: str, images: Path) -> None:
    """Initial weights depend on the seed alone, and building a method leaves the global generator alone."""
    before = torch.get_rng_state()
    first, _, _ = build(name, images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second, _, _ = build(name, images)
    other, _, _ = build(name, images, "seed=1")
    a, b, c = (dict(m.state_dict()) for m in (first, second, other))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


def test_state_round_trip(name: str, images: Path) -> None:
    """A method of other weights that loads the state computes the same, and goes on the same after a step."""
    method, views, s = build(name, images)
    other, _, _ = build(name, images)
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(1)
    results = []
    state = copy.deepcopy(method.state_dict())
    for m in (method, other):
        m.load_state_dict(state)
        loss = m(views, s)["loss"]
        m.after_step(s, torch.ones(()))
        results.append((loss, {k: v.clone() for k, v in m.state_dict().items()}))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(v, results[1][1][k]) for k, v in results[0][1].items())


def test_refused_step_changes_nothing(name: str, images: Path) -> None:
    """A batch of NaN whose step is refused leaves every parameter and persistent buffer bit for bit."""
    method, views, s = build(name, images)
    before = copy.deepcopy(method.state_dict())
    moved = _moved_by_forward(method) if method.batch_statistics else []
    statistics = [b.clone() for b in moved]
    broken = ViewBatch(
        [torch.full_like(x, torch.nan) for x in views.images], views.positions, views.labels, views.ids, views.step, 8
    )
    assert not torch.isfinite(method(broken, s)["loss"])
    _put_back(moved, statistics, torch.zeros(()))
    method.after_step(s, torch.zeros(()))
    after = method.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    healthy = method(views, s)
    method.after_step(s, torch.ones(()))
    assert all(torch.isfinite(v).all() for v in [*healthy.values(), *method.state_dict().values()])


def test_export(name: str, images: Path) -> None:
    """The exported backbone is a copy in eval mode, without gradients to follow, and computes."""
    method, views, _ = build(name, images)
    backbone = method.export()
    assert not backbone.training
    with torch.no_grad():
        features = backbone(views.images[0][0])
    assert features.pooled.shape == (8, backbone.embed_dim)
    own = {p.data_ptr() for p in method.parameters()}
    assert all(p.data_ptr() not in own for p in backbone.parameters())
    assert method.backbones()


def test_two_processes_equal_one(name: str, images: Path, tmp_path: Path) -> None:
    """World size 2 at the same global batch: the same losses, in logs that have each step once.

    In float32; in float64 for a head with batch norm, which divides by the small differences between images of a fresh net.
    """
    normalises = getattr(methods.find(methods.METHODS[name]), "batch_statistics", False)
    config = tiny_config(name, f"data={images}", f"precision={'fp64' if normalises else 'fp32'}", "steps=4")
    selfsup.train(config, out=tmp_path / "one", quiet=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config))
    done = cli("train", str(recipe), "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    assert [x["loss"] for x in lines[1]] == pytest.approx([x["loss"] for x in lines[0]], rel=1e-5)


def test_accumulation_is_the_large_batch(name: str, images: Path, tmp_path: Path) -> None:
    """Two micro-batches of four: the losses of one of eight (float32); or it is refused, and the message says why."""
    config = tiny_config(name, f"data={images}", "precision=fp32", "steps=4")
    halved = tiny_config(name, f"data={images}", "precision=fp32", "steps=4", "accumulate=2")
    kind = methods.find(methods.METHODS[name])
    if hasattr(kind, "whole_batch"):
        with pytest.raises(selfsup.UserError, match=re.escape(kind.whole_batch)):
            selfsup.train(halved, out=tmp_path / "halved", quiet=True)
        return
    selfsup.train(config, out=tmp_path / "whole", quiet=True)
    selfsup.train(halved, out=tmp_path / "halved", quiet=True)
    whole, parts = ([x["loss"] for x in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("whole", "halved"))
    assert parts == pytest.approx(whole, rel=1e-5)
