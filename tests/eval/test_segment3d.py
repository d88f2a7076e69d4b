"""`selfsup eval segment3d` on a real brain: figures, files, windows, bad input; the decoder's shapes."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from selfsup.backbones import create_backbone
from selfsup.backbones.export import export_timm
from selfsup.cli import app
from selfsup.config import BackboneConfig
from selfsup.errors import UserError
from selfsup.eval.segment3d import evaluate
from selfsup.eval.settings import resolve
from selfsup.eval.volume_data import nearest, open_pairs, window
from selfsup.eval.volume_figures import counts, figures, hausdorff95, slices
from selfsup.eval.volume_unetr import UNETR
from tests import volumes


def backbone(**changes):
    options = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8, "img_size": 16, "in_chans": 1, **changes}
    torch.manual_seed(0)
    return create_backbone(BackboneConfig(name="vit3d_tiny", **options), mean=(0.5,), std=(0.25,)).eval()


@pytest.fixture(scope="module")
def brain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return volumes.build(tmp_path_factory.mktemp("brain"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_timm(backbone(), tmp_path_factory.mktemp("vit3d"))


def words(brain: Path, *more: str) -> list[str]:
    own = [f"data={brain}/train/images", f"masks={brain}/train/masks", "classes=background,grey,white", "width=4"]
    own += [f"data.val={brain}/val/images", f"masks.val={brain}/val/masks", "workers=0", "device=cpu", "batch=2"]
    return [*own, *more]


@pytest.mark.systems("UNETR (3-D)")
def test_tissues_of_a_real_brain(tmp_path: Path, brain: Path, folder: Path, capsys):
    out = tmp_path / "r.json"
    given = words(brain, "trunk=finetune", "steps=80", "lr=0.01", "size=24", "width=8", "hausdorff=true", "overlap=0.25")
    app(["eval", "segment3d", str(folder), *given, "--out", str(out)], standalone_mode=False)
    result = json.loads(out.read_text())
    assert result["metrics"]["dice"] > 0.65 and result["protocol"]["layers"] == [0, 1, 3]
    assert [row["class"] for row in result["per_class"]] == ["background", "grey", "white"]
    assert all(row["dice"] > 0.55 for row in result["per_class"]) and 0 < result["per_class"][2]["hausdorff95"] < 20
    assert (tmp_path / "r.png").is_file() and result["pictures"] == [str(tmp_path / "r.png")]
    assert "grey" in capsys.readouterr().out


def test_frozen_leaves_the_backbone_alone_and_runs_repeat(tmp_path: Path, brain: Path, folder: Path):
    given = words(brain, "steps=2", "pictures=0", "data.spacing=[4,4,4]", "data.percentiles=[0,100]")
    runs = [evaluate(str(folder), resolve("segment3d", given), tmp_path / f"{i}.json") for i in range(2)]
    assert runs[0]["metrics"] == runs[1]["metrics"] and runs[0]["protocol"]["levels"]["spacing"] == [4, 4, 4]
    model = UNETR(backbone(), 3, 4, frozen=True).train()
    model(torch.zeros(1, 1, 16, 16, 16)).sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters()) and not model.backbone.training
    assert runs[0]["protocol"]["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("patch", "depth", "layers"), [(2, 2, [1]), (4, 4, [1, 3]), (16, 12, [2, 5, 8, 11])])
def test_maps_after_each_part_of_the_blocks(patch: int, depth: int, layers: list[int]):
    model = UNETR(backbone(patch_size=patch, depth=depth, img_size=16), 5, 2, frozen=True)
    assert model.layers == layers and len(model.ups) == len(layers)
    assert model(torch.zeros(1, 1, 32, 16, 16)).shape == (1, 5, 32, 16, 16)


def test_figures_by_hand():
    truth = np.array([[[0, 1, 1, 2], [2, 2, -1, 0]]])
    found = np.array([[[0, 1, 2, 2], [2, 0, 1, 0]]])
    counted = np.stack([counts(found, truth, 4)])
    assert counted[0].tolist() == [[2, 1, 2, 0], [2, 2, 3, 0], [3, 1, 3, 0]]
    m = figures(counted)
    assert m["dice"] == pytest.approx((2 / 3 + 4 / 6) / 2) and m["voxel_accuracy"] == pytest.approx(5 / 7)
    assert m["miou"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 4) / 3)
    a, b = np.zeros((2, 8, 8, 8), np.int64)
    a[2:5, 2:5, 2:5], b[4:7, 2:5, 2:5] = 1, 1
    assert hausdorff95(a, b, 3, (3.0, 1.0, 1.0))[1] == pytest.approx(6.0) and np.isnan(hausdorff95(a, b, 3, None)[2])


def test_parts(brain: Path):
    x = np.arange(24).reshape(2, 3, 4)
    assert np.array_equal(window(x, np.array([1, 0, 2]), np.array([2, 3, 2]), -1)[0], x[1, :, 2:])
    assert (window(x, np.array([1, 0, 2]), np.array([2, 3, 2]), -1)[1] == -1).all()
    assert np.array_equal(nearest(x.repeat(2, 0).repeat(3, 2), (2, 3, 4)), x)
    rows = slices(np.zeros((1, 2, 3, 4), np.float32), x, x)
    assert [row[1].shape for row in rows] == [(3, 4), (2, 4), (2, 3)] and rows[0][0].shape == (3, 4, 1)
    split = open_pairs(resolve("segment3d", [f"data={brain}/train/images", f"masks={brain}/train/masks"]))  # type: ignore[arg-type]
    assert len(split[0]) == len(split[1]) == 1 and split[2].startswith("seeded 1/1")


def test_bad_input(tmp_path: Path, brain: Path, folder: Path):
    def fails(message: str, *more: str, target: Path = folder) -> None:
        with pytest.raises(UserError, match=message):
            evaluate(str(target), resolve("segment3d", words(brain, *more)), tmp_path / "r.json")  # type: ignore[arg-type]

    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir(), masks.mkdir()
    np.save(images / "a.npy", np.zeros((16, 16, 16), np.float32))
    pair = [f"data={images}", f"masks={masks}"]
    fails("masks: no volumes in it", *pair)
    nibabel.save(nibabel.Nifti1Image(np.zeros((16, 16, 16), np.uint8), np.eye(4)), masks / "b.nii.gz")
    fails(r"a.npy: no mask of this name in .*masks; suffixes may differ", *pair)
    np.save(masks / "a.npy", np.zeros((16, 16, 8), np.uint8))
    fails(r"a.npy: \[16, 16, 8\] voxels, but .*a.npy has \[16, 16, 16\]", *pair)
    np.save(masks / "a.npy", np.full((16, 16, 16), 0.5))
    fails("values from 0.5 to 0.5; ids are whole numbers, 0 to 65535", *pair)
    np.save(masks / "a.npy", np.full((16, 16, 16), 3))
    fails("id 3 is no class; known are 0 to 2", *pair, "steps=1")
    fails("size 12 is not a multiple of the patch", "size=12")
    fails("data.val and masks.val go together", "masks.val=null")
    flat = create_backbone(
        BackboneConfig(name="vit_tiny_patch16_224", embed_dim=24, depth=1), mean=(0,) * 3, std=(1,) * 3
    )
    fails(
        "vit_tiny_patch16_224 sees images; give a run or a backbone of volumes",
        target=export_timm(flat, tmp_path / "flat"),
    )
    with pytest.raises(UserError, match=r"patch_size=\[6, 6, 6\]: UNETR doubles maps"):
        UNETR(backbone(patch_size=6, img_size=12), 2, 2, frozen=True)
