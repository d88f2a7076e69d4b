"""fewshot, retrieval, duplicates, robustness, layers: figures against plain computations, and the verbs from end to end."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.errors import UserError
from selfsup.eval import corruptions, duplicates, fewshot, layers, results, retrieval, robustness

QUICK = ["workers=0", "device=cpu"]


def shown(path: Path) -> bool:
    return np.asarray(Image.open(path).convert("RGB")).std() > 5


def test_few_shots_from_end_to_end(run: Path, capsys):
    found = fewshot.run(str(run), [*QUICK, "shots=1,5,90", "repeats=8"])
    stored = results.read(run / "eval" / "fewshot.json")
    assert stored["metrics"] == found["metrics"] and "top1_5shot" in capsys.readouterr().out
    one, five, all_ = found["settings"]
    assert 0.25 < one["top1"] < all_["top1"] + 0.1 and one["low_top1"] < one["top1"] < one["high_top1"]
    assert one["high_top1"] - one["low_top1"] > five["high_top1"] - five["low_top1"] > 0
    assert all_["high_top1"] == all_["low_top1"] and "only 40 training images" in found["protocol"]["note"]


def test_an_episode_is_the_nearest_mean():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(30, 5)), rng.normal(size=(20, 5))
    labels, truth = np.arange(30) % 3, np.arange(20) % 4  # class 3 has no training image
    rows = fewshot.chosen_rows(labels, 4, np.random.default_rng(1))
    assert np.bincount(labels[rows]).tolist() == [4, 4, 4] and len(set(rows.tolist())) == 12
    means = np.stack([bank[[r for r in rows if labels[r] == c]].mean(axis=0) for c in range(3)])
    expected = np.linalg.norm(queries[:, None] - means, axis=2).argmin(axis=1)
    assert fewshot.episode(bank, labels, queries, truth, rows) == pytest.approx((expected == truth).mean())
    mean, half = fewshot.mean_and_half(np.array([0.1, 0.2, 0.3]))
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)


def test_average_precision_against_scikit_learn():
    from sklearn.metrics import average_precision_score

    right = torch.tensor([[True, False, True, False], [False, False, False, True], [True, True, True, True]])
    expected = [average_precision_score(row.numpy(), [4, 3, 2, 1]) for row in right]
    assert retrieval.average_precision(right).tolist() == pytest.approx(expected)
    gallery, queries = np.eye(3, dtype="f"), np.array([[1, 0.5, 0], [0, 0, 1], [1, 0, 0]], dtype="f")
    metrics, without = retrieval.measure(gallery, np.array([0, 1, 1]), queries, np.array([1, 1, 7]))
    assert without == 1 and metrics["hit_1"] == 0.5 and metrics["hit_5"] == 1
    assert metrics["map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + (1 + 2 / 3) / 2) / 2)  # 0, 1, 2; then 2, 0, 1


def test_retrieval_from_end_to_end(run: Path):
    found = retrieval.run(str(run), QUICK)
    assert 0.25 < found["metrics"]["map"] < 1 and found["metrics"]["hit_1"] <= found["metrics"]["hit_10"]
    assert (run / "eval" / "retrieval.json").is_file()


def test_pairs_are_listed_once():
    indices = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1]])
    similarities = np.array([[1.0, 0.9, 0.5], [1.0, 0.9, 0.8], [1.0, 0.5, 0.8]])
    pairs, full = duplicates.pairs_of(indices, similarities, 0.8)
    assert pairs == [(0, 1, 0.9), (1, 2, 0.8)] and full == 1


def test_duplicates_are_found_among_unlabelled_images(train_folder: Path, tmp_path: Path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for i, path in enumerate(sorted(train_folder.rglob("*.png"))[:20]):
        shutil.copy(path, data / f"{i:02}.png")
    shutil.copy(data / "04.png", data / "copy.png")
    brighter = np.asarray(Image.open(data / "11.png").convert("L")).astype(int)
    Image.fromarray((brighter * 0.97).astype(np.uint8)).save(data / "nearly.png")
    found = duplicates.run("pixels", [*QUICK, f"data={data}", "threshold=0.9995"], tmp_path / "d.json")
    names = [{Path(p["a"]).name, Path(p["b"]).name} for p in found["pairs"]]
    assert {"04.png", "copy.png"} in names and found["pairs"][0]["cosine"] == pytest.approx(1)
    assert {"11.png", "nearly.png"} in names and len(names) == found["protocol"]["pairs"] < 6
    assert json.loads((tmp_path / "d.json").read_text())["pairs"] == found["pairs"] and shown(tmp_path / "d.png")
    assert "copy.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", corruptions.CORRUPTIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_corruptions(name: str, channels: int):
    """The same twice; the strong one changes more; nothing but the image and the generator counts."""
    ramp = np.linspace(20, 230, 28)
    image = np.repeat(((ramp[:, None] + 60 * (np.arange(28) // 4 % 2)) / 1.2)[:, :, None], channels, axis=2).astype(
        np.uint8
    )
    before = image.copy()
    made = [corruptions.corrupted(image, name, s, np.random.default_rng(0)) for s in ("mild", "strong", "strong")]
    assert all(m.shape == image.shape and m.dtype == np.uint8 for m in made) and np.array_equal(made[1], made[2])
    change = [np.abs(m.astype(int) - image).mean() for m in made]
    assert 0 < change[0] < change[1] and np.array_equal(image, before)


def test_robustness_from_end_to_end(run: Path, capsys):
    words = [*QUICK, "corruptions=contrast,gaussian_noise", "max_val=40"]
    found = robustness.run(str(run), words)
    rows = found["settings"]
    made = [(r["corruption"], r["strength"]) for r in rows[:3]]
    assert made == [
        ("none", "none"),
        ("contrast", "mild"),
        ("contrast", "strong"),
    ]
    mean = np.mean([r["top1"] for r in rows if r["strength"] == "strong"])
    assert found["metrics"]["top1_strong"] == pytest.approx(mean) and found["metrics"]["top1"] == rows[0]["top1"]
    assert shown(run / "pictures" / "robustness.png")
    with pytest.raises(UserError, match="did you mean contrast"):
        robustness.run(str(run), [*QUICK, "corruptions=contrst"])


def test_a_probe_on_every_layer(run: Path):
    before = (run / "eval" / "linear.json").exists()
    found = layers.run(str(run), [*QUICK, "epochs=2", "lr=0.1", "pooling=patchmean"])
    assert [row["layer"] for row in layers.best_rows(found["settings"])] == [0, 1, 2]
    assert results.read(run / "eval" / "layers.json")["task"] == "layers"
    assert (run / "eval" / "linear.json").exists() == before and shown(run / "pictures" / "layers.png")
    with pytest.raises(UserError, match="looks at each"):
        layers.run(str(run), ["layer=1"])
    with pytest.raises(UserError, match="0 layers"):
        layers.run("pixels", [*QUICK, "data=demo:val"])
