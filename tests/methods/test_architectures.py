"""Every architecture through every kind of method: two steps of a real run, its export, and what cannot work says so."""

import contextlib
import json
from pathlib import Path

import pytest
import timm
import torch

import selfsup
from selfsup import UserError, cli
from selfsup.config import Config, load
from tests.methods.architectures import ARCHITECTURES, shrink
from tests.methods.tiny import METHOD_OPTIONS, write_images

METHODS = {
    "dino": METHOD_OPTIONS["dino"],
    "mae": METHOD_OPTIONS["mae"],
    "simmim": [],
    "distill": [
        "teacher=tests.methods.tiny:tiny_teacher",
        "method.losses={ce: 1.0, soft: 1.0, patch_cosine: 0.1}",
    ],
    "supervised": [],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), count=8, classes=4)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def words(kind: str, method: str, images: Path) -> list[str]:
    net = ARCHITECTURES[kind]
    out = [f"data={images}", f"method={method}", *METHODS[method], f"backbone={net.name}", "views.global.size=32"]
    out += [f"backbone.{key}={json.dumps(value)}" for key, value in net.options.items()]
    out += [
        "global_batch=4",
        "steps=2",
        "workers=0",
        "threads=1",
        "tensorboard=false",
        "report=false",
        "precision=fp32",
    ]
    out += ["checkpoint.every=100", "log_every=1", "optimizer.lr=1e-2", "optimizer.warmup=0%"]
    local = f"views.local.count={int(method == 'dino')}"
    return [
        *out,
        local,
        f"views.local.size={net.local}",
        *([f"method.mask_patch_size={net.stride}"] * (method == "simmim")),
    ]


def config(kind: str, method: str, images: Path) -> Config:
    return load(None, words(kind, method, images))


CELLS = [
    (kind, method) for kind, net in ARCHITECTURES.items() for method in METHODS if method != "simmim" or not net.masks
]


@pytest.mark.parametrize(("kind", "method"), CELLS)
def test_two_steps_and_export(kind: str, method: str, images: Path, tmp_path: Path, capsys) -> None:
    net = ARCHITECTURES[kind]
    if method == "mae" and not net.masks:
        with pytest.raises(
            UserError, match=r"MAE hides patches before the layers|global_pool: MAE trains tokens"
        ) as refused:
            selfsup.train(config(kind, method, images), out=tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoints/*"))
        assert "choose a plain ViT" in str(refused.value) or "use token or avg" in str(refused.value)
        return
    selfsup.train(config(kind, method, images), out=tmp_path / "run", quiet=True)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(map(torch.isfinite, map(torch.tensor, losses)))
    folder = tmp_path / "run" / "backbone"
    (trained,) = (tmp_path / "run/checkpoints").glob("step_*")
    loaded, kept = selfsup.load_backbone(folder), selfsup.load_backbone(trained)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = loaded(x), kept(x)
        assert torch.equal(found.pooled, expected.pooled) and torch.equal(found.patches, expected.patches)
        assert found.patches.shape[2:] == (32 // net.stride,) * 2 and found.pooled.std() > 0
        with pytest.raises(TypeError, match="deformable") if kind == "resnet_deformable" else contextlib.nullcontext():
            bare = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            assert torch.equal(bare(x), found.pooled)


def test_refusal_exits_2(images: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["selfsup", "train", "mae_demo", *words("resnet_b", "mae", images), "--out", str(tmp_path / "r")]
    )
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert (
        "backbone.name=resnet50: MAE hides patches before the layers that mix them, which ResNet does not have" in err
    )
    assert "Traceback" not in err


ROWS = {
    "ViT, DeiT (distilled), ViT with registers, with mean (GAP) and attention (MAP) pooling": ("vit_map", "dino"),
    "Swin, PVT v2, XCiT, MViT v2, MLP-Mixer, ConvMixer, ConvNeXt, EfficientNet": ("pvt_v2", "simmim"),
    "ResNet B, C and D, SE-ResNet": ("se_resnet", "dino"),
    "PVT v1": ("pvt_v1_attention", "dino"),
    "ResNet with deformable 3×3 convolutions": ("resnet_deformable", "dino"),
    "SegFormer's MiT encoder": ("mit", "supervised"),
}
"""First cells of README's table of systems, and the cell of the matrix that stands for each."""


@pytest.mark.parametrize(
    ("kind", "method"), [pytest.param(*cell, marks=pytest.mark.systems(row), id=cell[0]) for row, cell in ROWS.items()]
)
def test_rows_on_real_images(kind: str, method: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """`selfsup train` as README has it, on the bundled photographs of clothes, and what comes out of it."""
    recipe = {"dino": "demo"}.get(method, f"{method}_demo")
    given = [*words(kind, method, Path("demo")), "eval.every=null", "views.local.size=32"]
    monkeypatch.setattr("sys.argv", ["selfsup", "train", recipe, *given, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0, capsys.readouterr().err
    backbone = selfsup.load_backbone(tmp_path / "run")
    with torch.no_grad():
        assert torch.isfinite(backbone(torch.randn(2, backbone.in_chans, 32, 32)).pooled).all()
