"""SimMIM: its first loss in plain loops, hidden pixels that nothing sees, ConvNets, and what it refuses."""

from pathlib import Path

import pytest
import torch

import selfsup
from selfsup import methods
from selfsup.config import dump, load
from selfsup.data.masks import random_masks
from selfsup.errors import UserError
from selfsup.log import read_metrics
from selfsup.methods.contract import ViewBatch
from tests.methods.tiny import cli, tiny_config, write_images

CONVNET = ["backbone=resnet10t", "method=simmim", "views.global.size=64", "views.local.count=0", "precision=fp64"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def convnet(images: Path, *more: str) -> selfsup.Config:
    options = ["backbone.channels=[8,16,16,32]", "backbone.stem_width=8", "global_batch=8", "steps=4", "workers=0"]
    more = ("threads=1", "tensorboard=false", "checkpoint.every=100", f"data={images}", *more)
    return load(None, [*CONVNET, *options, *more])


def batch(size: int, views: int = 2) -> ViewBatch:
    n = torch.arange(8)
    return ViewBatch([torch.randn(views, 8, 3, size, size, dtype=torch.float64)], n, -torch.ones_like(n), n, 3, 8)


@pytest.mark.parametrize("kind", ["vit", "convnet"])
def test_loss_in_plain_loops(images: Path, kind: str) -> None:
    """Squares of two patches a side; every number of hidden pixels compared by itself; and hidden pixels are not seen."""
    if kind == "vit":
        config = tiny_config("simmim", "method.mask_patch_size=16", "views.local.count=0")
        size, square, stride = 32, 16, 8
    else:
        config = convnet(images, "method.mask_patch_size=32")
        size, square, stride = 64, 32, 32
    method = methods.create(methods.complete(config)).double().train()
    views = batch(size)
    state = {k: v.clone() for k, v in method.state_dict().items()}
    loss = method(views, {})["loss"]
    method.load_state_dict(state)

    side = size // square
    flat, hidden = views.images[0].flatten(0, 1), []
    for view in range(2):
        units = random_masks(0, 3, views.on_host(), view, tokens=side * side, count=-(-side * side * 6 // 10))
        hidden += [[(i // side, i % side) for i in range(side * side) if row[i]] for row in units]
    mask = torch.zeros(16, size, size, dtype=torch.bool)
    for n, squares in enumerate(hidden):
        for r, c in squares:
            mask[n, r * square : (r + 1) * square, c * square : (c + 1) * square] = True
    head = method.student.head
    if kind == "vit":
        at_patches = mask[:, ::stride, ::stride].flatten(1)
        features = method.student.backbone.forward_masked(flat, at_patches, head.mask_token)
    else:
        seen = flat.clone()
        for n in range(16):
            seen[n, :, mask[n]] = head.mask_token.detach()[:, None]
        features = method.student.backbone(seen)
    maps = torch.nn.functional.conv2d(features.patches, head.linear.weight[:, :, None, None], head.linear.bias)
    total, count = 0.0, 0
    for n in range(16):
        for r in range(size // stride):
            for c in range(size // stride):
                if mask[n, r * stride, c * stride]:
                    pixels = flat[n, :, r * stride : (r + 1) * stride, c * stride : (c + 1) * stride]
                    predicted = maps[n, :, r, c].reshape(stride, stride, 3).permute(2, 0, 1)
                    total, count = total + (predicted - pixels).abs().sum().item(), count + pixels.numel()
    assert loss.item() == pytest.approx(total / count, rel=1e-10)


def test_convnet_in_two_processes(images: Path, tmp_path: Path) -> None:
    """Batch norm is synchronised: the losses of one process; it learns; and the run is a backbone."""
    config = convnet(images)
    selfsup.train(config, out=tmp_path / "one", quiet=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config))
    done = cli("train", str(recipe), "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr
    one, two = ([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in ("one", "two"))
    assert len(one) == 4 and two == pytest.approx(one, rel=1e-7)
    assert selfsup.load_backbone(str(tmp_path / "one"))(torch.randn(1, 3, 64, 64)).pooled.shape == (1, 32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.mask_patch_size=12"], "no multiple of the 8 pixels .* use 16"),
        (["method.mask_patch_size=24"], "views of 32 pixels are not made of such squares"),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.create(methods.complete(tiny_config("simmim", *overrides)))
