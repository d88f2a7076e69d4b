"""Ten steps of `distill` and of `deit`, by the whole trainer, equal ten steps of an oracle in plain loops."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import methods
from selfsup.config import load
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.log import read_metrics
from tests.methods import oracle_distill as oracle
from tests.methods.tiny import ONE_VIEW, TINY_RUN, tiny_teacher, write_images

SGD = ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.min_lr=0.001", "optimizer.weight_decay_end=0.1"]
SGD += ["optimizer.warmup=3 steps", "optimizer.clip=0.5", "teacher=tests.methods.tiny:tiny_teacher"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=4)


def batches_of(config: selfsup.Config, method):
    """The images and labels that the trainer will see."""
    source = open_source(config.data.path, channels=3, config=config.data)
    loader = Loader(source, method.views(), seed=config.seed, global_batch=config.global_batch)
    out = []
    for (batch,) in loader.stream(0, config.steps):
        crops = photometric.apply(
            batch.crops[0], batch.params[0], config.mean, config.std, torch.device("cpu"), torch.float64
        )
        out.append((crops[0], batch.labels))  # one view
    return out


def prepared(images: Path, method: str, *overrides: str):
    """(configuration, method in float64, batches, options of the oracle)."""
    options = [*TINY_RUN, f"method={method}", *ONE_VIEW, *SGD, f"data={images}", "precision=fp64", *overrides]
    config = load(None, options)
    complete = methods.complete(config.model_copy(update={"data": config.data.model_copy(update={"classes": 4})}))
    made = methods.create(complete).double()
    o = config.optimizer
    settings = {"lr": o.lr, "min_lr": o.min_lr, "warmup": 3, "wd": o.weight_decay, "wd_end": o.weight_decay_end}
    return config, made, batches_of(complete, made), {**settings, "clip": o.clip}


def taught(config: selfsup.Config, x: torch.Tensor) -> torch.Tensor:
    """The teacher's logits, by bare timm, of the student's images."""
    teacher = tiny_teacher().double().eval()
    with torch.no_grad():
        return teacher.model(oracle.renormalise(x, config.mean, config.std, teacher.mean, teacher.std))


def compare(run: Path, losses: list[float], weights: dict[str, torch.Tensor]) -> None:
    found = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert found == pytest.approx(losses, rel=1e-9)
    state = load_file(run / "checkpoints" / "step_00000010" / "model.safetensors")
    assert {k for k in state if k.startswith("student.")} == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_distill(images: Path, tmp_path: Path, accumulate: int) -> None:
    """0.5 CE + 0.9 T^2 KL with T = 3."""
    weights = ["method.losses={ce: 0.5, soft: 0.9}", "method.temperature=3"]
    config, method, batches, o = prepared(images, "distill", *weights)
    selfsup.train(config.model_copy(update={"accumulate": accumulate}), out=tmp_path / "run", quiet=True)

    state = {k: v.clone() for k, v in method.student.state_dict().items()}
    model = timm.create_model(config.backbone.name, num_classes=4, **config.backbone.options).double()
    model.load_state_dict({k.removeprefix("backbone.model."): v for k, v in state.items()})
    params = {
        ("student." if k.startswith("head") else "student.backbone.model.") + k: p for k, p in model.named_parameters()
    }

    def loss_of(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        z = model(x)
        return 0.5 * oracle.cross_entropy(z, labels) + 0.9 * oracle.kl(taught(config, x), z, 3.0)

    losses = oracle.run(params, loss_of, batches, o)
    compare(tmp_path / "run", losses, {k: p.detach() for k, p in params.items()})


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_deit(images: Path, tmp_path: Path, kind: str) -> None:
    """Equation 3: half the labels on CLS, half the teacher's decision on the token; equation 2 with lambda 0.1, tau 3."""
    overrides = [
        "backbone=deit_tiny_distilled_patch16_224",
        "method.label_smoothing=0.1",
        f"method.distillation={kind}",
    ]
    overrides += ["method.alpha=0.1"] if kind == "soft" else []
    config, method, batches, o = prepared(images, "deit", *overrides)
    selfsup.train(config, out=tmp_path / "run", quiet=True)

    state = {k: v.clone() for k, v in method.student.state_dict().items()}
    model = timm.create_model(config.backbone.name, num_classes=4, **config.backbone.options).double().train()
    model.load_state_dict({k.removeprefix("backbone.model."): v for k, v in state.items()})
    model.set_distilled_training(True)
    params = {
        ("student." if k.startswith("head") else "student.backbone.model.") + k: p for k, p in model.named_parameters()
    }

    def loss_of(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        z_cls, z_dist = model(x)
        t = taught(config, x)
        if kind == "soft":
            return 0.9 * oracle.cross_entropy(z_cls, labels, 0.1) + 0.1 * oracle.kl(t, z_dist, 3.0)
        return 0.5 * oracle.cross_entropy(z_cls, labels, 0.1) + 0.5 * oracle.cross_entropy(z_dist, t.argmax(-1))

    losses = oracle.run(params, loss_of, batches, o)
    compare(tmp_path / "run", losses, {k: p.detach() for k, p in params.items()})
