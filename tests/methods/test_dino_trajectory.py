"""Ten steps of the whole trainer equal ten steps of an oracle in plain loops: one process, accumulated, and two processes."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import methods
from selfsup.config import BackboneConfig, dump
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.log import read_metrics
from tests.methods import oracle_dino
from tests.methods.tiny import cli, tiny_config, write_images

OPTIMIZERS = {
    "sgd": ["optimizer=sgd", "optimizer.lr=0.1", "optimizer.min_lr=0.001", "optimizer.weight_decay_end=0.1"],
    "adamw": ["optimizer=adamw", "optimizer.lr=0.002", "optimizer.min_lr=1e-5"],
}
COMMON = [
    "optimizer.warmup=3 steps",
    "optimizer.clip=0.05",
    "method.teacher_temp=0.07",
    "method.teacher_temp_warmup=5 steps",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def config_for(images: Path, optimizer: str, precision: str, *more: str) -> selfsup.Config:
    return tiny_config("dino", f"data={images}", f"precision={precision}", *OPTIMIZERS[optimizer], *COMMON, *more)


def oracle(config: selfsup.Config) -> tuple[list[float], dict, dict, torch.Tensor]:
    """The oracle on the crops that the trainer will see, from the weights it will start from."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    config = methods.complete(config)
    method = methods.create(config).to(dtype)
    state = {k.removeprefix("student."): v for k, v in method.state_dict().items() if k.startswith("student.")}
    options = config.backbone.options
    model = timm.create_model(config.backbone.name, num_classes=0, **options).to(dtype)
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
            photometric.apply(c, p, config.mean, config.std, torch.device("cpu"), dtype)
            for c, p in zip(batch.crops, batch.params)
        ]
        batches.append(crops)
    o, m = config.optimizer, config.method.options
    return oracle_dino.run(
        model,
        head,
        batches,
        {
            "dtype": dtype,
            "optimizer": o.name,
            "lr": o.lr,
            "min_lr": o.min_lr,
            "warmup": 3,
            "wd": o.weight_decay,
            "wd_end": o.weight_decay_end,
            "clip": o.clip,
            "momentum": m["momentum"],
            "student_temp": m["student_temp"],
            "temp_from": 0.04,
            "temp_to": 0.07,
            "temp_steps": 5,
            "freeze_steps": 2,
            "center_momentum": m["center_momentum"],
        },
    )


def compare(
    run: Path, expected: tuple[list[float], dict, dict, torch.Tensor], tolerance: float, weights: float | None
) -> None:
    """Loss and centre within `tolerance` (relative), weights within `weights`; key biases apart: see below."""
    losses, student, teacher, center = expected
    found = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert found == pytest.approx(losses, rel=tolerance)
    state = load_file(run / "checkpoints" / "step_00000010" / "model.safetensors")
    torch.testing.assert_close(state["center"], center, rtol=tolerance, atol=tolerance)
    if weights is None:
        return
    for role, reference in (("student", student), ("teacher", teacher)):
        assert {k.removeprefix(f"{role}.") for k in state if k.startswith(f"{role}.")} == reference.keys()
        for name, value in reference.items():
            mine = state[f"{role}.{name}"]
            if name.endswith("attn.qkv.bias"):  # a key's bias shifts all logits alike: its true gradient is zero,
                third = value.shape[0] // 3  # and Adam turns the rounding noise left of it into whole steps
                mine, value = (torch.cat([x[:third], x[2 * third :]]) for x in (mine, value))
            torch.testing.assert_close(
                mine, value, rtol=weights, atol=weights, msg=lambda m, n=f"{role}.{name}": f"{n}: {m}"
            )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_float64(images: Path, tmp_path: Path, optimizer: str, accumulate: int) -> None:
    config = config_for(images, optimizer, "fp64")
    selfsup.train(config.model_copy(update={"accumulate": accumulate}), out=tmp_path / "run", quiet=True)
    compare(tmp_path / "run", oracle(config), 1e-9, 1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_float32(images: Path, tmp_path: Path, optimizer: str) -> None:
    config = config_for(images, optimizer, "fp32")
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    compare(tmp_path / "run", oracle(config), 1e-5, None)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_float64_two_processes(images: Path, tmp_path: Path, optimizer: str) -> None:
    """Half the batch in each of two processes."""
    config = config_for(images, optimizer, "fp64")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config))
    done = cli("train", str(recipe), "--out", str(tmp_path / "run"), processes=2)
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "run", oracle(config), 1e-9, 1e-9)


@pytest.mark.parametrize("overrides", [[], ["accumulate=2"]], ids=["plain", "accumulated"])
def test_two_processes_with_drop_path(images: Path, tmp_path: Path, overrides: list[str]) -> None:
    """Drop path on, float32: two processes draw what one draws, so the losses are the same."""
    config = config_for(images, "adamw", "fp32", "backbone.drop_path_rate=0.3")
    selfsup.train(config, out=tmp_path / "one", quiet=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config))
    done = cli("train", str(recipe), *overrides, "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert len(one) == 10
    assert two == pytest.approx(one, rel=1e-5)


def test_two_processes_with_batch_norm(images: Path, tmp_path: Path) -> None:
    """Batch norm in backbone and head is synchronised: float64, two processes, the losses of one."""
    config = tiny_config(
        "dino",
        f"data={images}",
        "precision=fp64",
        "backbone=resnet10t",
        "steps=4",
        "method.head_batch_norm=true",
    )
    # tiny_config's other backbone options are a ViT's
    config = config.model_copy(update={"backbone": BackboneConfig(name="resnet10t")})
    selfsup.train(config, out=tmp_path / "one", quiet=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config))
    done = cli("train", str(recipe), "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-7)
