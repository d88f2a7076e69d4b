"""MSN: which patches anchors see; one loss for all views; options and refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from selfsup import methods
from selfsup.errors import UserError
from selfsup.losses.msn import log_predictions, msn_loss, msn_targets
from tests.methods.test_contract import build
from tests.methods.tiny import tiny_config, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("mask", ["random", "focal"])
def test_anchors_see_what_they_keep(images: Path, mask: str) -> None:
    """9 of 16 patches of each global anchor; the target view is the teacher's alone."""
    method, batch, s = build("msn", images, f"method.mask={mask}", "views.global.count=3", "views.global.blur=0",
                             "views.global.solarize=0")  # fmt: skip
    pixels = [x.clone().requires_grad_() for x in batch.images]
    method(dataclasses.replace(batch, images=pixels), s)["loss"].backward()
    assert (pixels[0].grad[0] == 0).all() and (pixels[1].grad.abs().amax(dim=(2, 3, 4)) > 0).all()
    seen = pixels[0].grad[1:].abs().amax(dim=2).unflatten(2, (4, 8)).unflatten(4, (4, 8)).amax(dim=(3, 5)) > 0
    seen = seen.flatten(0, 1).flatten(1)  # [2*B, 16]
    kept = method.visible(batch)
    assert kept.shape == (16, 9) and torch.equal(torch.nonzero(seen)[:, 1].view(16, 9), kept)
    assert not torch.equal(kept[:8], kept[8:])
    if mask == "focal":
        sides = [np.unique(row // 4).size + np.unique(row % 4).size for row in kept.numpy()]
        assert max(sides) <= 7  # 3 x 3, or 4 x 3 with part of a line


def test_loss_of_all_anchors(images: Path) -> None:
    """The parts as the paper has them, from embeddings taken view by view."""
    method, batch, s = build("msn", images)
    out = method(batch, s)
    with torch.no_grad():
        target = method.teacher.head(method.teacher.backbone(batch.images[0][0]).pooled)
        tokens = method.student.backbone.encode_visible(batch.images[0][1], method.visible(batch))
        views = [tokens[:, 0], *(method.student.backbone(x).pooled for x in batch.images[1])]
        z = torch.stack([method.student.head(x) for x in views])
        targets = msn_targets(log_predictions(target, method.prototypes, 0.1), 0.25, 3)
        parts = msn_loss(log_predictions(z, method.prototypes, 0.1), targets)
    torch.testing.assert_close(out["cross_entropy"], parts.cross_entropy)
    expected = parts.cross_entropy + parts.mean_entropy + 0.1 * parts.entropy
    torch.testing.assert_close(out["loss"].detach(), expected)


@pytest.mark.parametrize("views", [("views.global.count=1",), ("views.global.count=2", "views.local.count=0")])
def test_other_views(images: Path, views: tuple[str, ...]) -> None:
    """Focal anchors alone, or masked ones alone, and the mean of patches as embedding."""
    pool = ["backbone.global_pool=avg", "backbone.class_token=false", "views.global.blur=0", "views.global.solarize=0"]
    method, batch, s = build("msn", images, *views, *pool)
    loss = method(batch, s)["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_refuses(images: Path) -> None:
    too_few = ["views.global.count=1", "views.local.count=0", "views.global.blur=0", "views.global.solarize=0"]
    with pytest.raises(UserError, match="two in all"):
        methods.create(methods.complete(tiny_config("msn", f"data={images}", *too_few)))
