"""Ten steps of BYOT equal ten steps of an oracle; its exits, its options, and what it refuses."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import methods
from selfsup.config import Config, load
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.errors import UserError
from selfsup.log import read_metrics
from tests.methods import oracle_byot
from tests.methods.tiny import TINY_RUN, TINY_VIT, tiny_config, write_images

CLASSES = 4
CONV = ["backbone=resnet10t", "backbone.channels=[8,16,16,32]", "backbone.stem_width=8"]
OPTIONS = ["method.alpha=0.4", "method.temperature=2.0", "method.feature_weight=0.01"]
SGD = ["optimizer=sgd", "optimizer.lr=0.05", "optimizer.min_lr=0.001"]
ADAMW = ["optimizer=adamw", "optimizer.lr=0.002", "optimizer.min_lr=1e-5"]
COMMON = [
    "optimizer.warmup=3 steps",
    "optimizer.clip=null",
    "optimizer.weight_decay=0.05",
    "optimizer.weight_decay_end=null",
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), classes=CLASSES)


def config_for(images: Path, *more: str, backbone: list[str] = TINY_VIT) -> Config:
    common = [option for option in TINY_RUN if not option.startswith("backbone")]
    views = ["views.global.count=1", "views.global.blur=0.2", "views.global.solarize=0.1"]
    return load(None, [*common, *backbone, *views, f"data={images}", f"data.classes={CLASSES}", "method=byot", *more])


def oracle(config: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The oracle on the crops that the trainer will see, from the weights it will start from."""
    config = methods.complete(config)
    method = methods.create(config).double()
    state = {k.removeprefix("student."): v.clone() for k, v in method.state_dict().items()}
    convolutional = config.backbone.name.startswith("resnet")
    model = timm.create_model(config.backbone.name, num_classes=0, **config.backbone.options).double().train()
    model.load_state_dict({k.removeprefix("backbone.model."): v for k, v in state.items() if k.startswith("backbone.")})
    names = method.student.exits.keys()
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    weights = {"head": {k.removeprefix("head."): v for k, v in state.items() if k.startswith("head.")}}
    for name in names:
        prefix = f"exits.{name}."
        weights[name] = {
            k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix) and not k.endswith(buffers)
        }
    if convolutional:
        stages, to_map = [model.layer1, model.layer2, model.layer3], lambda out: out
    else:  # tokens after the class token, 4 x 4 of them, to a map
        stages = [model.blocks[0]]

        def to_map(out: torch.Tensor) -> torch.Tensor:
            return out[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    source = open_source(config.data.path, channels=3, config=config.data)
    loader = Loader(
        source, method.views(), seed=config.seed, global_batch=8, accumulate=1, rank=0, world=1, workers=0, pin=False
    )
    batches = []
    for (batch,) in loader.stream(0, config.steps):
        crops = photometric.apply(
            batch.crops[0], batch.params[0], config.mean, config.std, torch.device("cpu"), torch.float64
        )
        batches.append((crops[0], batch.labels))
    o = config.optimizer
    options = {
        "lr": o.lr, "min_lr": o.min_lr, "warmup": 3, "wd": o.weight_decay, "optimizer": o.name, "alpha": 0.4,
        "temperature": 2.0, "feature_weight": 0.01, "norm": "batch" if convolutional else "layer",
    }  # fmt: skip
    return oracle_byot.run(model, stages, to_map, weights, batches, options)


@pytest.mark.parametrize(
    ("backbone", "optimizer"),
    [(TINY_VIT, ADAMW), (TINY_VIT, SGD), (CONV, SGD)],
    ids=["vit-adamw", "vit-sgd", "resnet-sgd"],
)
def test_ten_steps_equal_the_oracle(images: Path, tmp_path: Path, backbone: list[str], optimizer: list[str]) -> None:
    config = config_for(images, "precision=fp64", *OPTIONS, *optimizer, *COMMON, backbone=backbone)
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    losses, weights = oracle(config)
    assert [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == pytest.approx(
        losses, rel=1e-9
    )
    state = load_file(tmp_path / "run" / "checkpoints" / "step_00000010" / "model.safetensors")
    for name, value in weights.items():
        mine = state[f"student.{name}"]
        if name.endswith("attn.qkv.bias"):  # a key's bias has no gradient but rounding, which Adam turns into steps
            third = value.shape[0] // 3
            mine, value = (torch.cat([x[:third], x[2 * third :]]) for x in (mine, value))
        torch.testing.assert_close(mine, value, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_several_views_are_several_images(images: Path) -> None:
    """Every view of the global kind is classified; local ones are not made."""
    method = methods.create(methods.complete(config_for(images, "views.global.count=2")))
    assert [view.kind for view in method.views()] == ["global", "global"]


def test_classifiers_share_the_weights(images: Path) -> None:
    method = methods.create(methods.complete(config_for(images, backbone=CONV)))
    found = method.classifiers()
    assert list(found) == ["exit4", "exit1", "exit2", "exit3", "ensemble"]
    own = {p.data_ptr() for p in method.parameters()}
    assert all(p.data_ptr() in own for module in found.values() for p in module.parameters())
    x = torch.randn(2, 3, 32, 32)
    assert all(module.eval()(x).shape == (2, CLASSES) for module in found.values())


def test_options_are_heard(images: Path) -> None:
    config = config_for(images, "method.exits=[2,-2]", "method.width=12", "method.norm=layer", backbone=CONV)
    method = methods.create(methods.complete(config))
    assert method.student.layers == [2, 3]
    shapes = [part.shape for part in method.student.exits.values()]
    assert [(s.in_dim, s.width, s.dim, s.norm) for s in shapes] == [(16, 12, 32, "layer"), (16, 12, 32, "layer")]


def test_mixed_and_smoothed_labels(images: Path, tmp_path: Path) -> None:
    """Both change the loss of the first step, which starts from the same weights and images."""
    losses = []
    for i, more in enumerate(([], ["method.label_smoothing=0.3"], ["mix=ricap"], ["mix=mixup", "mix.mixup_alpha=5"])):
        config = config_for(images, "steps=1", "precision=fp32", *more)
        selfsup.train(config, out=tmp_path / str(i), quiet=True)
        losses += [line["loss"] for line in read_metrics(tmp_path / str(i) / "metrics.jsonl")]
    assert len(set(losses)) == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.exits=[7]", r"method.exits=\[7\]: the layers of resnet10t are 0 \(act1\), 1 \(layer1\)"),
        ("method.exits=[1,4]", "the last, is the deepest exit"),
        ("method.exits=[]", "give layers from 0 to 3"),
        ("method.alpha=1.5", "method.alpha"),
        ("method.temperature=0", "method.temperature"),
        ("data.classes=null", "labels"),
        ("data.classes=1", "two or more"),
        ("compile=true", "compile"),
        ("backbone.features_only=true", "features_only"),
        ("views.global.count=0", "views.global.count"),
    ],
)
def test_refused(images: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.create(methods.complete(config_for(images, override, backbone=CONV)))


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    config = tiny_config("byot", f"data={write_images(tmp_path / 'images', 16)}")
    with pytest.raises(UserError, match="no label"):
        selfsup.train(config, out=tmp_path / "run", quiet=True)


def test_drop_path_and_recomputation(images: Path, tmp_path: Path) -> None:
    """Losses do not depend on whether blocks are recomputed."""
    runs = []
    for value in ("false", "true"):
        options = ["backbone.drop_path_rate=0.3", "steps=3", "precision=fp32", f"grad_checkpointing={value}"]
        selfsup.train(config_for(images, *options), out=tmp_path / value, quiet=True)
        runs.append([line["loss"] for line in read_metrics(tmp_path / value / "metrics.jsonl")])
    assert runs[0] == runs[1] and len(set(runs[0])) == 3
