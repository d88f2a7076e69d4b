"""Shapes of every head on a ViT and on a ConvNet; which fit which; prediction in windows and at other sizes."""

import itertools

import numpy as np
import pytest
import torch

from selfsup.errors import UserError
from selfsup.eval.segment_heads import Trunk, create_head
from selfsup.eval.segment_test import Predictor, _starts
from tests.eval.segmentation import CONV, VIT, backbone


def head_of(net, name: str, classes: int = 5):
    trunk = Trunk(net, name)
    head = create_head(name, trunk.channels, classes, stride=net.stride, in_chans=3, width=16, dropout=None)
    return trunk, head.eval()


@pytest.mark.parametrize("kind", ["vit", "conv"])
@pytest.mark.parametrize("name", ["linear", "multilayer", "mlp", "upernet", "unetr"])
def test_shapes(kind: str, name: str):
    net = backbone(**(VIT if kind == "vit" else CONV))
    if (kind, name) == ("conv", "unetr"):
        with pytest.raises(UserError, match="for ViTs"):
            Trunk(net, name)
        return
    trunk, head = head_of(net, name)
    x = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        logits = head(trunk(x), x)
    finest = {"vit": {"linear": 8, "multilayer": 8}, "conv": {"linear": 16}}[kind].get(name, 4)
    finest = 1 if name == "unetr" else finest
    assert logits.shape == (2, 5, 48 // finest, 64 // finest)
    with torch.enable_grad():
        head.train()(trunk(x), x).square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_unetr_needs_four_blocks_and_takes_patches_of_14():
    with pytest.raises(UserError, match="2 blocks"):
        Trunk(backbone(**{**VIT, "depth": 2}), "unetr")
    trunk, head = head_of(backbone(**{**VIT, "patch_size": 14, "img_size": 56}), "unetr")
    x = torch.randn(1, 3, 56, 70)
    with torch.no_grad():
        assert head(trunk(x), x).shape == (1, 5, 56, 70) and trunk.layers == [0, 1, 2, 3]


def test_upernet_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "segmentation_models_pytorch.decoders.upernet.decoder", None)
    with pytest.raises(UserError, match=r"pip install 'selfsup\[segment\]'"):
        head_of(backbone(**CONV), "upernet")


def brightness(x: torch.Tensor) -> torch.Tensor:
    """Two classes: dark and bright pixels; a model that sees one pixel at a time."""
    return torch.cat([-x[:, :1], x[:, :1]], dim=1)


@pytest.mark.parametrize("inference", ["slide", "whole"])
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.5, 1.0, 1.5), True)])
def test_prediction_has_the_original_size(inference: str, scales: tuple[float, ...], flip: bool):
    pixels = np.zeros((50, 83, 3), np.uint8)
    pixels[20:, 30:] = 255
    predictor = Predictor(
        brightness, mean=(0.5,) * 3, std=(0.5,) * 3, size=40, multiple=32, inference=inference, scales=scales, flip=flip,
        device=torch.device("cpu"),
    )  # fmt: skip
    out = predictor(pixels)
    assert out.shape == (50, 83) and out.dtype == torch.int64
    wrong = out.numpy() != (pixels[..., 0] > 127)
    assert wrong.mean() < 0.04 and not wrong[:17].any() and not wrong[24:, 34:].any()  # at the edge resampling decides


def test_windows_cover_the_image():
    for length, side in ((40, 40), (41, 40), (83, 40), (400, 40), (7, 40)):
        starts = _starts(max(length, side), side)
        seen = np.zeros(max(length, side), int)
        for s in starts:
            seen[s : s + side] += 1
        assert (
            (seen > 0).all()
            and starts[-1] + side == max(length, side)
            and all(b - a <= 26 for a, b in itertools.pairwise(starts))
        )
