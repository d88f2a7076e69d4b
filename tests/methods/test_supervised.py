"""Supervised training against an oracle in plain loops; mixing over processes; sigmoid, mean teacher, what is refused."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import UserError, methods, schedules
from selfsup.config import dump
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.initialise import initialise
from selfsup.log import read_metrics
from selfsup.methods.contract import ViewBatch
from selfsup.methods.supervised import SupervisedOptions, consistency, ramp_up
from tests.methods.tiny import cli, tiny_config, write_images

CLASSES, STEPS = 4, 5
SGD = ["optimizer=sgd", "optimizer.lr=0.2", "optimizer.min_lr=0.001", "optimizer.warmup=2 steps"]
SGD += ["optimizer.weight_decay=0.05", "optimizer.weight_decay_end=null", "optimizer.clip=null", f"steps={STEPS}"]
PLAIN = ["method.head_dropout=0", "method.consistency=0", "views.global.blur=0.5", "views.global.solarize=0.1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=CLASSES)


def config_for(images: Path, *overrides: str) -> selfsup.Config:
    options = (f"data={images}", f"data.classes={CLASSES}", "views.global.count=1", *PLAIN, *SGD, *overrides)
    return methods.complete(tiny_config("supervised", *options))


def batches(config: selfsup.Config, method: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[list, torch.Tensor]]:
    """What the trainer will see: (views [V, B, C, S, S], labels [B]) of each step."""
    source = open_source(config.data.path, channels=3, config=config.data)
    loader = Loader(source, method.views(), seed=config.seed, global_batch=config.global_batch)
    for (batch,) in loader.stream(0, config.steps):
        crops = photometric.apply(batch.crops[0], batch.params[0], config.mean, config.std, torch.device("cpu"), dtype)
        yield crops, batch.labels


def oracle(config: selfsup.Config, weight_of_the_label: float, weight_of_others: float):
    """Cross-entropy with these weights, SGD with momentum and L2, and an average: losses, student, average, accuracies."""
    o, steps, warmup = config.optimizer, config.steps, 2
    method = methods.create(config).double()
    state = {k.removeprefix("student."): v for k, v in method.state_dict().items() if k.startswith("student.")}
    model = timm.create_model(config.backbone.name, num_classes=0, **config.backbone.options).double()
    model.load_state_dict({k.removeprefix("backbone.model."): v for k, v in state.items() if k.startswith("backbone.")})
    head = {k: state[f"head.{k}"].clone().requires_grad_() for k in ("weight", "bias")}
    parameters = {f"backbone.model.{k}": p for k, p in model.named_parameters()}
    parameters |= {f"head.{k}": p for k, p in head.items()}
    average = {k: p.detach().clone() for k, p in parameters.items()}
    velocity: dict[str, torch.Tensor] = {}
    losses, accuracies = [], []
    for i, (views, labels) in enumerate(batches(config, method, torch.float64)):
        rate = o.lr * i / max(1, warmup - 1)
        if i >= warmup:
            rate = o.min_lr + 0.5 * (o.lr - o.min_lr) * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
        total, right, count = 0.0, 0, 0
        for x in views:
            z = model(x) @ head["weight"].T + head["bias"]
            for row, label in zip(z, labels.tolist()):
                log_p = row - torch.log(torch.exp(row).sum())
                q = [weight_of_the_label if k == label else weight_of_others for k in range(CLASSES)]
                total = total - sum(q[k] * log_p[k] for k in range(CLASSES))
                right, count = right + int(row.argmax().item() == label), count + 1
        loss = total / count
        losses.append(loss.item())
        accuracies.append(right / count)
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            momentum = min(1 - 1 / (i + 1), config.method.options["ema"])
            for (name, p), g in zip(parameters.items(), gradients):
                if p.ndim > 1 and not name.endswith("bias"):
                    g = g + o.weight_decay * p
                velocity[name] = g.clone() if name not in velocity else 0.9 * velocity[name] + g
                p -= rate * velocity[name]
                average[name] = momentum * average[name] + (1 - momentum) * p
    return losses, {k: p.detach() for k, p in parameters.items()}, average, accuracies


@pytest.mark.parametrize(
    ("overrides", "label", "others"),
    [
        (["method.smoothing_form=all"], 0.8 + 0.2 / CLASSES, 0.2 / CLASSES),
        (["method.smoothing_form=others", "views.global.count=2"], 0.8, 0.2 / (CLASSES - 1)),
        (["method.smoothing_form=all", "accumulate=2"], 0.8 + 0.2 / CLASSES, 0.2 / CLASSES),
    ],
    ids=["all", "others, two views", "accumulated"],
)
def test_trajectory_in_float64(images: Path, tmp_path: Path, overrides: list[str], label: float, others: float) -> None:
    """Five steps of the whole trainer: losses, accuracies in the log, weights, averaged weights."""
    config = config_for(images, "precision=fp64", "method.label_smoothing=0.2", "method.ema=0.6", *overrides)
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    losses, student, average, accuracies = oracle(config, label, others)
    log = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-9)
    assert [line["batch_top1"] for line in log] == pytest.approx(accuracies)
    state = load_file(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors")
    for role, expected in (("student", student), ("teacher", average)):
        for name, value in expected.items():
            torch.testing.assert_close(state[f"{role}.{name}"], value, rtol=1e-9, atol=1e-10)
    moved = (student["head.weight"] - average["head.weight"]).abs().max()
    assert moved > 1e-4  # there is an average to speak of


@pytest.mark.parametrize("mix", ["mixup+cutmix", "ricap"])
def test_mixing_is_the_same_on_two_processes(images: Path, tmp_path: Path, mix: str) -> None:
    """With drop path and dropout: what is drawn depends on the step and the place in the global batch alone."""
    options = ("precision=fp64", f"mix={mix}", "mix.group=4", "backbone.drop_path_rate=0.2", "method.head_dropout=0.3")
    config = config_for(images, *options)
    selfsup.train(config, out=tmp_path / "one", quiet=True)
    (tmp_path / "recipe.yaml").write_text(dump(config))
    done = cli("train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = ([line["loss"] for line in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("one", "two"))
    assert len(one) == STEPS and two == pytest.approx(one, rel=1e-9)
    plain = config.model_copy(update={"mix": config.mix.model_copy(update={"name": "none"})})
    selfsup.train(plain, out=tmp_path / "plain", quiet=True)
    assert read_metrics(tmp_path / "plain" / "metrics.jsonl")[0]["loss"] != one[0]


def first_batch(config: selfsup.Config, method: torch.nn.Module) -> ViewBatch:
    views, labels = next(batches(config, method, torch.float32))
    places = torch.arange(len(labels))
    return ViewBatch([views], places, labels, places, step=0, global_batch=len(labels))


@pytest.mark.parametrize("summed", [False, True])
def test_sigmoid_loss(images: Path, summed: bool) -> None:
    """A yes or no for each class, from a head that begins with few yeses; targets above the threshold are yeses."""
    options = ("method.loss=sigmoid", f"method.sum_classes={summed}", "method.label_smoothing=0", "precision=fp32")
    config = config_for(images, *options, "method.head_bias_init=-3", "method.target_threshold=0.2")
    method = methods.create(config)
    assert (method.student.head.bias == -3).all()
    batch = first_batch(config, method)
    found = method(batch, {"momentum": 0.0})["loss"]
    p = torch.sigmoid(method.student(batch.images[0][0]).detach().double())
    each = [
        -math.log(p[i, k]) if k == label else -math.log(1 - p[i, k])
        for i, label in enumerate(batch.labels.tolist())
        for k in range(CLASSES)
    ]
    assert found.item() == pytest.approx(sum(each) / len(p) / (1 if summed else CLASSES), rel=1e-5)
    assert method.student.activation == "sigmoid"


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_consistency(kind: str) -> None:
    """Every view of the student against the next one of the teacher, in plain loops."""
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    p, q = student.softmax(-1).tolist(), teacher.softmax(-1).tolist()
    total = 0.0
    for view in range(3):
        other = (view - 1) % 3
        for i in range(2):
            pairs = list(zip(p[view][i], q[other][i]))
            total += (
                sum((a - b) ** 2 for a, b in pairs) / 5 if kind == "mse" else sum(b * math.log(b / a) for a, b in pairs)
            )
    found = consistency(student, teacher, SupervisedOptions(consistency_loss=kind))
    assert found.item() == pytest.approx(total / 6)
    assert consistency(student, student.roll(-1, 0), SupervisedOptions(consistency_loss="kl")).item() == pytest.approx(
        0
    )


def test_mean_teacher(images: Path) -> None:
    """Its weight warms up; the loss is that of the labels and the weighted distance; the teacher gets no gradient."""
    schedule = ramp_up(4.0, 10)
    assert [schedule(s) for s in (0, 5, 10, 99)] == pytest.approx([4 * math.exp(-5), 4 * math.exp(-1.25), 4.0, 4.0])
    config = config_for(images, "views.global.count=2", "method.consistency=2.0", "precision=fp32")
    method = methods.create(config)
    plan = schedules.plan(config, 40)
    s = schedules.evaluate(method.schedules(plan), 3)
    assert s == {"consistency": 2.0, "momentum": pytest.approx(0.75)}  # a mean of four, as yet
    batch = first_batch(config, method)
    with_it = method(batch, {**s, "consistency": 2.0})
    without = method(batch, {**s, "consistency": 0.0})["loss"]
    assert with_it["consistency_loss"] > 0
    assert with_it["loss"].item() == pytest.approx(without.item() + 2 * with_it["consistency_loss"].item(), rel=1e-5)
    with_it["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())


def test_roles_and_what_is_exported(images: Path) -> None:
    """With an average it comes first and is exported; without one there is the student alone."""
    method = methods.create(config_for(images, "precision=fp32"))
    with torch.no_grad():
        method.teacher.backbone.model.cls_token.add_(1)
    assert list(method.classifiers()) == ["ema", "head"] and list(method.backbones()) == ["student", "teacher"]
    assert torch.equal(method.export().model.cls_token, method.teacher.backbone.model.cls_token)
    plain = methods.create(config_for(images, "method.ema=null", "views.global.count=1"))
    assert list(plain.classifiers()) == ["head"] and list(plain.backbones()) == ["student"]
    assert plain.schedules(schedules.plan(config_for(images), 40)) == {}
    assert len(method.views()) == 1  # local crops are not made


@pytest.fixture(scope="module")
def dino(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dino"
    config = tiny_config(
        "dino", f"data={images}", "precision=fp32", "steps=4", "method.momentum=0.5", "optimizer.lr=0.01"
    )
    selfsup.train(config, out=out, quiet=True)
    return out


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "model.safetensors")


def test_starts_from_another_method(images: Path, dino: Path) -> None:
    """Student and average from the teacher of a run of DINO; the head is its own."""
    config = config_for(images, f"init_from={dino}", "precision=fp32")
    method = methods.create(config)
    before = copy.deepcopy(method.state_dict())
    initialise(method, config)
    trained = newest(dino)
    for key, value in method.state_dict().items():
        expected = before[key] if ".head." in key else trained[key.replace("student.", "teacher.", 1)]
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("target", ["run", "run/classifier"])
def test_goes_on_with_a_head(images: Path, tmp_path: Path, target: str) -> None:
    """init_from.heads=load, from a run without an average and from an exported classifier, into one with an average."""
    run = tmp_path / "run"
    selfsup.train(config_for(images, "method.ema=null", "precision=fp32"), out=run, quiet=True)
    config = config_for(images, f"init_from={tmp_path / target}", "init_from.heads=load", "precision=fp32", "seed=3")
    method = methods.create(config)
    initialise(method, config)
    trained = newest(run)
    for key, value in method.state_dict().items():
        assert torch.equal(value, trained[key.replace("teacher.", "student.", 1)]), key
    other = config_for(images, f"init_from={run}", "init_from.heads=load", f"data.classes={CLASSES + 1}")
    with pytest.raises(UserError, match=r"does not fit.*as many classes"):
        initialise(methods.create(other), other)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.classes=1"], "1 class to tell apart; method=supervised needs two or more"),
        (["data.classes=null"], "no class to tell apart"),
        (["views.global.count=0"], "views.global.count=0"),
        (["method.consistency=1.0"], "method.consistency=1 with method.ema=0.9, views.global.count=1"),
        (["method.consistency=1.0", "views.global.count=2", "method.ema=null"], "method.ema=None"),
        (["mix=ricap", "mix.group=16"], "mix.group"),
    ],
)
def test_what_does_not_go_together(images: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.create(config_for(images, *overrides))


def test_one_class_is_none(tmp_path: Path) -> None:
    """Counted from the data."""
    images = write_images(tmp_path / "images", count=10)
    lines = "".join(f"{path}\t0\n" for path in sorted(images.glob("*.png")))
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(UserError, match="1 class to tell apart"):
        config = tiny_config("supervised", f"data={tmp_path / 'list.txt'}", "steps=1")
        selfsup.train(config, out=tmp_path / "run", quiet=True)
