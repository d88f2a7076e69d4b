"""init_from: from a run, from a published checkpoint's layout, with fresh or loaded heads, and heads trained alone at first."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import selfsup
from selfsup import UserError, methods
from selfsup.initialise import initialise
from tests.methods.tiny import tiny_config, write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps with a teacher that moves, so that student and teacher differ."""
    out = tmp_path_factory.mktemp("runs") / "first"
    config = tiny_config("dino", f"data={images}", "precision=fp32", "method.momentum=0.9", "optimizer.lr=0.01")
    selfsup.train(config, out=out, quiet=True)
    return out


def start(images: Path, *overrides: str):
    """A method as training would start it, other seed."""
    config = methods.complete(tiny_config("dino", f"data={images}", "precision=fp32", "seed=5", *overrides))
    method = methods.create(config)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    initialise(method, config)
    return before, method.state_dict()


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step_00000010" / "model.safetensors")


def test_fresh_heads(images: Path, run: Path) -> None:
    """Both roles start from the teacher; both keep their own (equal, new) heads."""
    before, after = start(images, f"init_from={run}")
    trained = newest(run)
    for key, value in after.items():
        if ".backbone." in key:
            assert torch.equal(value, trained[key.replace("student.", "teacher.", 1)]), key
        elif ".head." in key:
            assert torch.equal(value, before[key]), key


def test_loaded_heads(images: Path, run: Path) -> None:
    """Each role goes on with its own backbone and head."""
    _, after = start(images, f"init_from={run}", "init_from.heads=load")
    trained = newest(run)
    assert not torch.equal(trained["student.head.mlp.0.weight"], trained["teacher.head.mlp.0.weight"])
    for key, value in after.items():
        if key.startswith(("student.", "teacher.")):
            assert torch.equal(value, trained[key]), key


@pytest.mark.systems("Published checkpoints of dino, dinov2, timm: `load_backbone`, `init_from=`")
def test_published_layout(images: Path, run: Path, tmp_path: Path) -> None:
    """A file as dino's training writes it: {'student': module.backbone.*, module.head.*; 'teacher': backbone.*, head.*}."""
    trained = newest(run)
    published = {
        "student": {
            k.replace("student.backbone.model.", "module.backbone.").replace("student.head.", "module.head."): v
            for k, v in trained.items()
            if k.startswith("student.")
        },
        "teacher": {
            k.removeprefix("teacher.").replace("backbone.model.", "backbone."): v
            for k, v in trained.items()
            if k.startswith("teacher.")
        },
        "epoch": 100,
    }
    torch.save(published, tmp_path / "checkpoint.pth")
    _, after = start(images, f"init_from={tmp_path / 'checkpoint.pth'}", "init_from.heads=load")
    for key, value in after.items():
        if key.startswith(("student.", "teacher.")):
            assert torch.equal(value, trained[key]), key


def test_heads_alone_at_first(images: Path, run: Path, tmp_path: Path) -> None:
    """The backbone keeps its weights bit for bit for head_only, while the head learns; then both move."""
    config = tiny_config(
        "dino",
        f"data={images}",
        "precision=fp32",
        f"init_from={run}",
        "init_from.head_only=5 steps",
        "checkpoint.every=5",
    )
    config = config.model_copy(update={"method": config.method.model_copy(update={"freeze_last_layer": "0 steps"})})
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    start_, middle, end = (
        newest(run),
        *(load_file(tmp_path / "run" / "checkpoints" / f"step_{n:08d}" / "model.safetensors") for n in (5, 10)),
    )
    for key in (k for k in middle if k.startswith("student.backbone.")):
        assert torch.equal(middle[key], start_[key.replace("student.", "teacher.", 1)]), key
    head = "student.head.mlp.0.weight"
    assert not torch.equal(end[head], middle[head])
    moved = [k for k in middle if k.startswith("student.backbone.") and not torch.equal(end[k], middle[k])]
    assert moved


@pytest.mark.parametrize("channels", [1, 4, 13])
def test_another_number_of_channels(images: Path, run: Path, channels: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Colour weights start a network for 1, 4 or 13 channels, a grey one giving what it gave in colour; it is said."""
    grey = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    config = methods.complete(
        tiny_config("dino", f"data={images}", "precision=fp32", f"backbone.in_chans={channels}", f"init_from={run}")
    )
    method = methods.create(config).eval()
    initialise(method, config)
    assert (
        f"is for 3 channels: {'summed' if channels == 1 else f'repeated and scaled by 3/{channels}'}"
        in capsys.readouterr().err
    )
    colour = selfsup.load_backbone(run)
    with torch.no_grad():
        before = colour(grey.expand(-1, 3, -1, -1)).pooled
        after = method.backbones()["student"](grey.expand(-1, channels, -1, -1)).pooled
    if channels == 1:
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    kernel = method.state_dict()["student.backbone.model.patch_embed.proj.weight"]
    old = colour.model.state_dict()["patch_embed.proj.weight"]
    for c in range(channels):
        expected = old.sum(1) if channels == 1 else old[:, c % 3] * 3 / channels
        torch.testing.assert_close(kernel[:, c], expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=/nowhere"], "no such file or folder"),
        (["init_from=RUN", "init_from.heads=load", "method.out_dim=32"], "its head does not fit"),
        (["init_from=RUN", "backbone.embed_dim=64"], "tensors match"),
        (["init_from.head_only=5 steps"], "needs init_from"),
    ],
)
def test_what_does_not_fit_is_refused(images: Path, run: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        start(images, *(o.replace("RUN", str(run)) for o in overrides))
