"""Exits alone: what they compute, what they cost, and what is written of them."""

import json
import math
from pathlib import Path

import pytest
import torch

from selfsup.backbones import create_backbone
from selfsup.backbones.stages import stage_layers
from selfsup.config import BackboneConfig
from selfsup.errors import UserError
from selfsup.exits import ExitNetwork, Norm, exits_for, export_exit, export_onnx, load_exit

SMALL = {
    "resnet": ("resnet18", {}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32], "drop_path_rate": 0.1}),
    "resnetv2": (
        "resnetv2_50",
        {"layers": [1, 1, 1], "channels": [32, 48, 64], "stem_chs": 16, "norm_layer": "groupnorm1"},
    ),
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}),
}


def make(kind: str, layers: list[int] | None = None, norm: Norm | None = None) -> ExitNetwork:
    name, options = SMALL[kind]
    torch.manual_seed(0)
    size = 64 if kind == "swin" else 32
    backbone = create_backbone(
        BackboneConfig(name=name, in_chans=1, **options), mean=(0.4,), std=(0.3,), input_size=size
    )
    layers = stage_layers(backbone) if layers is None else layers
    head = torch.nn.Linear(backbone.embed_dim, 7)
    return ExitNetwork(backbone, head, exits_for(backbone, layers, 7, norm=norm), layers).eval()


def images_for(network: ExitNetwork, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 1, *network.backbone.image_size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", sorted(SMALL))
@torch.no_grad()
def test_each_alone_is_the_exit_of_the_whole(kind: str) -> None:
    network = make(kind)
    images = images_for(network)
    features, logits = network(images)
    count = len(network.layers) + 1
    assert [f.shape for f in features] == [(3, network.backbone.embed_dim)] * count
    alone = network.classifiers()
    assert list(alone) == [f"exit{count}", *(f"exit{i}" for i in range(1, count)), "ensemble"]
    for i in range(count):
        assert torch.equal(alone[f"exit{i + 1}"](images), logits[i]), i
    mean = torch.stack([z.softmax(-1) for z in logits]).mean(0)
    torch.testing.assert_close(alone["ensemble"](images).exp(), mean, rtol=1e-5, atol=1e-6)


def test_bottlenecks_bring_maps_to_the_deepest_size() -> None:
    network = make("resnet")
    maps = network.backbone.forward_stages(images_for(network), network.layers)[1]
    deepest = network.backbone(images_for(network)).patches.shape[-1]
    for part, m in zip(network.exits.values(), maps, strict=True):
        assert part.reduce(m).shape == (3, 512 // 4, deepest, deepest)
    assert [part.shape.strides for part in network.exits.values()] == [3, 2, 1]
    assert [part.shape.strides for part in make("vit").exits.values()] == [0, 0, 0]


def test_mean_before_the_last_convolution_is_the_mean_after_it() -> None:
    part = make("convnext").exits["exit1"].double()
    maps = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    feature, _ = part(maps)
    convolved = torch.nn.functional.conv2d(part.reduce(maps), part.expand.weight[:, :, None, None], part.expand.bias)
    torch.testing.assert_close(feature, convolved.mean(dim=(2, 3)), rtol=1e-12, atol=1e-12)


def test_norm_follows_the_backbone() -> None:
    def kinds(network: ExitNetwork) -> set[str]:
        return {type(m).__name__ for m in network.exits.modules() if "Norm" in type(m).__name__}

    assert kinds(make("resnet")) == {"BatchNorm2d"}
    assert kinds(make("convnext")) == kinds(make("resnet", norm="layer")) == {"LayerNorm2d"}


@pytest.mark.parametrize("kind", sorted(SMALL))
@torch.no_grad()
def test_written_and_read_again(kind: str, tmp_path: Path) -> None:
    """Bit for bit the logits of the whole network's exit, from a folder that is smaller the shallower the exit is."""
    network = make(kind)
    images = images_for(network)
    logits = network(images)[1]
    sizes = []
    for i, name in enumerate(network.exits):
        folder = export_exit(network.classifiers()[name], name, tmp_path / name, ["a", "b", "c", "d", "e", "f", "g"])
        found = load_exit(folder)
        assert torch.equal(found(images), logits[i])
        assert found.backbone.mean == (0.4,) and found.backbone.image_size == network.backbone.image_size
        assert not found.training and sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
        sizes.append((folder / "model.safetensors").stat().st_size)
        again = export_exit(found, name, tmp_path / f"{name}_again", ["a", "b", "c", "d", "e", "f", "g"])
        assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    whole = 4 * sum(p.numel() for p in [*network.backbone.parameters(), *network.head.parameters()])
    assert sizes == sorted(sizes) or kind == "vit"
    assert sizes[0] < whole


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network = make("convnext")
    difference = export_onnx(network.classifiers()["exit2"], network.backbone, tmp_path / "exit2.onnx")
    assert difference < 1e-5
    import onnx

    model = onnx.load(tmp_path / "exit2.onnx")
    assert [o.name for o in model.graph.output] == ["logits"]
    weights = sum(math.prod(t.dims) for t in model.graph.initializer)
    cut = sum(p.numel() for p in network.classifiers()["exit2"].cut().parameters())
    assert weights < 1.1 * cut + 100, "stages behind the exit are in the file"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("selfsup_exit"), "not of an exit"),
        (lambda c: c["selfsup_exit"].update(layer=9), "layer"),
        (lambda c: c["selfsup_exit"].update(layer=0), "do not fit"),
        (lambda c: c["selfsup_exit"]["exit"].update(classes=8), "do not fit"),
        (lambda c: c["selfsup_exit"]["exit"].update(classes=-1), "classes"),
        (lambda c: c["selfsup_exit"].update(extra=1), "extra"),
        (lambda c: c["selfsup_exit"]["backbone"].pop("architecture"), "architecture"),
        (lambda c: c["selfsup_exit"]["backbone"].update(architecture="nosuch"), "no such model"),
    ],
)
def test_damaged_folders_are_refused(spoil, message: str, tmp_path: Path) -> None:
    folder = export_exit(make("convnext").classifiers()["exit2"], "exit2", tmp_path / "exit")
    path = folder / "config.json"
    recorded = json.loads(path.read_text())
    spoil(recorded)
    path.write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=message) as caught:
        load_exit(folder)
    assert str(folder) in str(caught.value) or "backbone.name" in str(caught.value) or "layer" in message


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    folder = export_exit(make("convnext").classifiers()["exit1"], "exit1", tmp_path / "exit")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="not an exported exit"):
        load_exit(folder)
    with pytest.raises(UserError, match="not an exported exit"):
        load_exit(tmp_path / "nothing")
