"""Ten steps of VICReg in the whole trainer equal ten steps of an oracle in plain loops: one process, and two."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import methods
from selfsup.config import dump
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.log import read_metrics
from tests.methods import oracle_vicreg
from tests.methods.tiny import cli, tiny_config, write_images

OPTIMIZERS = {
    "sgd": ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.min_lr=0.001", "optimizer.weight_decay_end=0.1"],
    "adamw": ["optimizer=adamw", "optimizer.lr=0.002", "optimizer.min_lr=1e-5"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def config_for(images: Path, optimizer: str, *more: str) -> selfsup.Config:
    common = (f"data={images}", "precision=fp64", "optimizer.warmup=3 steps", "optimizer.clip=0.05")
    return tiny_config("vicreg", *common, *OPTIMIZERS[optimizer], *more)


def oracle(config: selfsup.Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The oracle on the crops that the trainer will see, from the weights it will start from."""
    config = methods.complete(config)
    method = methods.create(config).double()
    state = {k.removeprefix("student."): v for k, v in method.state_dict().items()}
    model = timm.create_model(config.backbone.name, num_classes=0, **config.backbone.options).double()
    model.load_state_dict({k.removeprefix("backbone.model."): v for k, v in state.items() if k.startswith("backbone.")})
    head = {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}
    source = open_source(config.data.path, channels=3, config=config.data)
    loader = Loader(
        source,
        method.views(),
        seed=config.seed,
        global_batch=config.global_batch,
        accumulate=1,
        rank=0,
        world=1,
        workers=0,
        pin=False,
    )
    batches = []
    for (batch,) in loader.stream(0, config.steps):
        crops = [
            photometric.apply(c, p, config.mean, config.std, torch.device("cpu"), torch.float64)
            for c, p in zip(batch.crops, batch.params)
        ]
        batches.append((crops[0], crops[1] if len(crops) > 1 else []))
    o = config.optimizer
    options = {"optimizer": o.name, "lr": o.lr, "min_lr": o.min_lr, "warmup": 3, "clip": o.clip}
    return oracle_vicreg.run(model, head, batches, {**options, "wd": o.weight_decay, "wd_end": o.weight_decay_end})


def compare(run: Path, expected: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    losses, weights = expected
    assert [x["loss"] for x in read_metrics(run / "metrics.jsonl")] == pytest.approx(losses, rel=1e-9)
    state = load_file(run / "checkpoints" / "step_00000010" / "model.safetensors")
    assert {k for k in state if "num_batches" not in k} == {f"student.{k}" for k in weights}
    for name, value in weights.items():
        mine = state[f"student.{name}"]
        if name.endswith("attn.qkv.bias"):  # a key's bias has no gradient but rounding, which Adam turns into steps
            third = value.shape[0] // 3
            mine, value = (torch.cat([x[:third], x[2 * third :]]) for x in (mine, value))
        # the head's batch norm takes the last norm's bias away: it has no gradient but rounding either, and moves that mean
        near = 1e-7 if name in ("backbone.model.norm.bias", "head.layers.1.running_mean") else 1e-9
        torch.testing.assert_close(mine, value, rtol=1e-8, atol=near, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("local", [0, 2])
def test_one_process(images: Path, tmp_path: Path, optimizer: str, local: int) -> None:
    config = config_for(images, optimizer, f"views.local.count={local}")
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    compare(tmp_path / "run", oracle(config))


def test_two_processes(images: Path, tmp_path: Path) -> None:
    """Half the batch in each: variances, covariances and batch norm are still those of all of it."""
    config = config_for(images, "sgd")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config))
    done = cli("train", str(recipe), "--out", str(tmp_path / "run"), processes=2)
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "run", oracle(config))
