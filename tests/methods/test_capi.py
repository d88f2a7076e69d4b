"""CAPI: what sees what, what is predicted, which part of the loss moves what, and what it refuses."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from selfsup import methods, schedules
from selfsup.errors import UserError
from selfsup.losses.capi import assignments
from tests.methods.test_contract import build
from tests.methods.tiny import tiny_config, write_images

BY_HAND = ["method.predictor_drop_path=0", "backbone.drop_path_rate=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def test_loss_by_hand(images: Path) -> None:
    """Image by image and patch by patch: features, evenly assigned at each position, predicted where they are hidden."""
    method, batch, s = build("capi", images, *BY_HAND)
    with torch.no_grad():
        for p in method.teacher.backbone.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    out = method(batch, s)
    where, wanted = method.patches_of(batch)
    assert where.shape == (8, 6) and wanted.shape == (8, 5)  # of 16 patches 10 are hidden, and half of them asked for
    layer, head = method.teacher.head.layer, method.student.head
    everything = torch.arange(16)[None]
    with torch.no_grad():
        scores = torch.cat(
            [
                layer(F.normalize(method.teacher.backbone.encode_visible(x[None], everything)[:, 1:], dim=-1))
                for x in batch.images[0][0]
            ]
        )  # [B, 16, K]
        q = torch.stack([assignments(scores[:, [p]], 0.06)[:, 0] for p in range(16)], dim=1)
        clustering = -(q * (scores / 0.12).log_softmax(-1)).sum(-1).mean()
        terms = []
        for i, x in enumerate(batch.images[0][0]):
            assert not set(where[i].tolist()) & set(wanted[i].tolist())
            seen = method.student.backbone.encode_visible(x[None], where[i : i + 1])
            for patch in wanted[i]:
                z = head.predictor(seen, where[i : i + 1], patch.view(1, 1))[0, 0]
                directions = F.normalize(head.prototypes.weight_v, dim=-1)
                terms.append(-(q[i, patch] * (directions @ F.normalize(z, dim=0) / 0.12).log_softmax(-1)).sum())
    torch.testing.assert_close(out["clustering_loss"], clustering, rtol=1e-5, atol=0)
    torch.testing.assert_close(out["prediction_loss"], torch.stack(terms).mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out["loss"].detach(), out["clustering_loss"] + out["prediction_loss"])


def test_gradients_stay_apart(images: Path) -> None:
    """Clusters learn from the assignments alone, the student from the prediction alone, the teacher's encoder from neither."""
    method, batch, s = build("capi", images, *BY_HAND)
    pixels = batch.images[0].clone().requires_grad_()
    method(dataclasses.replace(batch, images=[pixels]), s)["loss"].backward()
    patches = pixels.grad.abs().amax(dim=(0, 2)).unflatten(1, (4, 8)).unflatten(3, (4, 8)).amax(dim=(2, 4)).flatten(1)
    where, _ = method.patches_of(batch)
    seen = torch.zeros_like(patches, dtype=torch.bool).scatter(1, where, True)
    assert (patches[seen] > 0).all() and (patches[~seen] == 0).all()
    assert all(p.grad is None for p in method.teacher.backbone.parameters())
    before = method.teacher.head.layer.weight.grad.clone()
    method.zero_grad(set_to_none=True)
    method.student.requires_grad_(False)
    method(batch, s)["loss"].backward()
    torch.testing.assert_close(method.teacher.head.layer.weight.grad, before)


def test_momentum(images: Path) -> None:
    """As the published schedule: from 1 in a line to 0.999, then half a cosine back to 1."""
    config = methods.complete(tiny_config("capi", f"data={images}", "steps=100", "method.momentum_warmup=10%"))
    momentum = methods.create(config).schedules(schedules.plan(config, 40))["momentum"]
    assert [momentum(s) for s in (0, 5, 10, 55, 100)] == pytest.approx([1, 0.9995, 0.999, 0.9995, 1])


def test_rows_of_the_global_batch(images: Path) -> None:
    method, batch, _ = build("capi", images, "views.global.count=2")
    part = dataclasses.replace(batch, images=[x[:, 2:5] for x in batch.images], positions=batch.positions[2:5])
    for mine, whole in zip(method.patches_of(part), method.patches_of(batch), strict=True):
        assert np.array_equal(mine, whole.unflatten(0, (2, 8))[:, 2:5].flatten(0, 1))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("method.predictor_dim=25", "not a multiple"),
        ("views.global.size=8", "one patch"),
        ("views.global.count=0", "count=0"),
    ],
)
def test_refuses(images: Path, option: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        methods.create(methods.complete(tiny_config("capi", f"data={images}", option, "views.local.size=8")))
