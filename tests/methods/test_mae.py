"""MAE: ten steps of the whole trainer against an oracle in plain steps, and what it says of wrong settings."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import methods
from selfsup.config import dump
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.masks import random_masks
from selfsup.data.sources import open_source
from selfsup.errors import UserError
from selfsup.log import read_metrics
from tests.methods import oracle_mae
from tests.methods.tiny import cli, tiny_config, write_images

COMMON = [
    "precision=fp64",
    "optimizer.lr=0.002",
    "optimizer.schedule=constant",
    "optimizer.warmup=0 steps",
    "optimizer.weight_decay=0.05",
    "optimizer.weight_decay_end=null",
    "optimizer.betas=[0.9,0.95]",
    "optimizer.clip=0.5",
    "optimizer.clip_mode=global",
    "views.local.count=1",
    "views.local.size=32",  # at other sizes the positions are resampled
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def oracle(config: selfsup.Config) -> tuple[list[float], dict[str, torch.Tensor], set[str]]:
    config = methods.complete(config)
    method = methods.create(config).double()
    weights = {k.removeprefix("student."): v for k, v in method.state_dict().items()}
    frozen = {n.removeprefix("student.") for n, p in method.named_parameters() if not p.requires_grad}
    source = open_source(config.data.path, channels=3, config=config.data)
    loader = Loader(source, method.views(), seed=0, global_batch=8, accumulate=1, rank=0, world=1, workers=0, pin=False)
    batches, hidden = [], []
    for step, (batch,) in enumerate(loader.stream(0, config.steps)):
        crops = [
            photometric.apply(c, p, config.mean, config.std, torch.device("cpu"), torch.float64)
            for c, p in zip(batch.crops, batch.params)
        ]
        batches.append([x.flatten(0, 1) for x in crops])
        sets, view = [], 0
        for x in crops:  # [V, 8, C, S, S]
            tokens, group = (x.shape[-1] // 8) ** 2, []
            for _ in range(len(x)):
                masked = random_masks(0, step, batch.positions.numpy(), view, tokens=tokens, count=tokens * 3 // 4)
                group += [{i for i in range(tokens) if row[i]} for row in masked]
                view += 1
            sets.append(group)
        hidden.append(sets)
    o = config.method.options
    losses, after = oracle_mae.run(
        weights,
        batches,
        hidden,
        {
            "patch": 8,
            "depth": 2,
            "heads": 2,
            "decoder_depth": 2,
            "decoder_heads": 3,
            "fixed": o["fixed_positions"],
            "norm_pix": o["norm_pix"],
            "frozen": frozen,
            "lr": 0.002,
            "wd": 0.05,
            "clip": 0.5,
        },
    )
    return losses, after, frozen


def compare(run: Path, losses: list[float], weights: dict[str, torch.Tensor], tolerance: float = 1e-9) -> None:
    assert [line["loss"] for line in read_metrics(run / "metrics.jsonl")] == pytest.approx(losses, rel=tolerance)
    state = load_file(run / "checkpoints" / "step_00000010" / "model.safetensors")
    assert {k.removeprefix("student.") for k in state} == weights.keys()
    for name, value in weights.items():
        mine = state[f"student.{name}"]
        if name.endswith("attn.qkv.bias"):  # a key's bias has no gradient but rounding noise, see test_dino_trajectory
            third = len(value) // 3
            mine, value = (torch.cat([x[:third], x[2 * third :]]) for x in (mine, value))
        torch.testing.assert_close(mine, value, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_ten_steps_in_float64(images: Path, tmp_path: Path) -> None:
    """The defaults of the paper, two global views and a local one: one process, accumulated, and two processes."""
    config = tiny_config("mae", f"data={images}", *COMMON)
    losses, weights, frozen = oracle(config)
    assert frozen == {"backbone.model.pos_embed"}
    selfsup.train(config, out=tmp_path / "one", quiet=True)
    compare(tmp_path / "one", losses, weights)
    selfsup.train(config.model_copy(update={"accumulate": 2}), out=tmp_path / "accumulated", quiet=True)
    compare(tmp_path / "accumulated", losses, weights)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config))
    done = cli("train", str(recipe), "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    compare(tmp_path / "two", losses, weights)


def test_pixels_and_learnt_positions(images: Path, tmp_path: Path) -> None:
    more = ["method.norm_pix=false", "method.fixed_positions=false", "views.local.count=0"]
    config = tiny_config("mae", f"data={images}", *COMMON, *more)
    losses, weights, frozen = oracle(config)
    assert not frozen
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    compare(tmp_path / "run", losses, weights)


def test_registers_and_average_pooling(images: Path, tmp_path: Path) -> None:
    """Drop path, registers, recomputation and a norm after pooling: it trains, and two micro-batches are one batch."""
    options = ["backbone.reg_tokens=2", "backbone.no_embed_class=true", "backbone.drop_path_rate=0.3"]
    average = ["backbone.class_token=false", "backbone.global_pool=avg", "backbone.drop_path_rate=0.3"]
    for name, more in (("registers", options), ("average", average)):
        config = tiny_config("mae", f"data={images}", "precision=fp64", "steps=3", *more)
        selfsup.train(config, out=tmp_path / name, quiet=True)
        halved = config.model_copy(update={"accumulate": 2})
        selfsup.train(halved, out=tmp_path / f"{name}_halved", quiet=True)
        whole, parts = (
            [line["loss"] for line in read_metrics(tmp_path / run / "metrics.jsonl")]
            for run in (name, f"{name}_halved")
        )
        assert parts == pytest.approx(whole, rel=1e-9)
        backbone = selfsup.load_backbone(str(tmp_path / name))
        assert backbone(torch.randn(1, 3, 32, 32)).pooled.shape == (1, 32)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.mask_ratio=0.95", "leaves none of the 16 patches"),
        ("method.decoder_dim=25", "not a multiple of decoder_heads"),
        ("views.local.size=12", "not a multiple of the patch"),
    ],
)
def test_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.create(methods.complete(tiny_config("mae", override)))


def test_convnets_are_refused() -> None:
    config = selfsup.config.load(None, ["method=mae", "backbone=resnet18"])
    with pytest.raises(
        UserError, match=r"resnet18: MAE hides patches .* ResNet does not have apart; choose a plain ViT"
    ):
        methods.create(methods.complete(config))
