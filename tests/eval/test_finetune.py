"""Fine-tuning from end to end: a tiny run of DINO, the trainer itself, and accuracy on images that were held out."""

import json
from pathlib import Path

import numpy as np
import pytest

from selfsup import UserError, config
from selfsup.eval import finetune, settings
from selfsup.methods.load import load_classifiers
from selfsup.train import train as trainer
from tests.eval.conftest import CLASSES, unpack

QUICK = ["workers=0", "steps=3", "global_batch=16", "threads=1", "tensorboard=false", "batch_size=32"]


def begin(settings_: config.Config, folder: Path, images: object) -> None:
    """As the command line hands it in, without the progress."""
    trainer(settings_, out=folder, resume=True, dataset=images, quiet=True)


def run_it(target: object, *words: str, out: Path | None = None) -> dict:
    return finetune.evaluate_quietly(str(target), [*QUICK, *words], out, train=begin, open_run=load_classifiers)


def test_from_a_run(run: Path, train_folder: Path, val_folder: Path) -> None:
    """Result, protocol and the fine-tuned run; the same command again evaluates it, other keys get another folder."""
    words = (f"eval.train={train_folder}", f"eval.val={val_folder}", "lr=0.01", "layer_decay=0.9", "steps=60")
    result = run_it(run, *words)
    stored = json.loads((run / "eval" / "finetune.json").read_text())
    assert stored == json.loads(json.dumps(result)) and stored["task"] == "finetune"
    assert stored["metrics"]["top1"] > 0.3 and {"top1", "ece"} <= stored["metrics"].keys()
    protocol = stored["protocol"]
    assert protocol["split"] == "as given" and protocol["val_images"] == 60 and protocol["train_images"] == 160
    trained = protocol["training"]
    assert trained["method"]["name"] == "supervised" and trained["method"]["label_smoothing"] == 0.1
    assert trained["optimizer"]["lr"] == 0.01 and trained["optimizer"]["layer_decay"] == 0.9
    assert trained["steps"] == 60 and trained["epochs"] is None and trained["views"]["local"]["count"] == 0
    assert trained["init_from"]["path"] == str(run) and trained["views"]["global"]["size"] == 28
    assert trained["data"]["mean"] == [0.5] and trained["backbone"]["embed_dim"] == 24
    assert Path(stored["picture"]).is_file() and len(stored["per_class"]) == len(CLASSES)
    folder = Path(protocol["fine_tuned"])
    assert folder == run / "eval" / "finetune" and (folder / "classifier" / "config.json").is_file()
    before = (folder / "metrics.jsonl").read_text()
    again = run_it(run, *words)
    assert again["metrics"] == stored["metrics"] and (folder / "metrics.jsonl").read_text() == before
    other = run_it(run, *words, "steps=2")
    assert other["protocol"]["fine_tuned"] == f"{folder}-2"


def test_a_split_and_other_targets(run: Path, train_folder: Path, tmp_path: Path) -> None:
    """Without a val set: 80/20, held out from the training; an exported backbone needs --out; a random one is a baseline."""
    out = tmp_path / "result.json"
    result = run_it(run / "backbone", f"data={train_folder}", "max_train=64", "val_fraction=0.25", out=out)
    protocol = result["protocol"]
    assert protocol["split"].startswith("seeded stratified 75/25") and protocol["train_images"] == 64
    assert protocol["fine_tuned"] == str(tmp_path / "result") and out.is_file() and (tmp_path / "result.png").is_file()
    assert protocol["training"]["global_batch"] == 16 and protocol["trained_on"] == "64 images, 3 steps of 16"
    with pytest.raises(UserError, match="belongs to no run: name a file with --out"):
        run_it(run / "backbone", f"data={train_folder}")
    baseline = run_it(f"random:{run}", f"data={train_folder}", out=tmp_path / "random.json")
    assert baseline["protocol"]["training"]["init_from"]["path"] is None
    student = run_it(f"{run}@student", f"data={train_folder}", out=tmp_path / "student.json")
    assert student["protocol"]["training"]["init_from"]["path"] == f"{run}@student"


def test_what_is_trained_on(run: Path, train_folder: Path) -> None:
    """The images that are given to the trainer are those of the split, in the numbering of the classes; none is in val."""
    from selfsup.eval.datasets import open_pair
    from selfsup.eval.targets import open_target

    words = settings.resolve("finetune", [f"data={train_folder}"])
    pair = open_pair(open_target(str(run)), finetune._split_settings(words))
    images = finetune.Training(pair)
    assert images.classes == sorted(CLASSES) and (images.labels == pair.train_labels).all()
    names = {images.name(i) for i in range(len(images))}
    assert len(names) == 128 and not names & {pair.val.source.name(int(i)) for i in pair.val.indices}
    assert set(np.unique(images.labels)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=FLAT"], "have no labels"),
        (["eval.train=TRAIN", "eval.val=MORE"], r"1 of its classes have no training image \(2_pullover"),
        (["data=TRAIN", "epoch=3"], "unknown key 'epoch'; did you mean epochs"),
        (["data=TRAIN", "init_from=elsewhere"], "it starts from the target"),
        (["data=TRAIN", "backbone=resnet18"], "it is the target's"),
        (["data=TRAIN", "label_smoothing=2"], "label_smoothing"),
        (["data=TRAIN", "global_batch=500"], "fewer than global_batch=500"),
    ],
)
def test_bad_words(run: Path, train_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    flat = unpack(tmp_path / "one", 3, classes=CLASSES[:1]) / CLASSES[0]
    more = unpack(tmp_path / "more", 3, classes=(*CLASSES, "2_pullover"))
    places = {"FLAT": flat, "TRAIN": train_folder, "MORE": more}
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    with pytest.raises(UserError, match=message) as caught:
        run_it(run, *words, out=tmp_path / "out.json")
    assert len(str(caught.value).splitlines()) <= 2


def test_pixels_have_no_weights(train_folder: Path) -> None:
    with pytest.raises(UserError, match="pixels have no weights"):
        run_it("pixels", f"data={train_folder}")


def test_keys() -> None:
    """Short keys, training keys and those of the evaluation."""
    found = settings.resolve("finetune", ["lr=0.1", "size=32", "epochs=2", "drop_path=0.2", "max_val=9", "mix=ricap"])
    assert isinstance(found, settings.FinetuneSettings)
    assert (found.size, found.max_val) == (32, 9)
    assert found.training["optimizer"]["lr"] == 0.1 and found.training["epochs"] == 2
    assert found.training["backbone"] == {"drop_path_rate": 0.2} and found.training["mix"] == {"name": "ricap"}
    assert found.training["optimizer"]["layer_decay"] == 0.75  # of the recipe
    assert "epochs" not in settings.resolve("finetune", ["steps=5"]).training
