"""k-NN and linear probe from end to end: figures, protocol, baselines, bad input; k-NN during training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from selfsup import config
from selfsup.errors import UserError
from selfsup.eval import knn, linear
from selfsup.eval.periodic import knn_callable
from selfsup.eval.targets import open_target

QUICK = ["workers=0", "epochs=10", "batch=32"]


def test_pixels_of_the_demo_set():
    """The known figure of weighted k-NN on raw pixels: 82.9 %, +- one image in two thousand for another BLAS."""
    result = knn.evaluate_quietly("pixels", ["data=demo", "k=20", "temperature=0.07", "workers=0"])
    assert result["metrics"]["top1"] == pytest.approx(0.829, abs=0.00051)
    assert result["protocol"]["bank_images"] == 10_000 and result["protocol"]["val_images"] == 2_000
    low, high = result["protocol"]["top1_interval_95"]
    assert low < 0.829 < high and high - low < 0.04


def test_knn_result_and_its_protocol(run: Path, capsys):
    result = knn.run(str(run), ["workers=0", "k=20,5,500"])
    stored = json.loads((run / "eval" / "knn.json").read_text())
    assert stored == json.loads(json.dumps(result))
    protocol = stored["protocol"]
    keys = "k temperature pooling layer transform resolution precision split seed versions vote search train val "
    keys += "train_images val_images train_fingerprint val_fingerprint classes"
    for key in keys.split():
        assert protocol.get(key) is not None, key
    assert protocol["transform"]["size"] == 28 and protocol["versions"]["torch"] and protocol["k"] == 20
    assert len(stored["target"]["checkpoint_hash"]) == 64
    assert [s["k"] for s in stored["settings"]] == [20, 5, 500]
    assert stored["metrics"]["top1"] == stored["settings"][0]["top1"] > 0.5
    assert "k=500 clipped" in protocol["note"]
    text = capsys.readouterr().out
    assert "knn.json" in text and "clipped" in text and f"{100 * stored['metrics']['top1']:.1f}" in text


def test_knn_equals_the_vote_on_the_features(run: Path):
    """End to end against a plain computation with the backbone and DINO's formula."""
    result = knn.evaluate_quietly(str(run), ["workers=0", "k=10", "temperature=0.1"])
    target = open_target(str(run), device="cpu")
    from selfsup.eval.datasets import open_pair
    from selfsup.eval.settings import resolve

    pair = open_pair(target, resolve("knn", []))
    sides = []
    for images in (pair.train, pair.val):
        pixels = np.stack([np.asarray(images.source.read(int(i))) for i in images.indices])
        x = (torch.from_numpy(pixels)[:, None].float() / 255 - target.backbone.mean[0]) / target.backbone.std[0]
        with torch.no_grad():
            sides.append(torch.nn.functional.normalize(target.backbone(x).pooled))
    similarity, index = (sides[1] @ sides[0].T).topk(10)
    votes = torch.zeros(60, 4).scatter_add_(1, torch.from_numpy(pair.train_labels)[index], (similarity / 0.1).exp())
    expected = (votes.argmax(1).numpy() == pair.val_labels).mean()
    assert result["metrics"]["top1"] == pytest.approx(expected, abs=1.01 / 60)


def test_files_of_roles_do_not_overwrite_each_other(run: Path):
    for target, name in ((f"{run}@student", "knn_student.json"), (f"random:{run}", "knn_random.json")):
        knn.evaluate_quietly(target, ["workers=0", "k=5"])
        assert json.loads((run / "eval" / name).read_text())["target"]["name"] == target


def test_out_wins(run: Path, tmp_path: Path, train_folder: Path):
    before = (run / "eval" / "knn.json").read_bytes() if (run / "eval" / "knn.json").exists() else None
    result = knn.evaluate_quietly(str(run), ["workers=0", f"data={train_folder}"], tmp_path / "f.json")
    assert json.loads((tmp_path / "f.json").read_text())["metrics"] == result["metrics"]
    assert "80/20" in result["protocol"]["split"]
    after = (run / "eval" / "knn.json").read_bytes() if (run / "eval" / "knn.json").exists() else None
    assert before == after


def test_linear_grid_is_chosen_on_train_and_reported_once(run: Path):
    result = linear.evaluate_quietly(
        str(run), [*QUICK, "lr=0.001,0.1,1e38", "layer=-1,last2,0", "pooling=pooled,cls,patchmean"]
    )
    rows = result["settings"]
    assert len(rows) == 3 * (3 + 2 + 2)
    best = max(
        (r for r in rows if r["holdout_loss"] is not None), key=lambda r: (r["holdout_top1"], -r["holdout_loss"])
    )
    protocol = result["protocol"]
    assert (protocol["pooling"], protocol["layer"], protocol["lr"]) == (best["pooling"], best["layer"], best["lr"])
    assert all("top1" not in row for row in rows), "val is looked at by the chosen head alone"
    assert "heads diverged" in protocol["note"]
    assert "held-out 10% of train" in protocol["selected"] and "on all 160 of 160" in protocol["refit"]
    assert protocol["trained_on"] == "cached features of centre crops"
    assert result["metrics"]["top1"] > 0.6
    assert linear.evaluate_quietly(
        str(run), [*QUICK, "lr=0.001,0.1,1e38", "layer=-1,last2,0", "pooling=pooled,cls,patchmean"]
    ) == json.loads((run / "eval" / "linear.json").read_text())


def test_val_labels_do_not_influence_the_choice(run: Path, tmp_path: Path, val_folder: Path):
    """With val's classes renamed in a circle the same head is chosen and scores differently."""
    moved = tmp_path / "moved"
    names = sorted(p.name for p in val_folder.iterdir())
    for a, b in zip(names, names[1:] + names[:1]):
        (moved / b).mkdir(parents=True)
        for path in (val_folder / a).iterdir():
            (moved / b / path.name).write_bytes(path.read_bytes())
    words = [*QUICK, "lr=0.01,0.1"]
    a = linear.evaluate_quietly(str(run), words, tmp_path / "a.json")
    b = linear.evaluate_quietly(str(run), [*words, f"eval.val={moved}"], tmp_path / "b.json")
    assert a["settings"] == b["settings"] and a["protocol"]["lr"] == b["protocol"]["lr"]
    assert a["metrics"]["top1"] > 0.6 > b["metrics"]["top1"]


def test_linear_on_augmented_images(run: Path, tmp_path: Path):
    words = ["workers=0", "augment=true", "epochs=4", "batch=32", "lr=0.01,0.1"]
    result = linear.evaluate_quietly(str(run), words, tmp_path / "a.json")
    assert result["protocol"]["trained_on"].startswith("augmented images, a forward pass each epoch")
    assert result["protocol"]["refit"].startswith("no, trained on 144 of 160")
    assert result["metrics"]["top1"] > 0.35
    again = linear.evaluate_quietly(str(run), [*words[1:], "workers=2"], tmp_path / "b.json")
    assert again["settings"] == result["settings"]


def test_linear_on_pixels(train_folder: Path, val_folder: Path, tmp_path: Path):
    words = [*QUICK, f"data={train_folder}", f"data.val={val_folder}"]
    result = linear.evaluate_quietly("pixels", words, tmp_path / "p.json")
    assert result["metrics"]["top1"] > 0.85 and result["protocol"]["pooling"] == "pooled"
    augmented = linear.evaluate_quietly("pixels", [*words, "augment=true", "epochs=2"], tmp_path / "q.json")
    assert augmented["metrics"]["top1"] > 0.5
    raw = linear.evaluate_quietly("pixels", [*words, "standardize=false"], tmp_path / "r.json")
    assert raw["protocol"]["standardized"] is False and raw["metrics"]["top1"] > 0.7


def test_every_head_diverges(train_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="every probe diverged"):
        linear.evaluate_quietly("pixels", [*QUICK, f"data={train_folder}", "lr=1e37,1e38"], tmp_path / "x.json")


def test_tiny_labelled_sets(run: Path, tmp_path: Path, train_folder: Path):
    """Two images a class: one in train, one in val."""
    for folder in sorted(train_folder.iterdir()):
        (tmp_path / "d" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:2]:
            (tmp_path / "d" / folder.name / path.name).write_bytes(path.read_bytes())
    words = ["workers=0", f"data={tmp_path / 'd'}"]
    result = knn.evaluate_quietly(str(run), words, tmp_path / "k.json")
    assert result["protocol"]["bank_images"] == 4 and result["settings"][0]["k_used"] == 4
    with pytest.raises(UserError, match="cannot be split"):  # nothing left to hold out
        linear.evaluate_quietly(str(run), [*words, "epochs=1"], tmp_path / "l.json")


def test_unreadable_images_are_counted(run: Path, tmp_path: Path, val_folder: Path):
    broken = shutil.copytree(val_folder, tmp_path / "val")
    next(broken.rglob("*.png")).write_bytes(b"<html>")
    for verb in (knn, linear):
        words = ["workers=0", f"eval.val={broken}", *(["epochs=1"] if verb is linear else [])]
        result = verb.evaluate_quietly(str(run), words, tmp_path / "x.json")
        assert result["protocol"]["unreadable_left_out"] == {"train": 0, "val": 1}
    assert 0 <= result["metrics"]["top1"] <= 1


def test_bad_input(run: Path, tmp_path: Path):
    for verb, target, words, message in [
        (knn, str(run), ["kk=3"], "unknown key 'kk'"),
        (knn, str(tmp_path / "no"), [], "no such file"),
        (knn, str(run), [f"data={tmp_path / 'no'}"], "no such folder"),
        (knn, "pixels", [], "no data"),
        (linear, str(run), ["pooling=pooled", "layer=0"], "backbone's own output"),
        (linear, "pixels", ["data=demo", "pooling=cls"], "raw pixels"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            verb.evaluate_quietly(target, ["workers=0", *words])
        assert len(str(caught.value).splitlines()) <= 2
    with pytest.raises(UserError, match="is a folder"):
        knn.evaluate_quietly(str(run), [], tmp_path)


# --------------------------------------------------------------------------------------------------- during training


def test_periodic_equals_the_verb_and_disturbs_nothing(run: Path):
    settings = config.load(str(run / "config.yaml"))
    backbone = open_target(str(run), device="cpu").backbone
    backbone.train()
    backbone.model.blocks[0].eval()
    before = torch.random.get_rng_state(), torch.get_num_threads(), np.random.get_state()[1].copy()
    figures = knn_callable(settings, run)(backbone, 6)
    assert figures["knn_top1"] == knn.evaluate_quietly(str(run), ["workers=0", "k=20"])["metrics"]["top1"]
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == torch.get_num_threads()
    assert (before[2] == np.random.get_state()[1]).all()
    assert backbone.training and not backbone.model.blocks[0].training and backbone.model.blocks[1].training
    assert not list((run / "eval").glob(".selfsup*")), "temporary features are removed"


def test_periodic_several_k_and_a_smaller_bank(run: Path):
    settings = config.load(str(run / "config.yaml"), ["eval.k=[20, 5]", "eval.max_train=40"])
    figures = knn_callable(settings, run)(open_target(str(run), device="cpu").backbone, 1)
    assert list(figures) == ["knn_top1", "knn_top1_k5"] and all(0 <= v <= 1 for v in figures.values())


def test_periodic_refuses_unlabelled_data_before_training(run: Path, tmp_path: Path, train_folder: Path):
    for i, path in enumerate(sorted(train_folder.rglob("*.png"))[:20]):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes())
    words = [f"data={tmp_path}", "eval.train=null", "eval.val=null"]
    knn_callable(config.load(str(run / "config.yaml"), words), tmp_path)  # not asked for: no complaint
    with pytest.raises(UserError, match="have no labels"):
        knn_callable(config.load(str(run / "config.yaml"), [*words, "eval.every=5"]), tmp_path)
