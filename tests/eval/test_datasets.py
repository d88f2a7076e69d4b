"""Which images are train and val, splits, class numbering, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfsup.errors import UserError
from selfsup.eval.datasets import align, labelled_only, open_pair, stratified_choice
from selfsup.eval.settings import resolve
from selfsup.eval.targets import open_target


def pair(words: list[str], target: str = "pixels"):
    return open_pair(open_target(target, device="cpu"), resolve("knn", ["workers=0", *words]))


def test_one_folder_is_split_and_the_split_is_recorded(train_folder: Path):
    found = pair([f"data={train_folder}"])
    assert len(found.train) == 128 and len(found.val) == 32
    assert not set(found.train.indices) & set(found.val.indices)
    assert np.bincount(found.val_labels).tolist() == [8] * 4
    assert "seeded stratified 80/20" in found.protocol["split"] and found.protocol["split_hash"]
    again, other = pair([f"data={train_folder}"]), pair([f"data={train_folder}", "seed=1"])
    assert found.protocol == again.protocol
    assert found.protocol["split_hash"] != other.protocol["split_hash"]


def test_two_folders_as_given(train_folder: Path, val_folder: Path):
    a = pair([f"eval.train={train_folder}", f"eval.val={val_folder}"])
    b = pair([f"data={train_folder}", f"data.val={val_folder}"])
    assert (len(a.train), len(a.val)) == (len(b.train), len(b.val)) == (160, 60)
    assert a.protocol == b.protocol and a.protocol["split"] == "as given"


def test_demo_alone_uses_its_own_val():
    found = pair(["data=demo"])
    assert (len(found.train), len(found.val), found.classes) == (10_000, 2_000, 10)


def test_run_brings_its_data(run: Path, train_folder: Path):
    assert len(pair([], str(run)).val) == 60
    own = pair([f"data={train_folder}"], str(run))  # other data: the run's val does not belong to it
    assert len(own.val) == 32 and "80/20" in own.protocol["split"]


def test_a_val_folder_that_lacks_a_class_keeps_the_names_right(tmp_path: Path, train_folder: Path, val_folder: Path):
    part = shutil.copytree(val_folder, tmp_path / "part")
    shutil.rmtree(part / "1_trouser")  # the first class: every number would shift by one
    (part / "new").mkdir()
    shutil.copy(next((val_folder / "8_bag").iterdir()), part / "new" / "a.png")
    found = pair([f"data={train_folder}", f"data.val={part}"])
    assert found.class_names == ["1_trouser", "5_sandal", "8_bag", "9_ankle-boot", "new"]
    assert np.bincount(found.val_labels).tolist() == [0, 15, 15, 15, 1] and found.classes == 5


def test_align_by_hand():
    names, train, val = align(["a", "b"], np.array([0, 1]), ["b", "c"], np.array([0, 1, -1]))
    assert names == ["a", "b", "c"] and train.tolist() == [0, 1] and val.tolist() == [1, 2, -1]
    with pytest.raises(UserError, match="no name in common"):
        align(["a"], np.array([0]), ["x"], np.array([0]))
    assert align(None, np.array([3]), ["x"], np.array([0]))[2].tolist() == [0]


def test_unlabelled_data_is_refused(tmp_path: Path, train_folder: Path):
    for i, path in enumerate(sorted(train_folder.rglob("*.png"))[:4]):
        shutil.copy(path, tmp_path / f"{i}.png")
    with pytest.raises(UserError, match=r"have no labels.*class folders"):
        pair([f"data={tmp_path}"])
    with pytest.raises(UserError, match="have no labels"):
        pair([f"eval.train={train_folder}", f"eval.val={tmp_path}"])
    with pytest.raises(UserError, match="no data; give data=FOLDER"):
        pair([])


def test_partly_labelled_list(tmp_path: Path, train_folder: Path):
    lines = []
    for i, path in enumerate(sorted(train_folder.rglob("*.png"))[::8]):
        lines.append(f"{path}\t{i % 2}" if i % 5 else str(path))
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    found, left_out = labelled_only(pair([f"data={tmp_path / 'list.txt'}", f"data.val={tmp_path / 'list.txt'}"]))
    assert left_out == {"train": 4, "val": 4} and len(found.train) == 16 and (found.train_labels >= 0).all()


def test_tiny_folders(tmp_path: Path, train_folder: Path):
    for name in ("a", "b"):
        (tmp_path / "one" / name).mkdir(parents=True)
        shutil.copy(next(train_folder.rglob("*.png")), tmp_path / "one" / name / "x.png")
    with pytest.raises(UserError, match="cannot be split"):
        pair([f"data={tmp_path / 'one'}"])


def test_at_most_so_many():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 20 + [-1] * 10)
    chosen = stratified_choice(labels, 22, seed=0)
    assert len(chosen) == 22 and (np.diff(chosen) > 0).all()
    assert np.bincount(labels[chosen] + 1).tolist() == [2, 10, 6, 4]
    assert np.array_equal(chosen, stratified_choice(labels, 22, seed=0))
    assert not np.array_equal(chosen, stratified_choice(labels, 22, seed=1))
    assert len(stratified_choice(np.arange(1000), 7, seed=0)) == 7


def test_max_train(train_folder: Path, val_folder: Path):
    found = pair([f"data={train_folder}", f"data.val={val_folder}", "max_train=20", "max_val=8"])
    assert np.bincount(found.train_labels).tolist() == [5] * 4 and len(found.val) == 8


def test_colour_and_grey_pixels(tmp_path: Path, train_folder: Path):
    assert pair([f"data={train_folder}"]).train.source.channels == 1
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (10 * i, 40, 200)).save(tmp_path / name / f"{i}.png")
    assert pair([f"data={tmp_path}"]).train.source.channels == 3


def test_replaced_images_change_the_fingerprint_and_one_of_many_the_cache_key(tmp_path: Path, train_folder: Path):
    copy = shutil.copytree(train_folder, tmp_path / "copy")
    before, other = pair([f"data={copy}"]).train, pair([f"data={train_folder}"]).train
    assert before.fingerprint() == other.fingerprint()  # wherever they lie
    changed = Path(before.source.name(int(before.indices[3])))
    content = before.fingerprint(), before.cache_key()
    changed.write_bytes(b"<html>")
    after = pair([f"data={copy}"]).train
    assert after.fingerprint() == content[0] and after.cache_key() != content[1]
    for path in copy.rglob("*.png"):
        Image.new("L", (28, 28), 77).save(path)
    assert pair([f"data={copy}"]).train.fingerprint() != content[0]
