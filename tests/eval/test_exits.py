"""`selfsup eval exits`: accuracy, operations and parameters of every exit of a real run, as a table and a picture."""

import json
from pathlib import Path

import pytest
import timm
import torch
from matplotlib.image import imread

import selfsup
from selfsup.config import load
from selfsup.errors import UserError
from selfsup.eval import exits
from selfsup.exits import export_target
from selfsup.methods.load import load_classifiers
from tests.methods.tiny import TINY_RUN, tiny_config, write_images

CONV = ["backbone=resnet10t", "backbone.channels=[8,16,16,32]", "backbone.stem_width=8"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exits")
    train, val = (write_images(folder / name, 40, seed=seed, classes=4) for seed, name in enumerate(("train", "val")))
    common = [option for option in TINY_RUN if not option.startswith("backbone")]
    options = [*common, *CONV, "method=byot", f"data={train}", f"data.val={val}", "steps=3"]
    selfsup.train(load(None, options), out=folder / "run", quiet=True)
    return folder / "run"


def test_result(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = exits.run(str(run), ["workers=0", "batch_size=16"], open_run=load_classifiers)
    stored = json.loads((run / "eval" / "exits.json").read_text())
    assert stored == json.loads(json.dumps(result))
    rows = {row["exit"]: row for row in stored["settings"]}
    assert [row["exit"] for row in stored["settings"]] == ["exit1", "exit2", "exit3", "exit4", "ensemble"]
    for less, more in (("exit1", "exit2"), ("exit2", "exit3"), ("exit4", "ensemble")):
        assert rows[less]["flops"] < rows[more]["flops"] and rows[less]["parameters"] < rows[more]["parameters"]
    assert stored["metrics"] == {"top1": rows["exit4"]["top1"]} and stored["protocol"]["val_images"] == 40
    assert imread(stored["picture"]).std() > 0.01 and Path(stored["picture"]) == run / "eval" / "exits.png"
    said = capsys.readouterr().out
    assert "exit1" in said and "ensemble" in said


def test_top1_is_that_of_the_classifiers(run: Path) -> None:
    """By hand: the val images as the training had them, in the middle."""
    from selfsup.data.eval_transform import eval_batches
    from selfsup.data.sources import open_source

    result = exits.run(str(run), ["workers=0"], open_run=load_classifiers)
    trained = load_classifiers(run)
    source = open_source(trained.config.data.val, channels=3, config=trained.config.data)
    batches = eval_batches(
        source, size=32, resize=32, mean=trained.config.mean, std=trained.config.std, batch_size=40, workers=0
    )
    ((x, labels, _),) = list(batches)
    for row in result["settings"]:
        with torch.no_grad():
            found = trained.classifiers[row["exit"]](x).argmax(-1)
        assert row["top1"] == pytest.approx((found == labels).double().mean().item())


@torch.no_grad()
def test_export_of_one_exit(run: Path, tmp_path: Path) -> None:
    """`selfsup export RUN@exit2`: bit for bit the run's exit, without what is behind it; the deepest as timm's own model."""
    trained = load_classifiers(run)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    said = export_target(str(run), "exit2", tmp_path / "exit2", "timm")
    assert "largest difference to ours 0" in said
    alone = selfsup.load_exit(tmp_path / "exit2")
    assert torch.equal(alone(x), trained.classifiers["exit2"](x))
    assert json.loads((tmp_path / "exit2" / "config.json").read_text())["selfsup_exit"]["label_names"][0] == "class_0"
    assert not [key for key in alone.state_dict() if "layer3" in key or "layer4" in key]
    export_target(str(run), "exit4", tmp_path / "exit4", "timm")
    whole = timm.create_model(f"local-dir:{tmp_path / 'exit4'}", pretrained=True).eval()
    assert torch.equal(whole(x), trained.classifiers["exit4"](x))
    with pytest.raises(UserError, match="use --format onnx"):
        export_target(str(run), "ensemble", tmp_path / "all", "timm")
    with pytest.raises(UserError, match=r"did you mean exit4.*known: student, teacher, exit4, exit1"):
        export_target(str(run), "exit5", tmp_path / "none", "timm")


def test_cost_counts_what_an_exit_computes() -> None:
    """A convolution and a linear layer, by hand."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.append(torch.nn.Linear(5, 7))
    flops, parameters = exits.cost(model, (1, 3, 8, 8))
    assert flops == 2 * (8 * 8 * 5 * 3 * 9) + 2 * 5 * 7
    assert parameters == 5 * 3 * 9 + 5 + 5 * 7 + 7


def test_runs_without_exits_are_refused(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 16, classes=2)
    options = [f"data={images}", f"data.val={images}", "steps=1"]
    config = tiny_config("supervised", *options, "method.ema=null", "method.consistency=0")
    selfsup.train(config, out=tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="no exits"):
        exits.run(str(tmp_path / "run"), ["workers=0"], open_run=load_classifiers)
