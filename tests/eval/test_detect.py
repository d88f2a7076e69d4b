"""`selfsup eval detect` from end to end on composed pictures: figures, files, bad input, the detector that learns by heart."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup.errors import UserError
from selfsup.eval import detect
from selfsup.eval.descent import steps_of
from selfsup.eval.detect_heads import box_loss, centerness, dense_losses, scores
from selfsup.eval.detect_models import create_detector
from selfsup.eval.detect_train import EPOCHS, as_images, named_parameters
from selfsup.eval.settings import resolve
from selfsup.eval.targets import Target
from selfsup.losses import boxes as loss
from selfsup.optim import parameter_groups
from tests.eval import detection, segmentation

SMALL = ["size=64", "max_size=96", "width=32", "strides=8,16", "workers=0", "device=cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return detection.build(tmp_path_factory.mktemp("boxes"), train=8, val=3)


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return segmentation.exported(tmp_path_factory.mktemp("vit"), **segmentation.VIT)


@pytest.fixture(scope="module")
def conv(tmp_path_factory) -> Path:
    return segmentation.exported(tmp_path_factory.mktemp("conv"), **segmentation.CONV)


def words(data: Path, *more: str) -> list[str]:
    own = [f"data={data}/train/images", f"boxes={data}/train/boxes.json", f"data.val={data}/val/images"]
    return [*own, f"boxes.val={data}/val/boxes.json", *SMALL, "batch=2", *more]


def evaluated(target: Path, given: list[str], out: Path) -> dict:
    return detect.evaluate(str(target), resolve("detect", given), out)


def test_overfits_eight_images(data: Path, conv: Path, tmp_path: Path):
    given = words(data, f"data.val={data}/train/images", f"boxes.val={data}/train/boxes.json", "batch=8", "pictures=0")
    given += ["detector=retinanet", "trunk=finetune", "augment=false", "steps=120", "lr=0.003", "anchor=2"]
    result = evaluated(conv, given, tmp_path / "r.json")
    assert result["metrics"]["map50"] > 0.9 and result["metrics"]["map"] > 0.6
    low, high = result["protocol"]["map50_interval_95"]
    assert low <= result["metrics"]["map50"] <= high


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("vit", ["detector=fcos", "loss=ciou", "trunk=finetune", "workers=1"]),
        ("conv", ["detector=fcos", "confidence=iou", "loss=smooth_l1", "precision=bf16"]),
        ("conv", ["detector=retinanet", "confidence=iou", "loss=diou", "anchor=2"]),
        ("vit", ["detector=retinanet", "confidence=varifocal", "loss=iou"]),
        ("conv", ["detector=fasterrcnn", "loss=giou", "loss.gamma=1", "anchor=4", "batch=1"]),
    ],
)
def test_every_way_gives_a_result(kind: str, more: list[str], data: Path, vit: Path, conv: Path, tmp_path: Path):
    out = tmp_path / "r.json"
    result = evaluated({"vit": vit, "conv": conv}[kind], words(data, "steps=2", "threshold=0.001", *more), out)
    stored = json.loads(out.read_text())
    assert stored["metrics"] == pytest.approx(result["metrics"])
    assert {"map", "map50", "map75", "mar100"} <= set(stored["metrics"])
    assert all(0 <= value <= 1 for value in stored["metrics"].values())
    protocol = stored["protocol"]
    assert (
        [row["class"] for row in stored["per_class"]]
        == protocol["class_names"]
        == list(detection.composed_boxes.CLASSES)
    )
    assert sum(row["objects"] for row in stored["per_class"]) == protocol["val_boxes"] and protocol["val_images"] == 3
    assert protocol["filled_up_to"] == 96 and protocol["settings"]["loss"]["box"] in "".join(more)
    assert set(protocol["training"]["final_parts"]) >= {"box", "class"} and "pycocotools" in protocol["counted_by"]
    with Image.open(tmp_path / "r.png") as sheet:
        assert sheet.width > 500 and sheet.height > 500
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 500


@pytest.mark.systems("Detection: FPN heads, IoU losses, focal loss, IoU-aware confidence")
def test_the_command_line(data: Path, conv: Path, tmp_path: Path, monkeypatch, capsys):
    """The documented command, with .xml files and a seeded split."""
    from selfsup import cli

    out = tmp_path / "mine.json"
    given = [f"data={data}/train/images", f"boxes={data}/train/voc", "detector=fcos", *SMALL, "steps=3", "batch=2"]
    monkeypatch.setattr(sys, "argv", ["selfsup", "eval", "detect", str(conv), *given, "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    assert end.value.code == 0 and "mAP75" in said.out and "mine.json" in said.out and "mine.png" in said.out
    assert "training detector=fcos" in said.err and "in " in said.err
    first = json.loads(out.read_text())
    assert "seeded 6/2" in first["protocol"]["split"] and first["protocol"]["format"] == "voc"
    again = evaluated(conv, given, tmp_path / "again.json")
    assert again["metrics"] == first["metrics"] and again["protocol"]["training"] == first["protocol"]["training"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["boxes=/nowhere.json"], "boxes=/nowhere.json: no such file"),
        (["detector=fco"], "did you mean fcos"),
        (["detector=fasterrcnn", "confidence=iou"], "confidence=iou"),
        (["detector=retinanet", "confidence=centerness"], "confidence=centerness"),
        (["strides=8,32"], "strides=[8, 32]"),
        (["width=48"], "width"),
        (["max_size=60"], "max_size=60 is smaller than size=64"),
        (["classes=a,b,c"], "unknown class"),
    ],
)
def test_bad_input_exits_2(more: list[str], said: str, data: Path, vit: Path, tmp_path: Path, monkeypatch, capsys):
    from selfsup import cli

    out = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["selfsup", "eval", "detect", str(vit), *words(data, *more), "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    text = capsys.readouterr().err
    assert end.value.code == 2 and said in text and "Traceback" not in text and not out.exists()


def test_without_pycocotools_the_extra_is_named(data: Path, vit: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(UserError, match=r"pip install 'selfsup\[detect\]'"):
        evaluated(vit, words(data), tmp_path / "r.json")


# ---------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "fasterrcnn"])
@pytest.mark.parametrize("trunk", ["frozen", "finetune"])
def test_what_is_trained(detector: str, trunk: str):
    """A frozen trunk has no gradients and keeps its mode; layer-wise decay is the trunk's alone."""
    net = segmentation.backbone(**segmentation.VIT)
    settings = resolve("detect", [f"detector={detector}", f"trunk={trunk}", "width=32", "strides=8,16"]).complete()
    model = create_detector(net, 2, 64, settings).train()
    first = 1 if detector == "fasterrcnn" else 0
    boxes = torch.tensor([[8.0, 8, 40, 40]])
    images = [torch.rand(3, 50, 64), torch.rand(3, 64, 40)]
    targets = [
        {"boxes": boxes, "labels": torch.tensor([first + 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()},  # nothing in it
    ]
    parts = model(images, targets)
    total = sum(parts.values())
    assert torch.isfinite(total) and {"box", "class"} <= parts.keys()
    total.backward()
    moved = any(p.grad is not None for p in net.parameters())
    assert moved == (trunk == "finetune") and net.training == (trunk == "finetune")
    groups = parameter_groups(named_parameters(model), layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert {scale[n] for n in scale if not n.startswith("pyramid.")} == {1.0}
    if trunk == "finetune":
        below = next(scale[n] for n in scale if "patch_embed" in n)
        assert below == pytest.approx(0.5**5) and any(s == 0.5 for s in scale.values())  # 4 blocks, and what is above


def test_an_image_does_not_depend_on_its_neighbours():
    net = segmentation.backbone(**segmentation.CONV)
    settings = resolve("detect", ["detector=fcos", "threshold=0.0", "width=32", "strides=8,16"]).complete()
    torch.manual_seed(0)
    model = create_detector(net, 2, 96, settings).eval()
    one, other = torch.rand(3, 64, 80), torch.rand(3, 90, 60)
    with torch.no_grad():
        alone, both = model([one])[0], model([one, other])[0]
    assert len(alone["boxes"]) > 10 and torch.allclose(alone["boxes"][:10], both["boxes"][:10], atol=1e-3)
    assert alone["boxes"][:, 2].max() <= 80 and alone["boxes"][:, 3].max() <= 64


def test_a_backbone_of_one_size():
    net = segmentation.backbone(**{**segmentation.VIT, "dynamic_img_size": False})
    target = Target("x", "backbone", net, "", torch.device("cpu"))
    settings = resolve("detect", ["detector=fcos", "size=36", "width=32", "threshold=0.0"]).complete()
    assert net.fixed_size and detect.sides(target, settings) == (36, 48, 48)
    assert len(create_detector(net, 2, 48, settings).eval()([torch.rand(3, 36, 44)])[0]["boxes"]) > 0
    with pytest.raises(UserError, match="takes 48 pixels alone"):
        detect.sides(target, resolve("detect", ["size=64"]))
    free = Target("x", "backbone", segmentation.backbone(**segmentation.CONV), "", torch.device("cpu"))
    assert detect.sides(free, resolve("detect", ["size=50"])) == (50, 83, 96)


def test_dense_losses_by_hand():
    """Two images, three places: loss of class, box and quality from the formulas; one place counts nowhere."""
    settings = resolve("detect", ["detector=fcos", "loss=giou", "loss.weight=2"]).complete()
    net = segmentation.backbone(**segmentation.CONV)
    coder = create_detector(net, 2, 64, settings).box_coder
    g = torch.Generator().manual_seed(3)
    logits, offsets = torch.randn(2, 3, 2, generator=g), torch.rand(2, 3, 4, generator=g) + 0.5
    quality = torch.randn(2, 3, 1, generator=g)
    anchors = torch.tensor([[0.0, 0, 8, 8], [4, 4, 12, 12], [12, 12, 20, 20]])
    targets = [
        {"boxes": torch.tensor([[0.0, 1, 14, 16]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()},
    ]
    matched = [torch.tensor([0, -2, -1]), torch.tensor([-1, -1, -1])]
    outputs = {"cls_logits": logits, "bbox_regression": offsets, "q": quality}
    found = dense_losses(targets, outputs, [anchors, anchors], matched, coder, settings, "q")
    left, top, right, low = (offsets[0, 0] * 8).tolist()  # of the place (4, 4), in strides of 8
    box = torch.tensor([[4 - left, 4 - top, 4 + right, 4 + low]])
    assert found["box"].item() == pytest.approx(2 * loss.giou_loss(box, targets[0]["boxes"]).item(), rel=1e-5)
    total = 0.0
    for image, place, kind in [(0, 0, 1), (0, 2, -1), (1, 0, -1), (1, 1, -1), (1, 2, -1)]:
        for k in range(2):
            p = torch.sigmoid(logits[image, place, k]).item()
            total += -0.25 * (1 - p) ** 2 * math.log(p) if k == kind else -0.75 * p**2 * math.log(1 - p)
    assert found["class"].item() == pytest.approx(total, rel=1e-5)  # over one place with an object
    central = math.sqrt(4 / 10 * 3 / 12)
    assert centerness(anchors[:1], targets[0]["boxes"]).item() == pytest.approx(central)
    q = torch.sigmoid(quality[0, 0, 0]).item()
    wanted = -central * math.log(q) - (1 - central) * math.log(1 - q)
    assert found["quality"].item() == pytest.approx(wanted, rel=1e-5)
    iou = loss.paired_iou(box, targets[0]["boxes"]).item()
    told = resolve("detect", ["detector=fcos", "confidence=iou"]).complete()
    found = dense_losses(targets, outputs, [anchors, anchors], matched, coder, told, "q")
    assert found["quality"].item() == pytest.approx(-iou * math.log(q) - (1 - iou) * math.log(1 - q), rel=1e-5)
    told = resolve("detect", ["detector=retinanet", "confidence=varifocal"]).complete()
    truth = torch.zeros(5, 2)
    truth[0, 1] = iou
    found = dense_losses(targets, outputs, [anchors, anchors], matched, coder, told, None)
    rows = logits.flatten(0, 1)[[0, 2, 3, 4, 5]]
    assert found["class"].item() == pytest.approx(loss.varifocal(rows, truth).item(), rel=1e-5)
    assert scores(logits, quality, settings) == pytest.approx((logits.sigmoid() * quality.sigmoid()).sqrt(), rel=1e-5)


def test_smooth_l1_needs_the_right_encoding():
    """Of a box that is predicted exactly every loss is 0, with both coders."""
    from torchvision.models.detection._utils import BoxCoder, BoxLinearCoder

    anchors, boxes = torch.tensor([[0.0, 0, 8, 16]]), torch.tensor([[1.0, -2, 12, 11]])
    for coder in (BoxCoder((10.0, 10.0, 5.0, 5.0)), BoxLinearCoder()):
        linear = isinstance(coder, BoxLinearCoder)
        exact = coder.encode(anchors, boxes) if linear else coder.encode_single(boxes, anchors)
        for name in ("smooth_l1", *loss.OVERLAP):
            settings = resolve("detect", [f"loss={name}"]).complete()
            each, predicted = box_loss(exact, anchors, boxes, coder, settings.loss)
            assert each.item() == pytest.approx(0, abs=1e-5) and torch.allclose(predicted, boxes, atol=1e-4)
            assert box_loss(exact + 0.3, anchors, boxes, coder, settings.loss)[0].item() > 0.02


@pytest.mark.parametrize("detector", ["fcos", "retinanet"])
def test_scores_reach_the_detections(detector: str):
    """The best box's score is the best of `scores`, whatever torchvision does with what it is given."""
    net = segmentation.backbone(**segmentation.CONV)
    given = [
        f"detector={detector}",
        "confidence=iou",
        "confidence_power=0.7",
        "threshold=0.0",
        "width=32",
        "strides=8,16",
    ]
    settings = resolve("detect", given).complete()
    torch.manual_seed(1)
    model = create_detector(net, 2, 64, settings).eval()
    kept = {}
    model.head.register_forward_hook(lambda module, args, out: kept.update(out))
    with torch.no_grad():
        found = model(as_images([torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)], torch.device("cpu")))[0]
    quality = kept["bbox_ctrness" if detector == "fcos" else "quality"]
    best = scores(kept["cls_logits"], quality, settings).max().item()
    assert found["scores"].max().item() == pytest.approx(best, rel=1e-3) and best > 0.01


def test_defaults_and_lengths():
    fcos, faster = (resolve("detect", [f"detector={d}"]).complete() for d in ("fcos", "fasterrcnn"))
    assert (fcos.loss.box, fcos.confidence, fcos.strides, fcos.loss.gamma) == ("giou", "centerness", (8, 16, 32), 2.0)
    assert (faster.loss.box, faster.anchor, faster.strides, faster.loss.gamma) == (
        "smooth_l1",
        8.0,
        (4, 8, 16, 32),
        0.0,
    )
    assert resolve("detect", ["loss=ciou", "loss.beta=0.5"]).complete().loss.box == "ciou"
    assert steps_of(fcos, 8, EPOCHS) == 300 and steps_of(fcos, 8000, EPOCHS) == 24000
    assert steps_of(resolve("detect", ["epochs=2"]), 80, EPOCHS) == 20
