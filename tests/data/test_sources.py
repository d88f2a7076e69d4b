"""Everything `data=` may be, and what is said when it is something else."""

import gzip
import os
import pickle
import shutil
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from selfsup.config import DataConfig
from selfsup.data import sources
from selfsup.data.base import Names, retried
from selfsup.data.decode import BadImage
from selfsup.data.sources import open_source, wrap_dataset
from selfsup.errors import UserError


def save(path, value=0, size=(6, 5), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode in ("L", "P") else (value,) * len(mode)).save(path)
    return path


def values(source):
    """The grey value of each (uniform) image."""
    return [int(np.asarray(source.read(i)).flat[0]) for i in range(len(source))]


# ----------------------------------------------------------------------------------------------------------- folders


def test_flat_folder(tmp_path):
    for i, name in enumerate(["b.PNG", "a.png", "c.Jpeg", "d.webp", "e.BMP", "f.TIFF", "g.tif", "h.JPG"]):
        save(tmp_path / name, i * 20)
    np.save(tmp_path / "i.npy", np.full((5, 6), 200, np.uint8))
    os.rename(tmp_path / "i.npy", tmp_path / "i.NPY")
    (tmp_path / "notes.txt").write_text("no image")
    save(tmp_path / ".hidden.png")
    source = open_source(str(tmp_path), channels=1)
    assert [os.path.basename(source.name(i)) for i in range(len(source))] == [
        "a.png", "b.PNG", "c.Jpeg", "d.webp", "e.BMP", "f.TIFF", "g.tif", "h.JPG", "i.NPY"
    ]  # fmt: skip
    assert np.abs(np.array(values(source)) - [20, 0, 40, 60, 80, 100, 120, 140, 200]).max() <= 2
    assert source.labels is None and source.classes is None and source.label(3) == -1


def test_class_folders_nested_and_sorted(tmp_path):
    save(tmp_path / "dog" / "x" / "1.png", 1)
    save(tmp_path / "cat" / "2.png", 2)
    save(tmp_path / "cat" / "1.png", 3)
    save(tmp_path / "ant" / "deep" / "er" / "9.png", 4)
    source = open_source(str(tmp_path), channels=3)
    assert source.classes == ["ant", "cat", "dog"]
    assert source.labels.tolist() == [0, 1, 1, 2] and source.labels.dtype == np.int64
    assert [np.asarray(source.read(i))[0, 0, 0] for i in range(4)] == [4, 3, 2, 1]
    assert source.label(3) == 2


def test_one_folder_or_mixed_levels_are_no_classes(tmp_path):
    save(tmp_path / "images" / "1.png")
    assert open_source(str(tmp_path), channels=1).labels is None
    save(tmp_path / "more" / "1.png")
    assert open_source(str(tmp_path), channels=1).labels is not None
    save(tmp_path / "3.png")
    assert open_source(str(tmp_path), channels=1).labels is None


def test_linked_folders_are_followed_and_circles_end(tmp_path):
    save(tmp_path / "elsewhere" / "1.png")
    root = tmp_path / "root"
    save(root / "b" / "2.png")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "up").symlink_to(root)
    source = open_source(str(root), channels=1)
    assert {os.path.relpath(source.name(i), root) for i in range(len(source))} >= {"a/1.png", "b/2.png"}
    assert len(source) < 10


@pytest.mark.skipif(sys.platform != "linux", reason="names that are not UTF-8")
def test_undecodable_names(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")
    save(tmp_path / "x.png", 9)
    os.rename(tmp_path / "x.png", path)
    source = open_source(str(tmp_path), channels=1)
    assert values(source) == [9]
    source.name(0).encode()  # can be printed and written


def test_bad_files_are_bad_images(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>")
    save(tmp_path / "real.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    source = open_source(str(tmp_path), channels=3)
    reasons = {}
    for i in range(len(source)):
        try:
            source.read(i)
        except BadImage as error:
            reasons[os.path.basename(source.name(i))] = str(error)
    assert reasons.keys() == {"empty.jpg", "page.jpg", "gone.png"}
    assert "0 bytes" in reasons["empty.jpg"] and "HTML" in reasons["page.jpg"] and "No such file" in reasons["gone.png"]


def test_limits_come_from_the_configuration(tmp_path):
    save(tmp_path / "a.png", size=(100, 100))
    with pytest.raises(BadImage, match="max_pixels=99"):
        open_source(str(tmp_path), channels=1, config=DataConfig(max_pixels=99)).read(0)
    np.save(tmp_path / "b.npy", np.full((4, 4, 13), 500, np.int16))
    source = open_source(str(tmp_path), channels=13, config=DataConfig(value_range=(0, 1000)))
    assert (source.read(1) == 128).all()


def test_what_is_said_of_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_source(str(tmp_path / "none"), channels=3)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError, match=r"did you mean .*pictures"):
        open_source(str(tmp_path / "picture"), channels=3)
    with pytest.raises(UserError, match=r"no images in .*looked in it and below for \.jpg"):
        open_source(str(tmp_path / "pictures"), channels=3)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match="neither"):
        open_source(str(tmp_path / "a.csv"), channels=3)
    with pytest.raises(UserError, match="demo:val"):
        open_source("demo:test", channels=1)
    for bad in (tmp_path / "none", tmp_path / "pictures"):
        with pytest.raises(UserError) as caught:
            open_source(str(bad), channels=3)
        assert len(str(caught.value).splitlines()) <= 2


def test_fingerprint(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / "one" / f"{name}.png")
    first = open_source(str(tmp_path / "one"), channels=1).fingerprint()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert open_source(str(tmp_path / "two"), channels=3).fingerprint() == first  # moved, not changed
    save(tmp_path / "two" / "c.png")
    added = open_source(str(tmp_path / "two"), channels=1).fingerprint()
    os.remove(tmp_path / "two" / "a.png")
    removed = open_source(str(tmp_path / "two"), channels=1).fingerprint()
    assert len({first, added, removed}) == 3 and len(first) == 64


def test_names_cost_no_objects():
    names = Names()
    for i in range(200_000):
        names.append(b"n%08d.jpg" % i)
    assert len(names) == 200_000 and names[123_456] == b"n00123456.jpg"
    assert len(pickle.dumps(names)) < 200_000 * 24
    with pytest.raises(IndexError):
        names[200_000]
    split = Names()
    for name in (b"ab", b"c"):
        split.append(name)
    other = Names()
    for name in (b"a", b"bc"):
        other.append(name)
    assert split.fingerprint != other.fingerprint


def test_network_stumbles_are_retried(monkeypatch):
    import errno

    from selfsup.data import base

    monkeypatch.setattr(base, "_PAUSES", (0.0, 0.0))
    calls = []

    def read(fail, code):
        calls.append(1)
        if len(calls) <= fail:
            raise OSError(code, os.strerror(code))
        return b"x"

    assert retried(lambda: read(2, errno.ESTALE)) == b"x" and len(calls) == 3
    calls.clear()
    with pytest.raises(BadImage, match="Input/output"):
        retried(lambda: read(9, errno.EIO))
    assert len(calls) == 3
    calls.clear()
    with pytest.raises(BadImage):
        retried(lambda: read(9, errno.ENOENT))
    assert len(calls) == 1
    with pytest.raises(OSError, match="Too many open files"):  # not the image's fault
        retried(lambda: read(9, errno.EMFILE))


# ------------------------------------------------------------------------------------------------------------- lists


def test_list_with_labels(tmp_path):
    for i, name in enumerate(["a.png", "with space.png", "sub/c.JPG", "d.png"]):
        save(tmp_path / "images" / name, i * 50)
    absolute = tmp_path / "images" / "d.png"
    lines = ["images/a.png 3", "images/with space.png\t0", "", "images/sub/c.JPG 1", str(absolute)]
    (tmp_path / "list.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    source = open_source(str(tmp_path / "list.txt"), channels=1)
    assert len(source) == 4 and source.labels.tolist() == [3, 0, 1, -1]
    assert source.classes == ["0", "1", "2", "3"]
    assert np.abs(np.array(values(source)) - [0, 50, 100, 150]).max() <= 2


def test_list_with_names_without_labels_and_spaces(tmp_path):
    for name in ("a b.png", "c.png"):
        save(tmp_path / name)
    (tmp_path / "plain.txt").write_text("a b.png\nc.png\n")
    plain = open_source(str(tmp_path / "plain.txt"), channels=1)
    assert plain.labels is None and [os.path.basename(plain.name(i)) for i in (0, 1)] == ["a b.png", "c.png"]
    (tmp_path / "named.txt").write_text("a b.png wolf\nc.png bear\na b.png wolf\n")
    named = open_source(str(tmp_path / "named.txt"), channels=1)
    assert named.classes == ["bear", "wolf"] and named.labels.tolist() == [1, 0, 1]


def test_list_mistakes(tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="names no files"):
        open_source(str(tmp_path / "empty.txt"), channels=1)
    (tmp_path / "wrong.txt").write_text("no/such.png 1\n")
    with pytest.raises(UserError, match=r"line 1: no file .*relative to the list"):
        open_source(str(tmp_path / "wrong.txt"), channels=1)


# ----------------------------------------------------------------------------------------------------------- archives


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip(tmp_path, compression):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for i, name in enumerate(["b/1.png", "a/2.PNG", "a/1.png"]):
            archive.write(save(tmp_path / f"{i}.png", i * 10), name)
        archive.writestr("a/readme.txt", "x")
        archive.writestr("__MACOSX/a/1.png", "x")
    source = open_source(str(path), channels=1)
    assert values(source) == [20, 10, 0] and source.labels.tolist() == [0, 0, 1] and source.classes == ["a", "b"]
    assert values(pickle.loads(pickle.dumps(source))) == [20, 10, 0]


def test_damaged_zip(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(save(tmp_path / "0.png", 0, (50, 50)), "0.png")
    source = open_source(str(path), channels=1)
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(BadImage, match="checksum"):
        source.read(0)
    path.write_bytes(data[:70])
    with pytest.raises(UserError, match="cannot be read"):
        open_source(str(path), channels=1)


def test_the_bundled_images_whatever_lies_here(tmp_path, monkeypatch):
    save(tmp_path / "demo" / "1.png")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("demo", channels=1)) == 10_000 and len(open_source("./demo", channels=1)) == 1


def test_the_bundled_images():
    train, val = open_source("demo", channels=1), open_source("demo:val", channels=3)
    assert (len(train), len(val)) == (10_000, 2_000)
    assert train.classes == val.classes and len(train.classes) == 10
    assert np.bincount(train.labels).min() > 900 and np.bincount(val.labels).min() > 150
    assert train.read(0).size == (28, 28) and val.read(1999).mode == "RGB"
    assert train.fingerprint() == open_source("demo:train", channels=3).fingerprint() != val.fingerprint()


ORIGINAL = "/usr/share/datasets/fashion-mnist"


@pytest.mark.skipif(not os.path.isdir(ORIGINAL), reason="needs Debian's dataset-fashion-mnist")
def test_the_bundled_images_are_the_original_ones():
    for spec, stem, count in (("demo:train", "train", 10_000), ("demo:val", "t10k", 2_000)):
        source = open_source(spec, channels=1)
        with (
            gzip.open(f"{ORIGINAL}/{stem}-images-idx3-ubyte.gz") as images,
            gzip.open(f"{ORIGINAL}/{stem}-labels-idx1-ubyte.gz") as classes,
        ):
            pixels = np.frombuffer(images.read(16 + count * 784), np.uint8, offset=16)
            labels = np.frombuffer(classes.read(8 + count), np.uint8, offset=8)
        for i in range(0, count, 97):
            number = int(source.name(i)[-9:-4])
            assert (np.asarray(source.read(i)).ravel() == pixels[number * 784 : (number + 1) * 784]).all()
            assert source.label(i) == labels[number]


# ------------------------------------------------------------------------------------------------- Python's data sets


class Items(Dataset):
    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def test_wrapped_items_of_every_kind(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    path = tmp_path / "a.png"
    image.save(path)
    chw = torch.from_numpy(array).permute(2, 0, 1)
    items = [image, array, chw, chw / 255, (chw / 255).double(), path, str(path), path.read_bytes(), chw.numpy()]
    source = wrap_dataset(Items([(item, i) for i, item in enumerate(items)]), channels=3)
    for i in range(len(items)):
        assert (np.asarray(source.read(i)) == array).all(), i
    assert source.label(4) == 4 and source.labels.tolist() == list(range(len(items)))
    bare = wrap_dataset(Items([image, {"image": array, "label": 7}]), channels=1, name="mine")
    assert bare.labels is None and bare.read(1).mode == "L" and bare.name(1) == "mine[1]"
    keyed = wrap_dataset(Items([{"image": array, "label": 7}] * 2), channels=3)
    assert keyed.labels.tolist() == [7, 7]
    thirteen = wrap_dataset(TensorDataset(torch.rand(2, 13, 8, 8), torch.tensor([1, 0])), channels=13)
    assert thirteen.read(0).shape == (8, 8, 13) and thirteen.labels.tolist() == [1, 0]
    grey = wrap_dataset(TensorDataset(torch.rand(2, 1, 8, 8)), channels=3)
    assert grey.read(0).mode == "RGB" and grey.labels is None


def test_labels_are_read_cheaply_where_possible():
    class Counting(Items):
        def __getitem__(self, i):
            raise AssertionError("read")

    dataset = Counting([0] * 5, targets=[3, 1, 2, 0, 3], classes=list("abcd"))
    source = wrap_dataset(dataset, channels=3)
    assert source.labels.tolist() == [3, 1, 2, 0, 3] and source.classes == list("abcd")
    assert wrap_dataset(Subset(dataset, [4, 1]), channels=3).labels.tolist() == [3, 1]


def test_wrapping_mistakes():
    with pytest.raises(UserError, match="random access"):
        wrap_dataset(iter([1, 2]), channels=3)
    with pytest.raises(UserError, match="empty"):
        wrap_dataset(Items([]), channels=3)
    with pytest.raises(UserError, match="gives int"):
        wrap_dataset(Items([5]), channels=3).read(0)

    class Broken(Items):
        def __getitem__(self, i):
            raise [OSError("image file is truncated"), KeyError("a bug")][i]

    source = wrap_dataset(Broken([0, 1]), channels=3)
    with pytest.raises(BadImage, match="truncated"):
        source.read(0)
    with pytest.raises(KeyError):  # a defect in the data set is not hidden as a bad image
        source.read(1)
    with pytest.raises(BadImage, match="13 are asked for"):
        wrap_dataset(Items([torch.rand(4, 8, 8)]), channels=13).read(0)


def write_fashion_mnist(root, count):
    """The first images as torchvision stores them."""
    source = open_source("demo:val", channels=1)
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    pixels = b"".join(source.read(i).tobytes() for i in range(count))
    for stem in ("train", "t10k"):
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pixels)
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, count) + bytes(i % 10 for i in range(count))
        )


@pytest.mark.parametrize("split", ["", ":train", ":val"])
def test_torchvision(tmp_path, split):
    write_fashion_mnist(tmp_path, 30)
    source = open_source(f"torchvision:FashionMNIST:{tmp_path}{split}", channels=3)
    assert len(source) == 30 and source.read(0).mode == "RGB" and source.label(13) == 3 and len(source.classes) == 10


def test_torchvision_mistakes(tmp_path):
    with pytest.raises(UserError, match="did you mean FashionMNIST"):
        open_source(f"torchvision:FashonMNIST:{tmp_path}", channels=3)
    with pytest.raises(UserError, match="fetch it once: python -c"):
        open_source(f"torchvision:CIFAR10:{tmp_path}", channels=3)


def test_timm(tmp_path):
    write_fashion_mnist(tmp_path, 20)
    source = open_source(f"timm:torch/fashion_mnist:{tmp_path}:train", channels=1)
    assert len(source) == 20 and source.read(3).mode == "L"
    save(tmp_path / "f" / "train" / "a" / "1.png", 5)
    save(tmp_path / "f" / "train" / "b" / "1.png", 6)
    folder = open_source(f"timm::{tmp_path / 'f'}:train", channels=1)
    assert values(folder) == [5, 6] and folder.label(1) == 1
    with pytest.raises(UserError, match="timm"):
        open_source(f"timm:torch/cifar10:{tmp_path}", channels=3)


def test_subset():
    whole = open_source("demo:val", channels=1)
    part = sources.Subset(whole, [5, 1999, 7])
    assert len(part) == 3 and part.labels.tolist() == whole.labels[[5, 1999, 7]].tolist()
    assert part.name(1) == whole.name(1999) and part.read(1).tobytes() == whole.read(1999).tobytes()
    assert part.fingerprint() != sources.Subset(whole, [5, 7, 1999]).fingerprint()
