"""DeiT: two heads, averaged as timm averages them."""

from pathlib import Path

import pytest
import timm
import torch

import selfsup
from selfsup import UserError, methods
from selfsup.config import load
from selfsup.methods.load import load_classifiers
from selfsup.methods.outputs import Wanted
from selfsup.methods.teacher_sources import open_teacher
from tests.methods.tiny import ONE_VIEW, TINY_RUN, tiny_config, write_images


def made(*overrides: str):
    return methods.create(methods.complete(tiny_config("deit", "data.classes=4", *overrides)))


def test_average_is_timms(tmp_path: Path) -> None:
    """timm's own distilled model with these weights gives the same logits bit for bit; 'cls' and 'dist' are its two."""
    config = tiny_config("deit", "data.classes=4")
    method = made().eval()
    found = method.classifiers()
    assert list(found) == ["average", "cls", "dist"]
    net = method.teacher
    model = timm.create_model(config.backbone.name, num_classes=4, **config.backbone.options).eval()
    heads = {k: v for k, v in net.state_dict().items() if k.startswith("head")}
    model.load_state_dict({**net.backbone.model.state_dict(), **heads})
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found["average"](x), model(x))
        model.set_distilled_training(True)
        cls, dist = model.train()(x)
        assert torch.equal(found["cls"](x), cls) and torch.equal(found["dist"](x), dist)
    assert not torch.equal(cls, dist)


def test_without_averaged_weights_the_student_is_evaluated() -> None:
    method = methods.create(methods.complete(tiny_config("deit", "data.classes=4", "method.ema=null")))
    assert method.teacher is None and method.classifiers()["average"] is method.student
    assert list(method.backbones()) == ["student"] and method.schedules(None) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["backbone=vit_tiny_patch16_224"], "backbone.name=vit_tiny_patch16_224: has no distillation token"),
        (["data.classes=7"], "tells 4 classes, the data have 7"),
        (["mix=mixup", "teacher.cache=x"], "mix=mixup with teacher.cache=x"),
        (["method.students=[]"], "unknown key 'method.students'"),
        (["method.distillation=firm"], "method.distillation='firm'"),
    ],
)
def test_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        made(*overrides)
    assert message in str(caught.value)


def test_no_teacher() -> None:
    config = load(
        None, [*TINY_RUN, *ONE_VIEW, "method=deit", "backbone=deit_tiny_distilled_patch16_224", "data.classes=4"]
    )
    with pytest.raises(UserError, match="method=deit learns from a teacher and there is none"):
        methods.create(methods.complete(config))


def test_exported_as_timms(tmp_path: Path) -> None:
    """RUN/classifier: bare timm's distilled model, head and head_dist, gives our average bit for bit; and it can teach."""
    images = write_images(tmp_path / "images", classes=4)
    run = tmp_path / "run"
    selfsup.train(tiny_config("deit", f"data={images}", "precision=fp32", "steps=2"), out=run, quiet=True)
    bare = timm.create_model(f"local-dir:{run / 'classifier'}", pretrained=True).eval()
    assert bare.head_dist.weight.shape == (4, 32)
    trained = load_classifiers(run)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(trained.classifiers["average"](x), bare(x))
    config = load(None, [*TINY_RUN, *ONE_VIEW, "method=distill", f"teacher={run}"])
    taught = open_teacher(config)(x, Wanted(logits=True)).logits
    with torch.no_grad():
        assert torch.equal(taught, bare(x))
