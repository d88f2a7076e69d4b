"""Ten steps of the whole trainer with MoCo v2 and SwAV equal ten steps of oracles in plain loops, in float64."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import methods
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.log import read_metrics
from tests.methods import oracle_views
from tests.methods.tiny import tiny_config, write_images

OPTIONS = ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.min_lr=0.001", "optimizer.weight_decay_end=0.1"]
OPTIONS += ["optimizer.warmup=3 steps", "optimizer.clip=0.5", "precision=fp64"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def start(config: selfsup.Config):
    """(timm backbone, head's weights, whole state, batches, options of the optimizer) that the trainer begins with."""
    config = methods.complete(config)
    method = methods.create(config).double()
    state = method.state_dict()
    student = {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    model = timm.create_model(config.backbone.name, num_classes=0, **config.backbone.options).double()
    model.load_state_dict(
        {k.removeprefix("backbone.model."): v for k, v in student.items() if k.startswith("backbone.")}
    )
    head = {k.removeprefix("head."): v for k, v in student.items() if k.startswith("head.")}
    source = open_source(config.data.path, channels=3, config=config.data)
    loader = Loader(source, method.views(), seed=config.seed, global_batch=config.global_batch)
    batches = [
        [
            photometric.apply(c, p, config.mean, config.std, torch.device("cpu"), torch.float64)
            for c, p in zip(batch.crops, batch.params)
        ]
        for (batch,) in loader.stream(0, config.steps)
    ]
    o = config.optimizer
    options = {"lr": o.lr, "min_lr": o.min_lr, "warmup": 3, "wd": o.weight_decay, "wd_end": o.weight_decay_end}
    return model, head, state, batches, {**options, "clip": o.clip}


def trained(config: selfsup.Config, out: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and the state at the end."""
    selfsup.train(config, out=out, quiet=True)
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    return losses, load_file(out / "checkpoints" / "step_00000010" / "model.safetensors")


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_moco(images: Path, tmp_path: Path, accumulate: int) -> None:
    """The queue of 20 goes round four times; steps of 8 begin in its middle."""
    config = tiny_config("moco", f"data={images}", *OPTIONS)
    model, head, state, batches, options = start(config)
    options |= {"temperature": 0.2, "momentum": 0.9}
    losses, student, teacher, queue = oracle_views.moco(model, head, state["queue"], batches, options)
    found, state = trained(config.model_copy(update={"accumulate": accumulate}), tmp_path / "run")
    assert found == pytest.approx(losses, rel=1e-9)
    expected = {f"student.{k}": v for k, v in student.items()} | {f"teacher.{k}": v for k, v in teacher.items()}
    compare(state, {**expected, "queue": queue, "queue_place": torch.tensor(80 % 20)}, 1e-9)


def test_swav(images: Path, tmp_path: Path) -> None:
    """Frozen prototypes for two steps; a queue of 12 that begins at step 3, and is full, and used, from step 5."""
    config = tiny_config("swav", f"data={images}", *OPTIONS, "method.queue_start=3 steps")
    model, head, _, batches, options = start(config)
    options |= {"temperature": 0.1, "epsilon": 0.05, "iterations": 3, "freeze_steps": 2}
    options |= {"queue_length": 12, "queue_start": 3}
    losses, student, queue = oracle_views.swav(model, head, batches, options)
    found, state = trained(config, tmp_path / "run")
    assert found == pytest.approx(losses, rel=1e-9)
    # batch norm of features that differ little makes the rounding noise larger
    compare(state, {**{f"student.{k}": v for k, v in student.items()}, "queue": queue}, 1e-7)
    without = oracle_views.swav(*start(config)[:2], batches, {**options, "queue_length": 10**6})[0]
    assert [a == pytest.approx(b, rel=1e-9) for a, b in zip(losses, without)] == [True] * 5 + [False] * 5
