"""The pictures are drawn, show what they claim, and are the same twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.backbones import create_backbone
from selfsup.config import BackboneConfig
from selfsup.errors import UserError
from selfsup.eval import class_figures, curves, pictures, shown


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_all_pictures_of_a_run(run: Path, tmp_path: Path):
    files = pictures.draw_run(run, tmp_path / "a", images=5, points=60)
    assert [f.name for f in files] == ["attention.png", "pca.png", "embeddings.png", "curves.png"]
    for file in files:
        image = pixels(file)
        assert image.shape[0] > 300 and image.shape[1] > 500 and image.std() > 5
    again = pictures.draw_run(run, tmp_path / "b", images=5, points=60)
    assert [f.read_bytes() for f in files[:2]] == [f.read_bytes() for f in again[:2]]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(f.name for f in files)


def test_default_folder(run: Path):
    files = pictures.draw_run(run, images=2, points=20)
    assert all(f.parent == run / "pictures" for f in files)


def test_one_image_of_every_class_first():
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert shown.one_per_class(labels, 4).tolist() == [0, 3, 5, 1]
    assert shown.one_per_class(np.zeros(3, dtype=int), 8).tolist() == [0, 1, 2]


def test_convnets_have_a_map_but_no_attention(tmp_path: Path):
    backbone = create_backbone(
        BackboneConfig(name="resnet10t"), mean=(0.5,) * 3, std=(0.2,) * 3, input_size=None
    ).eval()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    layer = pictures.map_layer(backbone, images)  # at stride 32 two cells a side remain: one stage earlier
    with torch.no_grad():
        assert backbone.feature_maps(images, [layer])[0].shape[-1] == 4
    assert pixels(pictures.patch_pca(backbone, images, tmp_path / "p.png", layer)).std() > 5
    with pytest.raises(UserError, match="attention"):
        pictures.attention(backbone, images, tmp_path / "a.png")


def test_embedding_map_with_and_without_labels(tmp_path: Path):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6)).astype("f")
    a = pictures.embedding_map(features, None, None, tmp_path / "a.png")
    b = pictures.embedding_map(features, np.arange(40) % 3, ["0_x", "1_y", "2_z"], tmp_path / "b.png")
    c = pictures.embedding_map(features, np.arange(40), None, tmp_path / "c.png")  # too many classes for a legend
    assert all(pixels(p).std() > 5 for p in (a, b, c))
    assert class_figures.class_name(["0_x", "1_y"], 1) == "y" and class_figures.class_name(["cat", "1_y"], 1) == "1_y"
    assert class_figures.class_name(None, 4) == "4"


def test_series_reads_nested_keys_gaps_and_text():
    lines = [
        {"step": 10, "loss": 3.0, "health": {"kl": 1.0}},
        {"step": 20, "loss": "nan", "health": {"kl": "inf"}, "eval": {"knn_top1": 0.5}},
        {"step": 20, "eval": {"knn_top1": 0.81}},
        {"step": 30, "loss": 2.0, "health": {"state": "ok"}},
    ]
    steps, loss = curves._series(lines, "loss")
    assert steps.tolist() == [10, 20, 30] and np.isnan(loss[1]) and loss[2] == 2.0
    assert curves._series(lines, "eval.knn_top1", 100)[1].tolist() == [50.0, 81.0]
    assert np.isnan(curves._series(lines, "health.kl")[1][1]) and len(curves._series(lines, "health.state")[0]) == 0
    smooth = curves.smoothed(np.where(np.arange(400) % 7 == 3, np.nan, 5.0))
    assert np.nanmax(np.abs(smooth - 5)) < 1e-9 and np.isnan(smooth[3])


def test_curves_of_odd_logs(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="no line to draw"):
        curves.curves(tmp_path, tmp_path / "c.png")
    log.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    assert pixels(curves.curves(tmp_path, tmp_path / "c.png")).std() > 5
    lines = [{"step": i, "loss": 9 - i / 50, "lr": 1e-4, "img_per_s": 50, "data_wait": 0.3} for i in range(200)]
    log.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 200, "eval": {"knn_top1": 0.81}}]))
    assert pixels(curves.curves(tmp_path, tmp_path / "d.png")).std() > 5
