"""CRD's memory: steps by an oracle, what is drawn, who moves which row, and that nothing depends on who computes what."""

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import EarlyStop, UserError, methods
from selfsup.config import dump, load
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.log import read_metrics
from selfsup.methods.contract import ViewBatch
from selfsup.methods.crd_memory import CRDMemory, last_of_each
from tests.methods import oracle_distill as oracle
from tests.methods.test_distill import batch_of, made
from tests.methods.test_distill_trajectory import prepared
from tests.methods.tiny import ONE_VIEW, TINY_RUN, cli, tiny_teacher, write_images

IMAGES, DIM, N, TAU = 40, 4, 6, 0.5
CRD = [
    "method.losses={crd: 0.8}",
    f"method.crd_dim={DIM}",
    f"method.crd_negatives={N}",
    f"method.crd_temperature={TAU}",
]
SECOND = "method.students=[{name: small, backbone: {name: vit_tiny_patch16_224, img_size: 32, patch_size: 16, embed_dim: 24, "
SECOND += "depth: 1, num_heads: 2}}]"
TWO_VIEWS = ["views.global.count=2", "views.global.blur=0", "views.global.solarize=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), IMAGES, classes=4)


def bound(*overrides: str, rows: int = IMAGES):
    method = made("{crd: 0.8}", *CRD[1:], *overrides)
    for _, _, terms, _ in method._parts():
        terms.memory.fill(rows)
    return method


def test_trajectory(images: Path, tmp_path: Path) -> None:
    """Ten steps, two epochs, by the whole trainer: losses, weights and rows as from loops over the critic."""
    config, method, batches, o = prepared(images, "distill", *CRD)
    source = open_source(str(images), channels=3, config=config.data)
    method.bind(source, method.views())
    ids = [b.ids.tolist() for (b,) in Loader(source, method.views(), seed=config.seed, global_batch=8).stream(0, 10)]
    memory = method.terms.memory
    rows = {"student": memory.student_rows.clone(), "teacher": memory.teacher_rows.clone()}
    z = IMAGES * sum(
        (1 / (4 * TAU**2)) ** j / (math.factorial(j) * math.gamma(DIM / 2 + j)) for j in range(60)
    )  # D / 2 = 2
    state = {k: v.clone() for k, v in method.student.state_dict().items()}
    model = timm.create_model(config.backbone.name, num_classes=0, **config.backbone.options).double()
    model.load_state_dict({k.removeprefix("backbone.model."): v for k, v in state.items()})
    teacher = tiny_teacher().double().eval()
    params = {f"student.backbone.model.{k}": p for k, p in model.named_parameters()}
    for name, layer in method.terms.projectors.items():
        params |= {
            f"terms.projectors.{name}.{k}": p.detach().clone().requires_grad_() for k, p in layer.named_parameters()
        }
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remember() -> None:
        for side, values in zip(("student", "teacher"), seen.pop(), strict=True):
            for i, x in zip(ids[step()], values, strict=True):
                v = 0.5 * rows[side][i] + 0.5 * x
                rows[side][i] = v / v.norm()
        done.append(None)

    done: list[None] = []
    step = lambda: len(done)  # noqa: E731

    def project(name: str, x: torch.Tensor) -> torch.Tensor:
        out = x @ params[f"terms.projectors.{name}.weight"].t() + params[f"terms.projectors.{name}.bias"]
        return out / out.norm(dim=1, keepdim=True)

    def loss_of(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if seen:
            remember()
        with torch.no_grad():
            shown = oracle.renormalise(x, config.mean, config.std, teacher.mean, teacher.std)
            pooled = teacher.model.forward_head(teacher.model.forward_features(shown), pre_logits=True)
        s, t = project("crd", model(x)), project("crd_teacher", pooled)
        seen.append((s.detach(), t.detach()))
        negatives = memory.draw(step(), torch.arange(8)).tolist()
        total = torch.zeros((), dtype=torch.float64)
        for i, image in enumerate(ids[step()]):
            for anchor, bank in ((s[i], rows["teacher"]), (t[i], rows["student"])):
                for place, row in enumerate([image, *negatives[i]]):
                    e = torch.exp(anchor @ bank[row] / TAU) / z
                    h = e / (e + N / IMAGES)
                    total = total - (torch.log(1 - h) if place else torch.log(h))
        return 0.8 * total / 8

    losses = oracle.run(params, loss_of, batches, o)
    remember()
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    found = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert found == pytest.approx(losses, rel=1e-9)
    stored = load_file(tmp_path / "run" / "checkpoints" / "step_00000010" / "model.safetensors")
    for name, value in params.items():
        torch.testing.assert_close(
            stored[name], value.detach(), rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )
    for side in rows:
        torch.testing.assert_close(stored[f"terms.memory.{side}_rows"], rows[side], rtol=1e-9, atol=1e-12)


def test_rows_are_by_the_seed() -> None:
    """Of length 1, in all directions, different for students, sides and seeds; torch's generator is left alone."""
    before = torch.get_rng_state()
    first, second, other = (bound(SECOND, *more, rows=3000) for more in ((), (), ("seed=1",)))
    assert torch.equal(torch.get_rng_state(), before)
    tables = [first.terms.memory.student_rows, first.terms.memory.teacher_rows]
    tables += [first.terms_2.memory.student_rows, other.terms.memory.student_rows]
    assert all(not torch.equal(a, b) for i, a in enumerate(tables) for b in tables[:i])
    assert torch.equal(tables[0], second.terms.memory.student_rows)
    for table in tables:
        assert table.shape == (3000, DIM)
        torch.testing.assert_close(table.norm(dim=1), torch.ones(3000))
        torch.testing.assert_close(table.t() @ table / 3000, torch.eye(DIM) / DIM, rtol=0, atol=0.02)


def test_negatives_are_by_step_place_and_view() -> None:
    memory = CRDMemory(DIM, 500, TAU, seed=3)
    memory.fill(IMAGES)
    keys = torch.arange(16)
    drawn = memory.draw(7, keys)
    assert drawn.shape == (16, 500) and sorted(set(drawn.flatten().tolist())) == list(range(IMAGES))
    assert torch.equal(memory.draw(7, keys[5:9]), drawn[5:9])
    assert not torch.equal(memory.draw(8, keys), drawn)
    expected = 16 * 500 / IMAGES
    chi = ((torch.bincount(drawn.flatten(), minlength=IMAGES) - expected) ** 2 / expected).sum()
    assert chi < 80  # 39 degrees of freedom: 99.99 %


def test_last_of_each() -> None:
    g = torch.Generator().manual_seed(0)
    for n in (1, 2, 50):
        ids, places = torch.randint(0, 8, (n,), generator=g), torch.randperm(n, generator=g)
        found = last_of_each(ids, places).tolist()
        for i in range(n):
            assert places[found[i]] == max(places[j] for j in range(n) if ids[j] == ids[i])
            assert ids[found[i]] == ids[i]


def test_an_image_seen_several_times() -> None:
    """Two views, and an image at two places: its row moves once, towards the last view at the last place."""
    method = bound(*TWO_VIEWS)
    memory = method.terms.memory
    batch = batch_of(views=2)
    batch.ids[:] = torch.tensor([3, 1, 4, 3, 5, 9, 2, 6])
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method(batch, {})
    ((_, _, pairs),) = memory._seen
    method.after_step({}, torch.ones(()))
    assert not memory._seen
    old = before["terms.memory.student_rows"]
    for image, at in ((3, 8 + 3), (5, 8 + 4), (6, 8 + 7)):
        v = (old[image] + pairs[at, 0]) / 2
        torch.testing.assert_close(memory.student_rows[image], v / v.norm())
    changed = (memory.student_rows != old).any(1).nonzero().flatten().tolist()
    assert changed == [1, 2, 3, 4, 5, 6, 9]


def test_gradients_and_a_refused_step() -> None:
    """Every trained parameter learns; a refused step of NaN leaves rows bit for bit and nothing for the next one."""
    method = bound(SECOND)
    batch = batch_of()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    broken = ViewBatch([torch.full_like(batch.images[0], torch.nan)], *(batch.positions, batch.labels, batch.ids), 4, 8)
    assert not torch.isfinite(method(broken, {})["loss"])
    method.after_step({}, torch.zeros(()))
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())
    method(broken, {})  # and never a word about it, as when a refused step is computed again
    out = method(batch, {})
    out["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in method.parameters() if p.requires_grad)
    method.after_step({}, torch.ones(()))
    assert all(torch.isfinite(v).all() for v in method.state_dict().values() if v.is_floating_point())
    assert not torch.equal(method.terms_2.memory.teacher_rows, before["terms_2.memory.teacher_rows"])


def test_state_tells_how_many_rows() -> None:
    """A method that has seen no data takes those of a state, as to compute a refused step again; another number is no fit."""
    method, other = bound(), made("{crd: 0.8}", *CRD[1:])
    other.load_state_dict(method.state_dict())
    assert torch.equal(method(batch_of(), {})["loss"], other(batch_of(), {})["loss"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        bound(rows=IMAGES - 1).load_state_dict(method.state_dict())


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def test_parts_are_the_whole(images: Path, tmp_path: Path) -> None:
    """Accumulated, on two processes, both: the losses of one process and one batch; steps across the end of an epoch."""
    options = [*TINY_RUN, "method=distill", *TWO_VIEWS, *CRD, SECOND, "teacher=tests.methods.tiny:tiny_teacher"]
    config = load(None, [*options, f"data={images}", "precision=fp32", "global_batch=16", "steps=6"])
    selfsup.train(config, out=tmp_path / "whole", quiet=True)
    whole = losses_of(tmp_path / "whole")
    single = config.model_copy(update={"accumulate": 16})  # one image at a time: there is no other in its micro-batch
    selfsup.train(single, out=tmp_path / "single", quiet=True)
    assert losses_of(tmp_path / "single") == pytest.approx(whole, rel=1e-5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config))
    done = cli("train", str(recipe), "accumulate=2", "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(whole, rel=1e-5)
    stored = [
        load_file(p / "checkpoints" / "step_00000006" / "model.safetensors")
        for p in (tmp_path / "whole", tmp_path / "two")
    ]
    for name in ("terms.memory.student_rows", "terms_2.memory.teacher_rows"):
        torch.testing.assert_close(stored[0][name], stored[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cached", [False, True])
def test_resume_is_bitwise(images: Path, tmp_path: Path, cached: bool) -> None:
    """Also with batch norm, whose statistics the trainer puts back, and a teacher whose answers are kept."""
    options = [*TINY_RUN, "method=distill", *ONE_VIEW, *CRD, SECOND, "teacher=tests.methods.tiny:tiny_teacher"]
    options += [f"data={images}", "precision=bf16", "global_batch=16", "steps=7"]
    if cached:
        options += [f"teacher.cache={tmp_path / 'cache'}", "teacher.cache_epochs=2"]
    else:
        options = [o for o in options if not o.startswith("backbone")]
        options += ["backbone=resnet10t", "backbone.channels=[8,16,16,32]", "backbone.stem_width=8"]
    config = load(None, options)
    selfsup.train(config, out=tmp_path / "whole", quiet=True)
    with pytest.raises(EarlyStop):
        selfsup.train(config.model_copy(update={"stop_at": 4}), out=tmp_path / "parts", quiet=True)
    selfsup.train(config, out=tmp_path / "parts", resume=True, quiet=True)
    whole, parts = (
        tmp_path / run / "checkpoints" / "step_00000007" / "model.safetensors" for run in ("whole", "parts")
    )
    assert whole.read_bytes() == parts.read_bytes()
    assert "terms_2.memory.student_rows" in load_file(whole)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


def test_mixed_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"mix=mixup with method.crd_negatives=6: a mixed image has no row of its own"):
        made("{crd: 1}", *CRD[1:], "mix=mixup")
    with pytest.raises(UserError, match=r"method.crd_negatives=-1"):
        methods.complete(load(None, [*TINY_RUN, "method=distill", "method.crd_negatives=-1"]))
