"""attention, pca, tsne, neighbors: drawn from the command line, and right about what they show."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup import cli_eval
from selfsup.errors import UserError
from selfsup.eval import attention, neighbors, pca, tsne

QUICK = ["workers=0", "device=cpu"]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("attention", ["images=4", "heads=2"]),
        ("pca", ["images=4", "foreground=true"]),
        ("tsne", ["points=40", "thumbnails=9"]),
        ("neighbors", ["images=3", "k=4"]),
    ],
)
def test_into_the_run(verb: str, words: list[str], run: Path, capsys):
    cli_eval.evaluate(verb, str(run), [*QUICK, *words], None)
    file = run / "pictures" / f"{verb}.png"
    assert str(file) in capsys.readouterr().out
    image = pixels(file)
    assert image.shape[0] > 300 and image.shape[1] > 400 and image.std() > 5


def test_unlabelled_images_of_another_folder(run: Path, train_folder: Path, tmp_path: Path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(train_folder.rglob("*.png"))[:24]):
        shutil.copy(path, flat / f"{i}.png")
    for module in (pca, neighbors):
        name = module.__name__.rpartition(".")[2]
        made = module.run(str(run), [*QUICK, f"data={flat}"], tmp_path / f"{name}.png")
        assert pixels(Path(made["picture"])).std() > 5


def test_a_convnet_is_told_what_it_can_draw(tmp_path: Path):
    words = [*QUICK, "data=demo:val"]
    with pytest.raises(UserError, match="needs a ViT; use eval pca"):
        attention.run("random:demo", words, tmp_path / "a.png")
    assert pca.run("random:demo", [*words, "images=2"], tmp_path / "p.png")
    with pytest.raises(UserError, match=r"raw pixels.*eval neighbors"):
        attention.run("pixels", words, tmp_path / "a.png")
    with pytest.raises(UserError, match="no patch features"):
        pca.run("pixels", words, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_refused_before_any_work(tmp_path: Path):
    with pytest.raises(UserError, match=r"ends in \.png"):
        pca.run("random:demo", [*QUICK, "data=demo:val"], tmp_path / "a.json")
    with pytest.raises(UserError, match=r"--out FILE\.png"):
        pca.run("random:demo", [*QUICK, "data=demo:val"])
    with pytest.raises(UserError, match="data=FOLDER"):
        neighbors.run("pixels", QUICK, tmp_path / "a.png")
    with pytest.raises(UserError, match="did you mean foreground"):
        pca.run("random:demo", ["forground=true"], tmp_path / "a.png")


def _maps(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images of 8 x 8 cells, an object in the middle of each, and where it is."""
    g = torch.Generator().manual_seed(seed)
    object_, ground = torch.randn(2, 12, generator=g)
    inside = torch.zeros(2, 8, 8, dtype=torch.bool)
    inside[0, 2:6, 2:5] = True
    inside[1, 3:7, 3:7] = True
    maps = torch.where(inside[..., None], object_, ground) + 0.05 * torch.randn(2, 8, 8, 12, generator=g)
    return torch.nn.functional.normalize(maps, dim=-1), inside


@pytest.mark.parametrize("seed", range(4))
def test_foreground_is_the_object_whatever_the_sign(seed: int):
    maps, inside = _maps(seed)
    assert torch.equal(pca.foreground_of(maps, 0.0), inside)
    colours, _ = pca.colours_of(maps, inside)
    assert not colours[~inside.numpy()].any() and colours[inside.numpy()].any()
    with pytest.raises(UserError, match="lower one"):
        pca.colours_of(maps, torch.zeros_like(inside))


def test_one_pca_over_all_images():
    """Equal cells of different images have equal colours, and the components are those of an SVD."""
    maps, _ = _maps()
    maps[1, 0, 0] = maps[0, 5, 3]
    colours, share = pca.colours_of(maps)
    assert np.array_equal(colours[1, 0, 0], colours[0, 5, 3])
    x = maps.flatten(0, 2).double()
    x = x - x.mean(dim=0)
    _, values, basis = torch.linalg.svd(x, full_matrices=False)
    parts, _ = pca.components(maps.flatten(0, 2), 3)
    assert torch.allclose(parts.abs(), (x @ basis[:3].T).abs(), atol=1e-9)
    assert share == pytest.approx(float(values[:3].square().sum() / values.square().sum()))
    narrow, _ = pca.components(torch.randn(9, 2), 3)
    assert narrow.shape == (9, 3) and not narrow[:, 2].any()


def test_thumbnails_keep_their_distance():
    places = np.random.default_rng(0).uniform(size=(500, 2))
    rows = tsne.spaced(places, 60)
    assert len(rows) == 60 == len(set(rows.tolist()))
    gaps = np.abs(places[rows][:, None] - places[rows][None]).max(axis=2) + np.eye(60)
    assert gaps.min() >= np.ptp(places, axis=0).max() / 24
    assert not np.array_equal(rows, tsne.spaced(places, 60, seed=1)) and len(tsne.spaced(places, 0)) == 0


def test_a_query_of_the_bank_is_not_its_own_neighbour():
    indices = np.array([[4, 7, 9], [1, 2, 3], [5, 6, 8]])
    similarities = np.array([[1.0, 0.9, 0.8], [1.0, 1.0, 1.0], [1.0, 0.7, 0.6]])
    got, cosines = neighbors.without_self(indices, similarities, np.array([4, 0, 6]))
    assert got.tolist() == [[7, 9], [1, 2], [5, 8]] and cosines.tolist() == [[0.9, 0.8], [1.0, 1.0], [1.0, 0.6]]


def test_the_copy_of_an_image_is_its_nearest(train_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i, path in enumerate(sorted(train_folder.rglob("*.png"))[:12]):
        shutil.copy(path, tmp_path / f"{i:02}.png")
    shutil.copy(tmp_path / "03.png", tmp_path / "12.png")
    seen: list[np.ndarray] = []
    sheet = neighbors._sheet

    def look(bank, queries, rows, indices, *rest):
        seen.extend([rows, indices])
        return sheet(bank, queries, rows, indices, *rest)

    monkeypatch.setattr(neighbors, "_sheet", look)
    neighbors.run("pixels", [*QUICK, f"data={tmp_path}", "images=13", "k=2"], tmp_path / "n.png")
    rows, indices = seen
    assert indices[rows.tolist().index(3), 0] == 12 and indices[rows.tolist().index(12), 0] == 3
    assert not (indices == rows[:, None]).any()
