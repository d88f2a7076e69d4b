"""I-JEPA: its loss is that of an oracle which treats each image alone; what sees what; what it refuses."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from selfsup import methods
from selfsup.errors import UserError
from selfsup.methods.contract import ViewBatch
from tests.methods.test_contract import build
from tests.methods.tiny import tiny_config, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def tokens_of(model, image: torch.Tensor, keep: list[int] | None) -> torch.Tensor:
    """Features [patches, D] of one image [C, S, S], of which the model sees the patches `keep` alone."""
    patches = F.conv2d(image[None], model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    patches = patches.flatten(2)[0].T + model.pos_embed[0, 1:]  # [16, D]
    cls = model.cls_token[0] + model.pos_embed[0, :1]
    x = torch.cat([cls, patches if keep is None else patches[keep]])[None]
    for block in model.blocks:
        x = block(x)
    return model.norm(x)[0, 1:]


def test_loss_is_the_paper(images: Path) -> None:
    method, batch, s = build("ijepa", images, "precision=fp64")
    method = method.double()
    batch = dataclasses.replace(batch, images=[x.double() for x in batch.images])
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p.dtype))
    blocks = method.blocks(batch)
    terms = []
    for i, image in enumerate(batch.images[0][0]):
        target = tokens_of(method.teacher.backbone.model, image, None)
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        context = blocks.context[i].tolist()
        seen = tokens_of(method.student.backbone.model, image, context)
        head = method.student.head
        for block in blocks.targets[i]:
            x = torch.cat([head.embed(seen) + head.positions[context], head.mask_token + head.positions[block]])[None]
            for layer in head.blocks:
                x = layer(x)
            predicted = head.proj(head.norm(x))[0, len(context) :]
            d = (predicted - target[block]).abs()
            terms.append(torch.where(d < 1, d * d / 2, d - 0.5).mean())
    torch.testing.assert_close(method(batch, s)["loss"], torch.stack(terms).mean(), rtol=1e-9, atol=0)


def test_the_context_alone_is_seen(images: Path) -> None:
    """Pixels outside the context change targets, not predictions: with the teacher held, no gradient reaches them."""
    method, batch, s = build("ijepa", images)
    pixels = batch.images[0].clone().requires_grad_()
    method(dataclasses.replace(batch, images=[pixels]), s)["loss"].backward()
    patches = pixels.grad.abs().amax(dim=(0, 2)).unflatten(1, (4, 8)).unflatten(3, (4, 8)).amax(dim=(2, 4)).flatten(1)
    context = torch.from_numpy(method.blocks(batch).context)
    seen = torch.zeros_like(patches, dtype=torch.bool).scatter(1, context, True)
    assert (patches[seen] > 0).all() and (patches[~seen] == 0).all()
    assert all(p.grad is None for p in method.teacher.parameters())


def test_rows_of_the_global_batch(images: Path) -> None:
    """A micro-batch takes its rows of what is drawn for the step, of every view."""
    method, batch, _ = build("ijepa", images, "views.global.count=2")
    whole = method.blocks(batch)
    part = ViewBatch([x[:, 2:5] for x in batch.images], batch.positions[2:5], batch.labels[2:5], batch.ids[2:5], 5, 8)
    for mine, all_of_it in zip(method.blocks(part), whole, strict=True):
        assert (mine == all_of_it.reshape(2, 8, *all_of_it.shape[1:])[:, 2:5].reshape(mine.shape)).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("backbone=resnet10t", "hides patches"),
        ("method.predictor_dim=25", "not a multiple"),
        ("views.global.count=0", "views.global.count=0"),
    ],
)
def test_refuses(images: Path, option: str, message: str) -> None:
    override = [option, "backbone.channels=[8,16,16,32]"] if "resnet" in option else [option]
    config = tiny_config("ijepa", f"data={images}", *override)
    if "resnet" in option:
        kept = {k: v for k, v in config.backbone.options.items() if k == "channels"}
        config = config.model_copy(update={"backbone": config.backbone.model_validate({"name": "resnet10t", **kept})})
    with pytest.raises(UserError, match=message):
        methods.create(methods.complete(config))
