"""`selfsup backbones`: figures of papers, the methods' own reasons, and what is found."""

import json

import pytest
import torch
from typer.testing import CliRunner

from selfsup import UserError, catalogue, methods
from selfsup.cli import app
from selfsup.config import load
from selfsup.methods.mae import MAE

# M parameters without the classifier, GFLOPs (multiply-adds) at 224: of the papers, or of timm's tables less the classifier
PUBLISHED = {
    "resnet50": (23.51, 4.09),  # He et al., 2016, as in torchvision
    "vit_small_patch16_224": (21.67, 4.6),  # Touvron et al., 2021, table 5
    "cait_xxs24_224": (11.76, 2.5),  # Touvron et al., 2021, "Going deeper", table 3
    "twins_pcpvt_small": (23.6, 3.8),  # Chu et al., 2021, table 2
    "pvt_v2_b0": (3.41, 0.57),  # Wang et al., 2022, table 3
}


def rows(*arguments: str) -> list[dict]:
    shown = CliRunner().invoke(app, ["backbones", *arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    row = catalogue.describe(name, 224)
    parameters, gflops = PUBLISHED[name]
    assert row["parameters"] / 1e6 == pytest.approx(parameters, abs=0.06)
    assert row["gflops"] == pytest.approx(gflops, rel=0.02)


def test_reasons_are_those_of_training() -> None:
    row = catalogue.describe("resnet18", 64)
    config = methods.complete(
        load(None, ["method=mae", "backbone=resnet18", "views.global.size=64", "views.local.count=0"])
    )
    with pytest.raises(UserError) as refused:
        methods.create(config)
    assert row["methods"]["mae"] == str(refused.value)
    assert row["methods"]["dino"] is None and row["methods"]["simmim"] is None
    assert set(row["methods"]) == set(methods.METHODS)
    assert row["strides"] == [2, 4, 8, 16, 32] and row["tokens"] == [2, 2] and row["embed_dim"] == 512
    assert catalogue.fits("mae", catalogue._built("vit_tiny_patch16_224", 64)) is None and MAE.suits is not None


def test_sizes() -> None:
    mixer = catalogue.describe("mixer_s32_224", 64)
    assert mixer["one_size"] and "local views" in catalogue.table([mixer], 64)
    refused = catalogue.describe("vit_tiny_patch16_224", 100)
    assert "not a multiple of the patch" in refused["refused"] and "not a multiple" in catalogue.table([refused], 100)


def test_deformable_costs_its_offsets() -> None:
    plain, deformed = (catalogue.describe(name, 64) for name in ("resnet18", "resnet18 backbone.deformable=[4]"))
    extra = 2 * (512 * 27 * 9 + 27)  # two blocks
    assert deformed["parameters"] - plain["parameters"] == extra
    # each of 2 x 2 places is a multiply-add a weight; the net is rounded to 1e-3
    assert deformed["gflops"] - plain["gflops"] == pytest.approx(2 * 512 * 27 * 9 * 4 / 1e9, abs=1.1e-3)
    assert deformed["embed_dim"] == 512 and deformed["methods"]["supervised"] is None


def test_patterns() -> None:
    names = CliRunner().invoke(app, ["backbones", "mit_b?", "--names"]).stdout.split()
    assert names[:6] == [f"mit_b{n}" for n in range(6)]
    found = catalogue.wanted("resnet50")
    assert ("timm", "resnet50") in found and ("timm", "seresnet50") in found
    (alexnet,) = rows("alexnet")
    assert (
        alexnet["family"] == "torchvision" and alexnet["parameters"] == 61100840 and "a teacher" in alexnet["refused"]
    )
    with pytest.raises(UserError, match="no backbone matches 'nosuchnet'; give a part of a name"):
        catalogue.wanted("nosuchnet")


@pytest.mark.systems("List of backbones: parameters, GFLOPs, tokens, strides, methods that take them")
def test_command() -> None:
    shown = CliRunner().invoke(app, ["backbones", "mit_b0", "--size", "64"])
    assert shown.exit_code == 0, shown.output
    assert "mit_b0" in shown.stdout and "all but capi, deit, dinov2, ibot, ijepa, mae, msn" in shown.stdout
    assert (
        "MAE hides patches before the layers that mix them, which PyramidVisionTransformerV2 does not have"
        in shown.stdout
    )
    assert not torch.is_grad_enabled() or torch.get_default_device().type == "cpu"  # nothing of the meta device stays


def test_every_family_is_known() -> None:
    from timm.models import is_model

    from selfsup.backbones.mit import MIT

    for members in catalogue.FAMILIES.values():
        assert members and all(is_model(name.split()[0]) or name in MIT for name in members)
