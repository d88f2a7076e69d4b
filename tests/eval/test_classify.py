"""Accuracy of classifiers: against sklearn and torchmetrics, class names, what is written, during training, bad input."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from selfsup import UserError, config
from selfsup.data.sources import open_source
from selfsup.eval import classify, confusion, robustness
from selfsup.eval.class_figures import Answers, calibration_error, figures, per_class
from selfsup.eval.class_names import to_training_classes
from selfsup.eval.classify import _answers
from selfsup.eval.periodic_classes import classify_callable
from selfsup.log import read_metrics
from selfsup.methods.load import load_classifiers
from tests.eval.conftest import CLASSES, unpack
from tests.eval.supervised import TINY, train

QUICK = ["workers=0", "batch_size=17"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, train_folder: Path, val_folder: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "supervised"
    return train(out, f"data={train_folder}", f"data.val={val_folder}", "method.label_smoothing=0.1")


def evaluate(target: object, *words: str, out: Path | None = None) -> dict:
    return classify.evaluate_quietly(str(target), [*QUICK, *words], out, open_run=load_classifiers)


def by_hand(run: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of bare timm's model of RUN/classifier, and labels."""
    source = open_source(str(folder), channels=1)
    model = timm.create_model(f"local-dir:{run / 'classifier'}", pretrained=True).eval()
    pixels = np.stack([np.asarray(source.read(i)).reshape(28, 28) for i in range(len(source))])
    with torch.no_grad():
        logits = model((torch.from_numpy(pixels)[:, None].float() / 255 - 0.5) / 0.25)
    return logits, torch.from_numpy(source.labels)


def test_figures_are_those_of_other_libraries() -> None:
    """Top-1, top-5, calibration, per class: random logits of 8 classes, with ties."""
    torch.manual_seed(0)
    logits, labels = torch.randn(500, 8), torch.randint(8, (500,))
    logits[torch.arange(250), labels[:250]] += 2
    answers = Answers(*_answers("x", torch.nn.Identity(), logits, labels).unbind(1))
    found = figures(answers, labels.numpy(), 8)
    p = logits.softmax(-1)
    assert found["top1"] == pytest.approx(top_k_accuracy_score(labels, p.numpy(), k=1))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, p.numpy(), k=5))
    assert found["ece"] == pytest.approx(
        MulticlassCalibrationError(8, n_bins=15, norm="l1")(p, labels).item(), abs=1e-6
    )
    rows = per_class(labels.numpy(), answers.predicted.numpy().astype(int), 9, None)
    each = MulticlassAccuracy(8, average=None)(p, labels)
    assert [row["top1"] for row in rows[:8]] == pytest.approx(each.tolist(), abs=1e-6)
    assert rows[8] == {"class": "8", "images": 0, "top1": None}
    assert "top5" not in figures(answers, labels.numpy(), 5)
    tied = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    said = _answers("x", torch.nn.Identity(), tied, torch.tensor([0, 1]))
    assert said[:, 0].tolist() == [0, 0] and said[:, 1].tolist() == [0, 1]  # the lower class wins
    with pytest.raises(UserError, match="not finite"):
        _answers("x", torch.nn.Identity(), tied * torch.nan, torch.tensor([0, 1]))


def test_calibration_by_hand() -> None:
    """Two bins: 0.55 and 0.65 sure with one right of two, 0.95 sure and right."""
    sure, right = torch.tensor([0.55, 0.65, 0.95]), torch.tensor([True, False, True])
    assert calibration_error(sure, right, 5) == pytest.approx((abs(1 - 0.55) + abs(0 - 0.65) + abs(1 - 0.95)) / 3)
    assert calibration_error(sure, right, 1) == pytest.approx(abs(2 / 3 - 2.15 / 3))


def test_sigmoid_confidence() -> None:
    module = torch.nn.Identity()
    module.activation = "sigmoid"
    said = _answers("x", module, torch.tensor([[2.0, 1.0]]), torch.tensor([0]))
    assert said[0, 2].item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item())


def test_a_run_against_bare_timm(run: Path, val_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both classifiers, the averaged first; figures, per class, confusions, protocol; what is printed and drawn."""
    result = classify.run(str(run), QUICK, None, open_run=load_classifiers)
    stored = json.loads((run / "eval" / "classify.json").read_text())
    assert stored == json.loads(json.dumps(result))
    logits, labels = by_hand(run, val_folder)
    p, predicted = logits.softmax(-1), logits.argmax(-1)
    top1 = (predicted == labels).float().mean().item()
    assert top1 > 0.5  # it has learned something
    assert stored["metrics"]["top1"] == pytest.approx(top1)
    assert stored["metrics"]["ece"] == pytest.approx(
        MulticlassCalibrationError(4, n_bins=15)(p, labels).item(), abs=1e-6
    )
    assert [row["classifier"] for row in stored["settings"]] == ["ema", "head"]
    counts = confusion_matrix(labels, predicted)
    assert [row["top1"] for row in stored["per_class"]] == pytest.approx((counts.diagonal() / counts.sum(1)).tolist())
    assert [row["class"] for row in stored["per_class"]] == ["trouser", "sandal", "bag", "ankle-boot"]
    assert sum(c["count"] for c in stored["confusions"]) == counts.sum() - counts.trace()
    protocol = stored["protocol"]
    keys = "val val_images val_fingerprint classes classifier calibration transform resolution precision versions"
    for key in keys.split():
        assert protocol.get(key) is not None, key
    assert (
        protocol["val"] == str(val_folder) and protocol["val_images"] == 60 and protocol["classes_matched"] == "by name"
    )
    assert stored["target"]["step"] == 60 and len(stored["target"]["checkpoint_hash"]) == 64
    assert Image.open(stored["picture"]).size[0] > 300
    text = capsys.readouterr().out
    assert "ema" in text and "head" in text and f"{100 * top1:.1f}" in text and "most confused" in text


def test_other_targets(run: Path, val_folder: Path, tmp_path: Path) -> None:
    """A checkpoint, the exported folder, and a copy of it anywhere give the figures of the run."""
    whole = evaluate(run)["metrics"]
    assert evaluate(run / "checkpoints" / "step_00000060")["metrics"] == whole
    assert (run / "eval" / "classify_checkpoint.json").is_file()
    assert evaluate(run / "classifier")["metrics"] == whole
    copy = shutil.copytree(run / "classifier", tmp_path / "copy")
    result = evaluate(copy, f"data={val_folder}", out=tmp_path / "out.json")
    assert result["metrics"] == whole and "run" not in result["target"]
    assert (tmp_path / "out.json").is_file() and (tmp_path / "out.png").is_file()
    with pytest.raises(UserError, match="no val images; give eval"):
        evaluate(copy)


def test_classes_go_by_name(run: Path, tmp_path: Path) -> None:
    """A val folder with fewer classes, which therefore are numbered otherwise."""
    few = unpack(tmp_path / "few", 15, start=100, classes=CLASSES[2:])
    found = evaluate(run, f"data={few}")
    whole = {row["class"]: row["top1"] for row in evaluate(run)["per_class"]}
    assert {row["class"]: row["top1"] for row in found["per_class"] if row["images"]} == {
        k: whole[k] for k in ("bag", "ankle-boot")
    }
    assert found["protocol"]["val_classes_without_images"] == 2
    assert len(evaluate(run, f"data={few}", "max_val=10")["per_class"]) == 4
    moved = to_training_classes(np.array([1, 0, -1]), ["b", "c"], ["a", "b", "c"], 3, "val")
    assert moved.tolist() == [2, 1, -1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=UNKNOWN"], r"2 of its 3 classes are unknown to training \(2_pullover, 6_shirt\); known: 1_trouser"),
        (["data=FLAT"], "its 10 images have no labels"),
        (["data=/nowhere"], "no such folder"),
        (["eval.val=FLAT", "data.val=FLAT"], "data.val or eval.val, not both"),
        (["bins=0"], "bins"),
        (["k=3"], "unknown key 'k'"),
        (["size=30"], "not a multiple of the patch"),
    ],
)
def test_bad_words(run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    places = {
        "UNKNOWN": unpack(tmp_path / "unknown", 5, classes=("2_pullover", "6_shirt", CLASSES[0])),
        "FLAT": flat(tmp_path),
    }
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    with pytest.raises(UserError, match=message) as caught:
        evaluate(run, *words)
    assert len(str(caught.value).splitlines()) <= 2


def flat(folder: Path) -> Path:
    where = folder / "flat"
    where.mkdir()
    for path in unpack(folder / "one", 10, classes=CLASSES[:1]).rglob("*.png"):
        shutil.copy(path, where)
    return where


def test_what_tells_no_classes(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    dino = Path(request.getfixturevalue("dino_run"))
    with pytest.raises(UserError, match="method=dino has no classifier; use selfsup eval linear"):
        evaluate(dino)
    with pytest.raises(UserError, match="a backbone without a classifier; use selfsup eval linear"):
        evaluate(dino / "backbone")
    with pytest.raises(UserError, match="not a run folder"):
        evaluate(tmp_path)


@pytest.fixture
def dino_run(tmp_path_factory: pytest.TempPathFactory, train_folder: Path) -> Path:
    import importlib

    from tests.eval.conftest import RUN

    out = tmp_path_factory.mktemp("runs") / "dino"
    settings = config.load(None, [*RUN, "steps=1", f"data={train_folder}"])
    importlib.import_module("selfsup.train").train(settings, out=out, quiet=True)
    return out


def test_confusions_of_many_classes(tmp_path: Path) -> None:
    """The worst ones are listed in order; a matrix of at most 100 classes is drawn."""
    labels = np.array([0, 0, 0, 0, 1, 1, 250])
    predicted = np.array([1, 1, 1, 0, 0, 1, 9])
    found = confusion.worst(labels, predicted, None, count=2)
    assert found == [
        {"true": "0", "predicted": "1", "count": 3, "share": 0.75},
        {"true": "1", "predicted": "0", "count": 1, "share": 0.5},
    ]
    counts = confusion.matrix(labels[:6], predicted[:6], 2)
    assert counts.tolist() == confusion_matrix(labels[:6], predicted[:6]).tolist()
    for name, n in (("small.png", 2), ("large.png", 60)):
        drawn = confusion.draw(np.eye(n, dtype=int), None, "title", tmp_path / name)
        assert Image.open(drawn).size[0] > 300
    same = confusion.draw(np.eye(2, dtype=int), None, "title", tmp_path / "again.png")
    assert same.read_bytes() == (tmp_path / "small.png").read_bytes()


def test_during_training(run: Path, tmp_path: Path, train_folder: Path, val_folder: Path) -> None:
    """Figures at eval.every are those of the verb, and change nothing in the training; without a val set there are none."""
    words = [f"data={train_folder}", "method.label_smoothing=0.1"]
    settings = config.load(None, [*TINY, *words, f"eval.val={val_folder}", "eval.every=30"])
    found = classify_callable(settings, tmp_path / "run")
    assert found is not None
    train(tmp_path / "run", *words, f"eval.val={val_folder}", "eval.every=30", classify=found)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shown = {line["step"]: line["eval"] for line in lines if "eval" in line}
    assert list(shown) == [30, 60] and all({"top1", "top1_head"} == found.keys() for found in shown.values())
    rows = {row["classifier"]: row["top1"] for row in evaluate(run)["settings"]}
    assert (shown[60]["top1"], shown[60]["top1_head"]) == (rows["ema"], rows["head"])
    plain = read_metrics(run / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [line["loss"] for line in plain]
    assert classify_callable(config.load(None, [*TINY, *words, "eval.every=30"]), tmp_path) is None
    unknown = unpack(tmp_path / "unknown", 5, classes=("2_pullover", "6_shirt"))
    with pytest.raises(UserError, match="unknown to training"):  # before the first step
        classify_callable(config.load(None, [*TINY, *words, f"eval.val={unknown}", "eval.every=30"]), tmp_path)


@pytest.mark.parametrize("val", [True, False])
def test_training_ends_with_a_table(
    val: bool,
    tmp_path: Path,
    train_folder: Path,
    val_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """`selfsup train` prints it where a val set is known; `selfsup eval classify` takes the run."""
    from selfsup.cli import main

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.dump(config.load(None, [*TINY, f"data={train_folder}", "steps=2", "eval.every=2"])))
    words = [f"eval.val={val_folder}"] if val else []
    monkeypatch.setattr(sys, "argv", ["selfsup", "train", str(recipe), *words, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capfd.readouterr()
    assert not caught.value.code, err
    assert ("classify top1" in out) is val and ("no top-1 during training: no val images" in err) is not val
    assert (tmp_path / "run" / "eval" / "classify.json").is_file() is val


def test_calibration_under_corruptions(run: Path, val_folder: Path, tmp_path: Path) -> None:
    """Clean figures are those of classify; strong noise costs accuracy; a backbone alone tells no classes."""
    out = tmp_path / "robust.json"
    words = [*QUICK, "by=classifier", "corruptions=gaussian_noise", f"data.val={val_folder}"]
    found = robustness.run(str(run), words, out, open_run=load_classifiers)
    clean = evaluate(run, f"data.val={val_folder}", out=tmp_path / "clean.json")
    rows = {row["strength"]: row for row in found["settings"]}
    for key in ("top1", "ece"):
        assert found["metrics"][key] == clean["metrics"][key] == rows["none"][key]
        assert found["metrics"][f"{key}_strong"] == rows["strong"][key]
    assert rows["strong"]["top1"] < rows["none"]["top1"] and 0 <= rows["strong"]["ece"] <= 1
    assert found["protocol"]["classifier"] == clean["protocol"]["classifier"] and (tmp_path / "robust.png").is_file()
    with pytest.raises(UserError, match="without a classifier"):
        robustness.run(str(run / "backbone"), words, out, open_run=load_classifiers)
