"""Layouts, masks and their faults, joint crops; the composed set that colours alone do not solve."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import composed
from selfsup.data.mask_files import read_ids
from selfsup.errors import UserError
from selfsup.eval.segment_crops import Crops, crop
from selfsup.eval.segment_data import IGNORE, Reader, open_classes
from selfsup.eval.segment_layouts import open_layout
from selfsup.eval.settings import resolve


def write(path: Path, array: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image = image.convert("L").convert("P") if image.mode != "P" else image
        image = Image.fromarray(array).convert("P")
        image.putdata(array.reshape(-1).tolist())
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(path)


def picture(seed: int = 0, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def ids(values: list[int], size: tuple[int, int] = (20, 30), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), size)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Five pairs of ids 0, 1, 2 and 255; one image in a subfolder, one mask with a palette."""
    for i in range(5):
        name = f"sub/{i}" if i == 4 else str(i)
        write(tmp_path / "images" / f"{name}.{'jpg' if i % 2 else 'PNG'}", picture(i))
        write(tmp_path / "masks" / f"{name}.png", ids([0, 1, 2, 255], seed=i), palette=i == 3)
    return tmp_path


def opened(root: Path, *words: str):
    settings = resolve("segment", [f"data={root / 'images'}", f"masks={root / 'masks'}", *words])
    layout = open_layout(settings)
    classes, train, val = open_classes(layout, settings)
    return settings, layout, Reader(3, 10**8, None, classes), train, val


def test_pairs_and_their_split(pairs: Path):
    _, layout, reader, train, val = opened(pairs)
    assert len(layout.train) == 4 and len(layout.val) == 1 and "seeded 4/1" in layout.split
    assert set(layout.train.images) | set(layout.val.images) == set((pairs / "images").rglob("*.*"))
    assert len(reader.classes) == 3 and train.shape == (3,) and train.sum() + val.sum() < 5 * 600
    palette = read_ids(pairs / "masks" / "3.png")
    assert set(np.unique(palette)) == {0, 1, 2, 255} and np.array_equal(palette, ids([0, 1, 2, 255], seed=3))
    mask = reader.mask(pairs / "masks" / "3.png")
    assert set(np.unique(mask)) == {IGNORE, 0, 1, 2} and (mask == IGNORE).sum() == (palette == 255).sum()
    again, other = opened(pairs)[1], opened(pairs, "seed=3")[1]
    assert again.val.images == layout.val.images
    assert [opened(pairs, f"seed={s}")[1].val.images for s in range(8)].count(layout.val.images) < 8 and other.val


def refused(root: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        opened(root, *words)
    text = str(error.value)
    assert text.count("\n") <= 1
    return text


def test_an_id_out_of_range_names_file_and_id(pairs: Path):
    bad = ids([0, 1])
    bad[3, 4] = bad[5, 6] = 7
    write(pairs / "masks" / "2.png", bad)
    text = refused(pairs, "classes=3")
    assert "2.png" in text and "id 7 (2 pixels)" in text and "0 to 2" in text and "255 to be ignored" in text
    assert "255" in refused(pairs, "classes=8", "ignore=null")
    assert len(opened(pairs, "classes=8")[2].classes) == 8


def test_missing_masks_sizes_and_colours(pairs: Path):
    (pairs / "masks" / "1.png").rename(pairs / "masks" / "one.png")
    text = refused(pairs)
    assert "1.jpg" in text and "no mask" in text and str(pairs / "masks" / "1.png") in text
    (pairs / "masks" / "one.png").rename(pairs / "masks" / "1.png")
    write(pairs / "masks" / "0.png", ids([0, 1], (20, 31)))
    text = refused(pairs)
    assert "0.png" in text and "31x20" in text and "30x20" in text
    write(pairs / "masks" / "0.png", picture())
    assert "0.png" in (text := refused(pairs)) and "colours instead of ids" in text
    grey = ids([0, 1])
    write(pairs / "masks" / "0.png", np.repeat(grey[:, :, None], 3, axis=2))  # grey, stored as RGB
    assert np.array_equal(read_ids(pairs / "masks" / "0.png"), grey)
    (pairs / "masks" / "0.png").write_bytes(b"no image")
    assert "0.png" in (text := refused(pairs)) and "cannot be read" in text
    shutil.rmtree(pairs / "masks")
    assert "no such folder" in refused(pairs)


def test_black_and_white_masks_are_asked_about(pairs: Path):
    for i, path in enumerate((pairs / "masks").rglob("*.png")):
        write(path, ids([0, 255], seed=i))
    assert "ids=0,255 ignore=null" in refused(pairs)
    reader = opened(pairs, "ids=0,255", "ignore=null", "classes=sky,bird")[2]
    assert set(np.unique(reader.mask(pairs / "masks" / "1.png"))) == {0, 1} and reader.classes.names == ["sky", "bird"]


def test_turned_photographs_are_compared_upright(pairs: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(1, (30, 20))).save(pairs / "images" / "1.jpg", exif=exif)
    reader = opened(pairs)[2]
    assert reader.pair(pairs / "images" / "1.jpg", pairs / "masks" / "1.png")[0].shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data=nowhere", "masks=nowhere"], "data=nowhere"),
        ([], "data"),
        (["data={0}/images"], "masks"),
        (["data={0}/images", "masks={0}/masks", "data.val={0}/images"], "masks.val"),
        (["data={0}/images", "masks={0}/masks", "head=unet"], "head"),
        (["data={0}/images", "masks={0}/masks", "classes=missing.txt"], "classes=missing.txt"),
        (["data={0}/images", "masks={0}/masks", "loss.ce=0"], "loss"),
    ],
)
def test_bad_keys(pairs: Path, words: list[str], key: str):
    with pytest.raises(UserError, match=key):
        settings = resolve("segment", [w.format(pairs) for w in words])
        open_classes(open_layout(settings), settings)


# --------------------------------------------------------------------------------------------------------------- layouts


def test_voc(tmp_path: Path):
    for i in range(3):
        write(tmp_path / "JPEGImages" / f"a{i}.jpg", picture(i))
        write(tmp_path / "SegmentationClass" / f"a{i}.png", ids([0, 15, 20, 255], seed=i), palette=True)
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a0\na2\n")
    (lists / "val.txt").write_text("a1\n")
    settings = resolve("segment", [f"data={tmp_path}"])
    layout = open_layout(settings)
    classes, train, _ = open_classes(layout, settings)
    assert layout.name == "voc" and len(classes) == 21 and classes.names[15] == "person" and train[20] > 0
    assert [p.name for p in layout.train.masks] == ["a0.png", "a2.png"]
    (lists / "val.txt").write_text("gone\n")
    with pytest.raises(UserError, match=r"gone\.jpg"):
        open_layout(settings)


def test_ade20k_has_no_class_for_zero(tmp_path: Path):
    for part in ("training", "validation"):
        write(tmp_path / "images" / part / "x.jpg", picture())
        write(tmp_path / "annotations" / part / "x.png", ids([0, 1, 150]))
    settings = resolve("segment", [f"data={tmp_path}"])
    layout = open_layout(settings)
    classes, train, _ = open_classes(layout, settings)
    mask = Reader(3, 10**8, None, classes).mask(layout.train.masks[0])
    raw = read_ids(layout.train.masks[0])
    assert len(classes) == 150 and (mask[raw == 0] == IGNORE).all() and (mask[raw == 150] == 149).all() and train[0] > 0


def test_cityscapes_and_its_label_ids(tmp_path: Path):
    for part in ("train", "val"):
        for city in ("ulm", "bonn"):
            stem = f"{city}_0_0"
            write(tmp_path / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png", picture())
            write(tmp_path / "gtFine" / part / city / f"{stem}_gtFine_labelIds.png", ids([0, 7, 33, 3]))
    settings = resolve("segment", [f"data={tmp_path}"])
    layout = open_layout(settings)
    classes, _, _ = open_classes(layout, settings)
    mask, raw = Reader(3, 10**8, None, classes).mask(layout.val.masks[0]), read_ids(layout.val.masks[0])
    assert len(layout.train) == 2 and len(classes) == 19
    assert (mask[raw == 7] == 0).all() and (mask[raw == 33] == 18).all() and (mask[raw < 7] == IGNORE).all()
    for path in list((tmp_path / "gtFine").rglob("*.png")):  # beside them the converted ones, which are taken
        write(path.with_name(path.name.replace("labelIds", "labelTrainIds")), ids([0, 18, 255]))
    layout = open_layout(settings)
    assert layout.train.masks[0].name.endswith("labelTrainIds.png") and open_classes(layout, settings)[1][18] > 0


def test_coco_stuff(tmp_path: Path):
    for part in ("train2017", "val2017"):
        write(tmp_path / "images" / part / "1.jpg", picture())
        write(tmp_path / "stuffthingmaps" / part / "1.png", ids([0, 181, 255]))
    settings = resolve("segment", [f"data={tmp_path}"])
    assert len(open_classes(open_layout(settings), settings)[0]) == 182
    (tmp_path / "stuffthingmaps" / "val2017" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png"):
        open_layout(settings)


# ----------------------------------------------------------------------------------------------------------------- crops


def test_image_and_mask_are_cropped_together():
    """The image is its own mask in colours: where they came apart, colour and id would differ."""
    mask = np.kron(np.arange(12).reshape(3, 4), np.ones((20, 20))).astype(np.int16)
    pixels = np.repeat((mask * 20).astype(np.uint8)[:, :, None], 3, axis=2)
    fill = np.array([255, 255, 255], np.uint8)
    for ratio, place, flip in ((1.0, (0.5, 0.5), False), (1.7, (0.1, 0.9), True), (0.5, (0.5, 0.5), True)):
        image, ids_ = crop(pixels, mask, 40, ratio, place, flip, fill)
        assert image.shape == (40, 40, 3) and ids_.shape == (40, 40)
        known = ids_ != IGNORE
        same = np.abs(image[..., 0].astype(int) - ids_ * 20) <= 10
        assert same[known].mean() > 0.85 and (image[~known] == 255).all()  # borders are blended
        assert known.all() == (ratio >= 1)


def test_crops_depend_on_seed_step_and_sample_alone(pairs: Path):
    settings, layout, reader, _, _ = opened(pairs, "batch=3")
    fill = np.zeros(3, np.uint8)
    crops, again = (Crops(layout.train, reader, settings, 16, fill) for _ in range(2))
    third = again[3]  # before the others
    made = [crops[k] for k in range(4)]
    assert all(np.array_equal(a, b) for a, b in zip(made[3], third))
    assert not np.array_equal(made[2][0], made[3][0])
    other = Crops(layout.train, reader, resolve("segment", ["batch=3", "seed=1"]), 16, fill)
    assert not np.array_equal(other[3][0], third[0])
    seen = np.concatenate([crops.numbers(k) for k in range(4)])  # 12 samples: three epochs of four
    assert [sorted(seen[i : i + 4].tolist()) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    still = Crops(layout.train, reader, resolve("segment", ["augment=false"]), 16, fill)
    assert np.array_equal(still.one(0, 2)[0], still.one(9, 2)[0])


# ------------------------------------------------------------------------------------------------------ the composed set


def test_no_colour_rule_solves_the_composed_set():
    """The best rule 'this colour, that class', from 300 training pictures, finds next to nothing in the val pictures."""
    parts = {part: list(composed.scenes(part, n)) for part, n in (("train", 300), ("val", 60))}
    votes = np.zeros((16**3, 5))
    for image, mask in parts["train"]:
        cell = (image.reshape(-1, 3) // 16).astype(int) @ (256, 16, 1)
        np.add.at(votes, (cell, mask.reshape(-1)), 1)
    rules = {"likeliest": votes.argmax(1), "balanced": (votes / votes.sum(0)).argmax(1)}
    for name, rule in rules.items():
        counts = np.zeros((5, 5))
        for image, mask in parts["val"]:
            np.add.at(counts, (mask.reshape(-1), rule[(image.reshape(-1, 3) // 16).astype(int) @ (256, 16, 1)]), 1)
        iou = np.diag(counts) / (counts.sum(0) + counts.sum(1) - np.diag(counts))
        assert iou[1:].mean() < 0.12, (name, iou)


def test_the_composed_set_is_the_same_each_time(tmp_path: Path):
    one, two = (composed.build(tmp_path / name, 4, 2, 32) for name in "ab")
    files = sorted(p.relative_to(one) for p in one.rglob("*.png"))
    assert len(files) == 12 and all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
    masks = [np.asarray(Image.open(p)) for p in sorted((one / "train" / "masks").glob("*.png"))]
    assert [m.max() for m in masks] == [1, 2, 3, 4] and all(0.03 < (m > 0).mean() < 0.7 for m in masks)
    assert set(composed.PHOTOGRAPHS["train"]).isdisjoint(composed.PHOTOGRAPHS["val"])
