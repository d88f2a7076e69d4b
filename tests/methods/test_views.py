"""SimCLR, SupCon, SwAV, MoCo v2 and v3: what each has of its own, in one process, on random images."""

import math

import pytest
import torch

from selfsup import UserError, methods, schedules
from selfsup.config import BackboneConfig, Config
from selfsup.methods.contract import ViewBatch
from tests.methods.tiny import tiny_config

SIZE = 8
NAMES = ["moco", "mocov3", "simclr", "supcon", "swav"]
RESNET = BackboneConfig(name="resnet10t", channels=[8, 16, 16, 32], stem_width=8)


def build(name: str, *overrides: str, backbone: BackboneConfig | None = None, labels: list[int] | None = None):
    """(method, a batch, values of the schedules at step 5)."""
    config = tiny_config(name, "precision=fp32", *overrides)
    config = methods.complete(config if backbone is None else config.model_copy(update={"backbone": backbone}))
    return methods.create(config).train(), batch(config, labels or [-1] * SIZE), values(name, config, 5)


def batch(config: Config, labels: list[int], seed: int = 0) -> ViewBatch:
    g = torch.Generator().manual_seed(seed)
    kinds = [crops for crops in (config.views.global_, config.views.local) if crops.count]
    images = [torch.randn(c.count, SIZE, 3, c.size, c.size, generator=g) for c in kinds]
    place = torch.arange(SIZE)
    return ViewBatch(images, place, torch.tensor(labels), place, step=5, global_batch=SIZE)


def values(name: str, config: Config, step: int) -> dict[str, float]:
    method = methods.create(config)
    return schedules.evaluate(method.schedules(schedules.plan(config, 40)), step)


@pytest.mark.parametrize("name", NAMES)
def test_convnets(name: str) -> None:
    """All train on a ConvNet with batch norm, on crops of two sizes."""
    method, views, s = build(name, backbone=RESNET)
    assert method.batch_statistics
    loss = method(views, s)["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in method.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "message"), [(n, "one global view and two in all") for n in NAMES[1:]] + [("moco", "two")]
)
def test_too_few_views(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, "views.global.count=1", "views.global.blur=0.5", "views.global.solarize=0", "views.local.count=0")


# ------------------------------------------------------------------------------------------------------------------ SupCon


def test_supcon_without_labels() -> None:
    """Images without a label are each a thing of their own, and so are images of as many classes."""
    method, views, s = build("supcon")
    alone = method(views, s)["loss"]
    method, views, s = build("supcon", labels=list(range(SIZE)))
    assert torch.equal(method(views, s)["loss"], alone)
    method, views, s = build("supcon", labels=[0, 0, -1, -1, 2, 3, 4, 5])  # one pair of a class, the others alone
    assert method(views, s)["loss"] != alone


# ------------------------------------------------------------------------------------------------------------------- MoCo


def test_moco_queue() -> None:
    """Keys in the order of the global batch take the place of the oldest; a refused step leaves queue and place."""
    method, views, s = build("moco")  # a queue of 20
    before = method.queue.clone()
    method(views, s)
    torch.testing.assert_close(method.keys.norm(dim=1), torch.ones(SIZE))
    method.after_step(s, torch.zeros(()))
    assert torch.equal(method.queue, before) and method.queue_place == 0
    for step in range(1, 4):
        method(views, s)
        method.after_step(s, torch.ones(()))
        assert method.queue_place == step * SIZE % 20
    last = method.queue[
        torch.arange(16, 24) % 20
    ]  # the third step began in the last four rows, and went on in the first
    assert not (method.queue == before).all(1).any()
    method(views, s)  # the same keys again: without an optimizer nothing moved
    torch.testing.assert_close(last, method.keys)


def test_moco_micro_batches() -> None:
    """Halves of a batch, in either order, leave the queue that the whole leaves."""
    queues = []
    for parts in ([slice(0, 8)], [slice(0, 4), slice(4, 8)], [slice(4, 8), slice(0, 4)]):
        method, views, s = build("moco")
        for part in parts:
            images = [x[:, part] for x in views.images]
            method(ViewBatch(images, views.positions[part], views.labels[part], views.ids[part], 5, SIZE), s)
        method.after_step(s, torch.ones(()))
        queues.append(method.queue)
    for queue in queues[1:]:
        torch.testing.assert_close(queue, queues[0], rtol=1e-5, atol=1e-6)


def test_moco_needs_room_for_a_step() -> None:
    with pytest.raises(UserError, match=r"queue_length=7.*global_batch=8"):
        build("moco", "method.queue_length=7")


# --------------------------------------------------------------------------------------------------------------- MoCo v3


@pytest.mark.parametrize("freeze", [None, True, False])
def test_patch_projection(freeze: bool | None) -> None:
    """Frozen in ViTs unless told otherwise."""
    options = [] if freeze is None else [f"method.freeze_patch_projection={str(freeze).lower()}"]
    method, views, s = build("mocov3", *options)
    projection = method.student.backbone.model.patch_embed.proj
    assert {p.requires_grad for p in projection.parameters()} == {freeze is False}
    method(views, s)["loss"].backward()
    assert (projection.weight.grad is None) == (freeze is not False)
    if freeze:
        with pytest.raises(UserError, match="resnet10t has no projection of patches"):
            build("mocov3", *options, backbone=RESNET)


# ------------------------------------------------------------------------------------------------------------------ SwAV


def test_swav_schedules() -> None:
    """The queue is used as soon as it would be full, had it been begun at queue_start."""
    config = methods.complete(tiny_config("swav", "method.queue_start=1 epochs", "method.freeze_prototypes=1 epochs"))
    found = [values("swav", config, step) for step in range(9)]
    first = 5 + math.ceil(12 / 8)  # 40 images
    assert [s["queue"] for s in found] == [float(step >= first) for step in range(9)]
    assert [s["freeze_prototypes"] for s in found] == [float(step < 5) for step in range(9)]
    none = methods.complete(tiny_config("swav", "method.queue_length=0"))
    method = methods.create(none)
    assert "queue" not in method.state_dict() and values("swav", none, 9)["queue"] == 0


def test_swav_prototypes() -> None:
    """Of length 1 from the start and after each step that counts; no gradient while they are frozen."""
    method, views, s = build("swav")
    weight = method.student.head.prototypes.weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(24))
    method(views, {**s, "freeze_prototypes": 1.0})["loss"].backward()
    assert weight.grad is None
    method(views, s)["loss"].backward()
    assert weight.grad is not None
    with torch.no_grad():
        weight.mul_(3)
    method.after_step(s, torch.zeros(()))
    torch.testing.assert_close(weight.norm(dim=1), torch.full((24,), 3.0))
    method.after_step(s, torch.ones(()))
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(24))


def test_swav_codes_use_the_queue() -> None:
    """Codes of a batch depend on the queue where it is used, and rows still sum to 1."""
    method, views, s = build("swav")
    for _ in range(2):
        method(views, s)
        method.after_step(s, torch.ones(()))
    scores = torch.randn(2, SIZE, 24, generator=torch.Generator().manual_seed(0))
    without, with_queue = method.assign(scores, False), method.assign(scores, True)
    assert without.shape == with_queue.shape == (2, SIZE, 24) and not torch.allclose(without, with_queue)
    for codes in (without, with_queue):
        torch.testing.assert_close(codes.sum(-1), torch.ones(2, SIZE))
