"""Files of boxes: COCO, Pascal VOC and YOLO say the same; what is wrong is named; batches move boxes with their images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import composed_boxes
from selfsup.errors import UserError
from selfsup.eval.detect_data import Batches, Picture, check, class_names, fingerprint, fit, transformed
from selfsup.eval.detect_formats import read_boxes
from selfsup.eval.detect_layouts import open_parts
from selfsup.eval.segment_data import Classes, Reader
from selfsup.eval.settings import resolve
from tests.eval import detection

NAMES = list(composed_boxes.CLASSES)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return detection.build(tmp_path_factory.mktemp("boxes"), train=6, val=2)


def read(images: Path, boxes: Path, *more: str) -> list[Picture]:
    settings = resolve("detect", list(more))
    raw = read_boxes(images, boxes, None, settings.voc_origin)
    return check(raw, class_names(raw, raw), settings, "train")[0]


def coco(folder: Path, **changed) -> Path:
    """One image of 60 x 40 pixels, two boxes; parts of the file changed."""
    detection.image(folder / "images" / "a.png")
    row = {"id": 5, "image_id": 9, "category_id": 3, "bbox": [10, 5, 20, 10], "iscrowd": 0}
    found = {
        "images": [{"id": 9, "file_name": "a.png", "width": 60, "height": 40}],
        "annotations": [row, {**row, "id": 6, "category_id": 90, "bbox": [0, 0, 60, 40], "iscrowd": 1, "area": 77.0}],
        "categories": [{"id": 90, "name": "car"}, {"id": 3, "name": "dog"}],
    }
    for key, value in changed.items():
        if key in found:
            found[key] = value
        else:
            found["annotations"][0][key] = value
    path = folder / "boxes.json"
    path.write_text(json.dumps(found))
    return path


def voc(folder: Path, body: str, name: str = "a.xml") -> Path:
    detection.image(folder / "images" / "a.png")
    path = folder / "voc" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"<annotation><filename>a.png</filename>{body}</annotation>")
    return path.parent


def thing(x1: float, y1: float, x2: float, y2: float, more: str = "") -> str:
    corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    return f"<object><name>dog</name>{more}<bndbox>{corners}</bndbox></object>"


def test_the_three_formats_agree_with_what_was_composed(data: Path):
    wanted = list(composed_boxes.scenes("train", 6, 64))
    kinds = sorted(set(np.concatenate([k for _, _, k in wanted]).tolist()), key=lambda k: NAMES[k])
    for name, known in (("boxes.json", range(4)), ("voc", kinds), ("yolo", range(4))):
        found = read(data / "train" / "images", data / "train" / name)
        for picture, (pixels, boxes, labels) in zip(found, wanted, strict=True):
            assert picture.size == pixels.shape[:2] and not picture.ignored.any()
            assert np.abs(picture.boxes - boxes).max() < 1e-4
            assert [list(known)[k] for k in picture.labels] == labels.tolist()
            assert picture.areas == pytest.approx((boxes[:, 2:] - boxes[:, :2]).prod(1))
            assert np.asarray(Image.open(picture.path)).shape == pixels.shape


def test_gaps_in_ids_crowds_and_areas(tmp_path: Path):
    path = coco(tmp_path)
    raw = read_boxes(tmp_path / "images", path, None, 1)
    assert raw.names == ["dog", "car"]  # by id
    (one,) = read(tmp_path / "images", path)
    assert one.labels.tolist() == [0, 1] and one.ignored.tolist() == [False, True]
    assert one.boxes.tolist() == [[10, 5, 30, 15], [0, 0, 60, 40]] and one.areas.tolist() == [200, 77]


def test_voc_counts_from_one(tmp_path: Path):
    folder = voc(tmp_path, thing(1, 1, 60, 40) + thing(5, 5, 9, 9, "<difficult>1</difficult>"))
    (one,) = read(tmp_path / "images", folder)
    assert one.boxes.tolist() == [[0, 0, 60, 40], [4, 4, 9, 9]] and one.ignored.tolist() == [False, True]
    folder = voc(tmp_path, thing(0, 0, 59, 39))
    (one,) = read(tmp_path / "images", folder, "voc_origin=0")
    assert one.boxes.tolist() == [[0, 0, 60, 40]]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"category_id": 4}, r"annotations \(id 5\): unknown category_id 4; known: 90 \(car\), 3 \(dog\)"),
        ({"image_id": 1}, "image_id 1 is none of the images"),
        ({"bbox": [10, 5, 0, 10]}, r"image 9: box \(10, 5, 10, 15\) of a.png has no area"),
        ({"bbox": [50, 5, 20, 10]}, "is not inside its 60x40 pixels"),
        ({"bbox": [10, 5, 20]}, "four numbers"),
        ({"bbox": [1e999, 0, 1, 1]}, "not finite"),
        ({"images": [{"id": 9, "file_name": "b.png"}]}, "b.png is not there"),
        (
            {"images": [{"id": 9, "file_name": "a.png", "width": 40, "height": 60}]},
            "40x60 pixels, but .*a.png has 60x40",
        ),
        ({"categories": [{"id": 3, "name": "dog"}, {"id": 3, "name": "cat"}]}, "there twice"),
        ({"categories": {}}, "it has no lists"),
    ],
)
def test_bad_coco_is_named(changed: dict, said: str, tmp_path: Path):
    path = coco(tmp_path, **changed)
    with pytest.raises(UserError, match=said) as caught:
        read(tmp_path / "images", path)
    assert "boxes.json" in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_bad_boxes_are_left_out_when_asked(tmp_path: Path):
    path = coco(tmp_path, bbox=[50, 5, 20, 10])
    settings = resolve("detect", ["bad_boxes=skip"])
    raw = read_boxes(tmp_path / "images", path, None, 1)
    (one,), skipped = check(raw, class_names(raw, raw), settings, "train")
    assert skipped == 1 and one.labels.tolist() == [1]
    path = coco(tmp_path, bbox=[-0.4, 5, 60.7, 10])  # rounded: cut, and no fault
    assert read(tmp_path / "images", path)[0].boxes[0].tolist() == [0, 5, 60, 15]


def test_bad_voc_and_yolo_are_named(tmp_path: Path, data: Path):
    with pytest.raises(UserError, match=r"a.xml: bndbox/xmin is 'x'"):
        read(tmp_path / "images", voc(tmp_path, thing("x", 1, 2, 2)))
    (tmp_path / "voc" / "a.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"a.xml: not an .xml file"):
        read(tmp_path / "images", tmp_path / "voc")
    labels = tmp_path / "labels"
    labels.mkdir()
    (labels / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n")
    with pytest.raises(UserError, match="name no classes"):
        read(tmp_path / "images", labels)
    (labels / "classes.txt").write_text("dog\n")
    with pytest.raises(UserError, match=r"a.txt: line 2: unknown class 7"):
        read(tmp_path / "images", labels)
    (labels / "a.txt").write_text("0 0.5 0.5 0.1\n")
    with pytest.raises(UserError, match=r"a.txt: line 1"):
        read(tmp_path / "images", labels)
    (labels / "b.txt").write_text("")
    with pytest.raises(UserError, match=r"b.txt: no image"):
        read(tmp_path / "images", labels)
    with pytest.raises(UserError, match="no such file or folder"):
        read(tmp_path, tmp_path / "none")


def test_known_folders_and_the_split(tmp_path: Path, data: Path):
    for part in ("train", "val"):
        (tmp_path / "coco" / "annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / "coco" / f"{part}2017").symlink_to(data / part / "images")
        (tmp_path / "coco" / "annotations" / f"instances_{part}2017.json").symlink_to(data / part / "boxes.json")
    train, val, facts = open_parts(resolve("detect", [f"data={tmp_path}/coco"]))
    assert (len(train.images), len(val.images), facts["format"]) == (6, 2, "coco")
    root = tmp_path / "voc"
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "JPEGImages").symlink_to(data / "train" / "images")
    (root / "Annotations").symlink_to(data / "train" / "voc")
    (root / "ImageSets" / "Main" / "train.txt").write_text("00000\n00002\n00003\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("00001\n")
    train, val, _ = open_parts(resolve("detect", [f"data={root}", "max_train=2"]))
    assert len(train.images) == 2 and [r.path.name for r in val.images] == ["00001.png"]
    (root / "ImageSets" / "Main" / "val.txt").write_text("00001 00009\n")
    with pytest.raises(UserError, match=r"val.txt: names 00009"):
        open_parts(resolve("detect", [f"data={root}"]))
    words = [f"data={data}/train/images", f"boxes={data}/train/yolo", "val_fraction=0.4"]
    (train, val, facts), (same, _, _) = (open_parts(resolve("detect", words)) for _ in range(2))
    assert len(train.images) == 4 and len(val.images) == 2 and "seeded 4/2" in facts["split"]
    assert {r.path for r in train.images}.isdisjoint(r.path for r in val.images)
    assert [r.path for r in same.images] == [r.path for r in train.images]
    with pytest.raises(UserError, match="no boxes; give boxes="):
        open_parts(resolve("detect", [f"data={data}/train/images"]))


def test_boxes_move_with_their_images(data: Path):
    """A white square on black, found again after every change of size and mirror image."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:20, 30:50] = 255
    for size, flip in (((40, 60), False), ((80, 120), True), ((30, 45), True), ((60, 60), False)):
        image, boxes = transformed(pixels, np.array([[30, 10, 50, 20]], np.float32), size, flip)
        y, x = np.nonzero(image[..., 0] > 127)
        seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert image.shape[:2] == size and boxes[0].tolist() == pytest.approx(seen, abs=0.51)
    assert fit((40, 60), 80, 1000) == (80, 120) and fit((40, 60), 80, 90) == (60, 90)


def test_batches_are_drawn_from_the_step_alone(data: Path):
    found = read(data / "train" / "images", data / "train" / "boxes.json")
    settings = resolve("detect", ["batch=4", "scale=0.5,2"])
    reader = Reader(3, 10**6, None, Classes(NAMES, np.zeros(0)))
    made = [Batches(found, reader, settings, 64, 96, 96)[3] for _ in range(2)]
    for (a, b, k), (c, d, m) in zip(*made):
        assert torch.equal(a, c) and torch.equal(b, d) and torch.equal(k, m)
        high, wide = a.shape[:2]
        assert max(high, wide) <= 96 and b.min() >= 0 and (b[:, 2] <= wide).all() and (b[:, 3] <= high).all()
    assert len({a.shape for step in range(3) for a, _, _ in Batches(found, reader, settings, 64, 96, 96)[step]}) > 6
    assert fingerprint(found) != fingerprint(found[1:])
