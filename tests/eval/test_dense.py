"""segment-knn, objects and propagate: parts against plain computations, and the verbs from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.data import mask_files
from selfsup.data.sources import open_source
from selfsup.errors import UserError
from selfsup.eval import davis, dense, object_masks, objects, propagate, segment_knn
from selfsup.eval.settings import resolve
from selfsup.eval.targets import open_target

QUICK = ["workers=0", "device=cpu"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, train_folder: Path) -> tuple[Path, Path]:
    """16 pictures of 4 classes, and masks: the class + 1 where the picture is not dark, a rim of 255."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for label, folder in enumerate(sorted(train_folder.iterdir())):
        for path in sorted(folder.iterdir())[:4]:
            pixels = np.asarray(Image.open(path).convert("L"))
            mask = np.where(pixels > 40, label + 1, 0)
            mask[0] = 255
            Image.fromarray(pixels).save(root / "images" / f"{label}_{path.stem}.png")
            dense.save_mask(mask, root / "masks" / f"{label}_{path.stem}.png")
    return root / "images", root / "masks"


def test_masks_are_read_as_written(pairs: tuple[Path, Path], tmp_path: Path):
    mask = dense.read_mask(sorted(pairs[1].iterdir())[5])
    assert mask.dtype == np.int64 and set(np.unique(mask)) == {0, 2, 255} and (mask[0] == 255).all()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "rgb.png")
    assert not dense.read_mask(tmp_path / "rgb.png").any()  # grey, in three channels
    Image.fromarray(np.array([[[1, 2, 3]]], np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(UserError, match="colours instead of ids"):
        dense.read_mask(tmp_path / "rgb.png")
    (tmp_path / "text.png").write_text("no")
    with pytest.raises(UserError, match="cannot be read"):
        dense.read_mask(tmp_path / "text.png")


def test_which_mask_is_whose(tmp_path: Path):
    """The same subfolder, or the only one of that name; suffixes of any kind; the same for images as a source."""
    for name in ("a/1.png", "b/1.tif", "2.npy", "c/3.pgm"):
        (tmp_path / "masks" / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".npy"):
            np.save(tmp_path / "masks" / name, np.full((4, 5), 7, np.int32))
        else:
            Image.fromarray(np.full((4, 5), 7, np.uint8)).save(tmp_path / "masks" / name)
    names = [Path(n) for n in ("a/1.jpg", "b/1.jpg", "2.JPEG", "3.png")]
    wanted = [tmp_path / "masks" / n for n in ("a/1.png", "b/1.tif", "2.npy", "c/3.pgm")]
    assert mask_files.matched(names, tmp_path / "masks") == wanted
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "images" / name, format="PNG")
    source = open_source(str(tmp_path / "images"), channels=1)
    assert set(dense.mask_files(source, str(tmp_path / "images"), str(tmp_path / "masks"))) == set(wanted)
    assert all((dense.read_mask(path) == 7).all() for path in wanted)
    for more, said in (
        ("1.png", r"1\.png: no mask .*/1\.png"),
        ("d/2.png", "the mask of two images, 2.JPEG and d/2.png"),
    ):
        with pytest.raises(UserError, match=said):
            mask_files.matched([*names, Path(more)], tmp_path / "masks")
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(tmp_path / "masks" / "2.png")
    with pytest.raises(UserError, match=r"there is also 2\.npy"):
        mask_files.matched(names, tmp_path / "masks")


# --------------------------------------------------------------------------------------------------------- segment-knn


def test_shares_of_a_cell():
    mask = np.array([[1, 1, 3, 255], [1, 0, 3, 3], [255, 255, 0, 0], [255, 255, 0, 3]])
    ids, shares = segment_knn.cell_shares(mask, (2, 2), ignore=255)
    assert ids.tolist() == [0, 1, 3]
    assert shares[0, 0] == pytest.approx([0.25, 0.75, 0]) and shares[0, 1] == pytest.approx([0, 0, 1])
    assert not shares[1, 0].any() and shares[1, 1] == pytest.approx([0.75, 0, 0.25])


def test_vote_of_patches_is_the_plain_one():
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(40, 6)).astype("f")
    shares = rng.dirichlet(np.ones(3), size=40).astype("f")
    maps = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(2, 3, 3, 6)).astype("f")), dim=-1)
    settings = resolve("segment-knn", ["k=7", "temperature=0.1"])
    got = segment_knn.predict(maps, bank, shares, settings, "cpu")
    cosine = maps.reshape(-1, 6) @ torch.nn.functional.normalize(torch.from_numpy(bank)).T
    best, index = cosine.topk(7)
    expected = (torch.softmax(best / 0.1, dim=1)[..., None] * torch.from_numpy(shares)[index]).sum(1)
    assert torch.allclose(got.reshape(-1, 3), expected, atol=1e-5)
    large = segment_knn.enlarged(torch.tensor([[[0.9, 0.0, 0.1], [0.1, 0.0, 0.9]]]), (2, 8))
    assert large.tolist() == [[0, 0, 0, 0, 2, 2, 2, 2]] * 2


def test_scores_from_a_confusion():
    truth, found = np.array([0, 0, 1, 1, 255, 3]), np.array([0, 1, 1, 1, 2, 3])
    counts = segment_knn.confusion(truth, found, 5, 255)
    ious, accuracy = segment_knn.scores_of(counts)
    assert ious[[0, 1, 3]] == pytest.approx([1 / 2, 2 / 3, 1]) and np.isnan(ious[[2, 4]]).all()
    assert accuracy == pytest.approx(4 / 5)


def test_segment_knn_from_end_to_end(run: Path, pairs: tuple[Path, Path], tmp_path: Path, capsys):
    """With the bank as val and k = 1 each patch finds itself: what is left is the grid's coarseness."""
    images, masks = pairs
    words = [*QUICK, f"data={images}", f"masks={masks}", "layer=0"]
    itself = segment_knn.run(str(run), [*words, f"data.val={images}", f"val_masks={masks}", "k=1"], tmp_path / "a.json")
    apart = segment_knn.run(str(run), [*words, "k=5"], tmp_path / "b.json")
    assert itself["metrics"]["miou"] > 0.5 and itself["metrics"]["accuracy"] > 0.75
    assert 0.1 < apart["metrics"]["miou"] < itself["metrics"]["miou"]
    assert json.loads((tmp_path / "b.json").read_text())["protocol"]["val_images"] == 3
    assert np.asarray(Image.open(tmp_path / "b.png")).std() > 5 and "segment-knn" in capsys.readouterr().out
    next(masks.iterdir()).rename(tmp_path / "gone.png")
    try:
        with pytest.raises(UserError, match=r"no mask .*a mask has its image"):
            segment_knn.run(str(run), words, tmp_path / "c.json")
    finally:
        first = sorted(images.iterdir())
        missing = next(p for p in first if not (masks / p.name).exists())
        (tmp_path / "gone.png").rename(masks / missing.name)
    with pytest.raises(UserError, match=r"data=IMAGES masks=MASKS"):
        segment_knn.run(str(run), QUICK, tmp_path / "c.json")


# ------------------------------------------------------------------------------------------------------------- objects


def _scene(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of 10 x 12 cells with an object of 4 x 3, and where it is."""
    g = torch.Generator().manual_seed(seed)
    ground, thing = torch.randn(2, 16, generator=g)
    inside = torch.zeros(10, 12, dtype=torch.bool)
    inside[3:7, 5:8] = True
    noise = 0.1 * torch.randn(10, 12, 16, generator=g)
    return torch.where(inside[..., None], thing - ground, ground - thing) + noise, inside


@pytest.mark.parametrize("seed", range(3))
def test_cut_and_seed_expansion_find_the_object(seed: int):
    features, inside = _scene(seed)
    assert torch.equal(object_masks.tokencut(features), inside)
    assert torch.equal(object_masks.lost(features), inside)
    with_speck = inside.clone()
    with_speck[0, 0] = True
    assert torch.equal(object_masks.connected(with_speck, 3 * 12 + 5), inside)


def test_the_cut_is_the_generalised_eigenvector():
    from scipy.linalg import eigh

    features = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(3))
    x = torch.nn.functional.normalize(features.flatten(0, 1).double(), dim=1)
    edges = np.where((x @ x.T).numpy() >= 0.2, 1.0, 1e-5)
    degrees = np.diag(edges.sum(axis=1))
    y = eigh(degrees - edges, degrees)[1][:, 1]
    seed = np.abs(y).argmax()
    side = (y > y.mean()) == (y[seed] > y.mean())
    expected = object_masks.connected(torch.from_numpy(side).view(5, 6), int(seed))
    assert torch.equal(object_masks.tokencut(features), expected)


def test_mass_boxes_and_comparison():
    assert object_masks.by_mass(torch.tensor([[0.5, 0.2], [0.2, 0.1]]), 0.6).tolist() == [[True, True], [False, False]]
    mask = np.zeros((8, 8), bool)
    mask[1:4, 2:7] = mask[6, 0] = True
    assert object_masks.box_of(mask) == (1, 2, 4, 7) and object_masks.box_of(np.zeros((2, 2), bool)) is None
    assert object_masks.box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    truth = np.where(mask, 3, 0)
    truth[7] = 255
    assert objects.compare(mask, truth, 255) == (1.0, True)
    iou, hit = objects.compare(~mask, truth, 255)
    assert iou == 0 and hit is False
    assert objects.compare(mask, np.zeros((8, 8), int), 255)[1] is None


def test_keys_are_those_of_the_last_block(run: Path):
    backbone = open_target(str(run), device="cpu").backbone
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    block = backbone.model.blocks[-1]
    handle = block.norm1.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        backbone(x)
    handle.remove()
    with torch.no_grad():
        q_k_v = block.attn.qkv(seen[0]).reshape(2, 17, 3, 3, 8)  # as timm's Attention: B, N, 3, heads, D
    assert dense.has_keys(backbone)
    assert torch.equal(dense.keys_of(backbone, x), q_k_v[:, 1:, 1].reshape(2, 4, 4, 24))


@pytest.mark.parametrize("method", ["tokencut", "lost", "attention"])
def test_objects_from_end_to_end(method: str, run: Path, pairs: tuple[Path, Path], tmp_path: Path):
    images, masks = pairs
    words = [*QUICK, f"data={images}", f"masks={masks}", f"by={method}"]
    found = objects.run(str(run), words, tmp_path / "o.json")
    assert 0 < found["metrics"]["iou"] < 1 and 0 <= found["metrics"]["corloc"] <= 1
    assert 0 < found["metrics"]["covered"] < 1 and found["protocol"]["val_images"] == 16
    assert np.asarray(Image.open(tmp_path / "o.png")).std() > 5


def test_objects_of_convnets(tmp_path: Path):
    with pytest.raises(UserError, match="use tokencut or lost"):
        objects.run("random:demo", [*QUICK, "data=demo:val", "images=2", "by=attention"], tmp_path / "o.json")
    found = objects.run("random:demo", [*QUICK, "data=demo:val", "images=2"], tmp_path / "o.json")
    assert found["protocol"]["features"] == "output" and "iou" not in found["metrics"]


# ----------------------------------------------------------------------------------------------------------- propagate


def test_labels_follow_what_moves():
    """Cells with features of their own move by two: labels follow, unless the radius is too small."""
    g = torch.Generator().manual_seed(0)
    wide = torch.nn.functional.normalize(torch.randn(6, 10, 64, generator=g), dim=-1)
    labels = torch.zeros(6, 8, 2)
    labels[2:4, 2:4, 1] = 1
    labels[..., 0] = 1 - labels[..., 1]
    first, second = wide[:, 2:], wide[:, :8]  # what was in column c is in c + 2
    for radius, follows in ((0, True), (2, True), (1, False)):
        settings = resolve("propagate", ["k=1", f"radius={radius}"])
        got = propagate.carried(second, [first], [labels], settings)
        assert torch.equal(got[:, 2:], labels[:, :6]) == follows
    both = propagate.carried(
        second, [first, second], [labels, labels], resolve("propagate", ["k=2", "temperature=1000"])
    )
    assert torch.allclose(both.sum(dim=-1), torch.ones(6, 8)) and both.shape == labels.shape


def test_contours_against_plain_dilation():
    rng = np.random.default_rng(0)
    a = np.zeros((60, 80), bool)
    a[20:40, 20:50] = True
    assert davis.region(a, a) == davis.contour(a, a) == 1
    assert davis.contour(a, np.roll(a, 1, axis=1)) == 1 and davis.contour(a, np.zeros_like(a)) == 0
    assert davis.region(np.zeros_like(a), np.zeros_like(a)) == davis.contour(np.zeros_like(a), np.zeros_like(a)) == 1
    b = np.roll(a, (3, 5), axis=(0, 1)) | (rng.uniform(size=a.shape) > 0.995)
    radius = int(np.ceil(0.008 * 100))
    edges = [davis.boundary(a), davis.boundary(b)]
    wide = []
    for edge in edges:
        out = np.zeros_like(edge)
        for y, x in np.argwhere(edge):
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    if dy * dy + dx * dx <= radius * radius and 0 <= y + dy < 60 and 0 <= x + dx < 80:
                        out[y + dy, x + dx] = True
        wide.append(out)
    precision, recall = (edges[0] & wide[1]).sum() / edges[0].sum(), (edges[1] & wide[0]).sum() / edges[1].sum()
    assert davis.contour(a, b) == pytest.approx(2 * precision * recall / (precision + recall))


def test_propagate_from_end_to_end(run: Path, pairs: tuple[Path, Path], tmp_path: Path):
    """A still video keeps its mask as far as the grid of 4 x 4 cells tells."""
    frames, masks = tmp_path / "frames", tmp_path / "masks"
    frames.mkdir()
    masks.mkdir()
    still = np.asarray(Image.open(sorted(pairs[0].iterdir())[9]))
    mask = np.zeros((28, 28), np.int64)
    mask[7:21, 7:21] = 4
    for i in range(4):
        Image.fromarray(still).save(frames / f"{i:03}.png")
        dense.save_mask(mask, masks / f"{i:03}.png")
    words = [*QUICK, f"data={frames}", "size=28", "k=1"]
    scored = propagate.run(str(run), [*words, f"masks={masks}"], tmp_path / "v.json")
    assert scored["metrics"]["j"] > 0.8 and scored["metrics"]["f"] > 0.5 and scored["protocol"]["frames"] == 4
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == [f"{i:03}.png" for i in range(4)]
    last = dense.read_mask(tmp_path / "v" / "003.png")
    assert last.shape == (28, 28) and set(np.unique(last)) == {0, 4}
    first_alone = propagate.run(str(run), [*words, f"masks={masks / '000.png'}"], tmp_path / "w.json")
    assert set(first_alone["metrics"]) == {"covered"}
    (masks / "000.png").unlink()
    with pytest.raises(UserError, match="the mask of the first frame"):
        propagate.run(str(run), [*words, f"masks={masks}"], tmp_path / "v.json")
