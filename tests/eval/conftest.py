"""A labelled folder of real images and a run trained on it, small enough for seconds."""

import zipfile
from pathlib import Path

import pytest

import selfsup.data
from selfsup import config

DEMO = Path(selfsup.data.__file__).parent / "fashion" / "val.zip"
CLASSES = ("1_trouser", "5_sandal", "8_bag", "9_ankle-boot")

RUN = [
    "backbone=vit_tiny_patch16_224",
    "backbone.in_chans=1",
    "backbone.img_size=28",
    "backbone.patch_size=7",
    "backbone.embed_dim=24",
    "backbone.depth=3",
    "backbone.num_heads=3",
    "backbone.dynamic_img_size=true",
    "views.global.size=28",
    "views.local.size=14",
    "views.local.count=1",
    "method.out_dim=64",
    "method.hidden_dim=32",
    "method.bottleneck_dim=16",
    "global_batch=16",
    "steps=6",
    "workers=0",
    "threads=1",
    "tensorboard=false",
    "precision=fp32",
    "log_every=2",
]


def unpack(folder: Path, per_class: int, start: int = 0, classes: tuple[str, ...] = CLASSES) -> Path:
    """Class folders with `per_class` images each of the bundled set."""
    with zipfile.ZipFile(DEMO) as archive:
        for name in classes:
            members = sorted(n for n in archive.namelist() if n.split("/")[-2:-1] == [name] and n.endswith(".png"))
            for member in members[start : start + per_class]:
                path = folder / name / Path(member).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))
    return folder


@pytest.fixture(scope="session")
def train_folder(tmp_path_factory) -> Path:
    """4 classes x 40 images."""
    return unpack(tmp_path_factory.mktemp("images") / "train", 40)


@pytest.fixture(scope="session")
def val_folder(tmp_path_factory) -> Path:
    """4 classes x 15 other images."""
    return unpack(tmp_path_factory.mktemp("images") / "val", 15, start=100)


@pytest.fixture(scope="session")
def run(tmp_path_factory, train_folder: Path, val_folder: Path) -> Path:
    """Six steps of DINO with a tiny ViT."""
    import importlib

    out = tmp_path_factory.mktemp("runs") / "tiny"
    words = [*RUN, f"data={train_folder}", f"eval.train={train_folder}", f"eval.val={val_folder}"]
    importlib.import_module("selfsup.train").train(config.load(None, words), out=out, quiet=True)
    return out
