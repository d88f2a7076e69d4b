"""Features: against the backbone itself, cached, by rank, with unreadable images; the transform's defaults."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfsup import config
from selfsup.backbones import create_backbone
from selfsup.config import BackboneConfig
from selfsup.errors import UserError
from selfsup.eval.datasets import open_pair
from selfsup.eval.features import Transform, extract, transform_for
from selfsup.eval.poolings import Request, check_requests, compute
from selfsup.eval.settings import resolve
from selfsup.eval.targets import Target, open_target

ALL = [
    Request("pooled"),
    Request("cls"),
    Request("patchmean"),
    Request("cls+patchmean"),
    Request("cls", "last3"),
    Request("patchmean", 0),
    Request("cls+patchmean", "last2"),
    Request("cls", -2),
]


def opened(target: str, *words: str):
    settings = resolve("knn", ["workers=0", *words])
    found = open_target(target, device="cpu")
    pair = open_pair(found, settings)
    return found, settings, pair, transform_for(found, pair.train, settings)


def test_equals_the_backbone_image_by_image(run: Path):
    target, settings, pair, transform = opened(str(run), "cache=false", "batch_size=7")
    file = extract(target, pair.val, settings, ALL, transform)
    assert (transform.size, transform.resize) == (28, 28)
    backbone = target.backbone
    for i in (0, 31, 59):
        pixels = torch.from_numpy(np.asarray(pair.val.source.read(i)).copy()).float() / 255
        image = ((pixels - backbone.mean[0]) / backbone.std[0])[None, None]
        with torch.no_grad():
            f, tokens = backbone(image), backbone.tokens(image, 3)
        mean = f.patches.mean((2, 3))
        wanted = [
            f.pooled,
            f.cls,
            mean,
            torch.cat([f.cls, mean], 1),
            torch.cat([cls for cls, _ in tokens], 1),
            tokens[0][1],
            torch.cat([tokens[1][0], tokens[1][1], tokens[2][0], tokens[2][1]], 1),
            tokens[1][0],
        ]
        for request, value in zip(ALL, wanted):
            np.testing.assert_allclose(
                file.array(request)[i], value[0].numpy(), rtol=1e-4, atol=1e-5, err_msg=request.name
            )


def test_temporary_files_go_and_cached_ones_stay(run: Path, tmp_path: Path):
    run = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("eval"))
    target, settings, pair, transform = opened(str(run), "cache=false")
    file = extract(target, pair.val, settings, ALL[:1], transform)
    rows, folder = np.array(file.array(ALL[0])), file.folder
    assert folder.is_dir() and not folder.is_relative_to(run)
    del file
    assert not folder.exists()
    settings = resolve("knn", ["workers=0"])
    first = extract(target, pair.val, settings, ALL[:1], transform)
    again = extract(target, pair.val, settings, ALL[:1], transform)
    more = extract(target, pair.val, settings, ALL[:3], transform)
    assert first.folder == again.folder == more.folder and first.folder.is_relative_to(run / "eval" / "features")
    assert (first.cached, again.cached, more.cached) == (False, True, False)
    assert np.array_equal(again.array(ALL[0]), rows)
    assert not list(first.folder.glob(".*")), "nothing half written is left"


def test_the_key_knows_what_matters(run: Path):
    folders = set()
    for target, *words in [
        (str(run),),
        (f"{run}@student",),
        (str(run), "size=35"),
        (str(run), "resize=32"),
        (str(run), "interpolation=bilinear"),
        (str(run), "precision=bf16"),
        (str(run), "max_val=20"),
    ]:
        found, settings, pair, transform = opened(target, *words)
        folders.add(extract(found, pair.val, settings, ALL[:1], transform).folder)
    assert len(folders) == 7


def test_unreadable_images_are_left_out_and_named(tmp_path: Path, run: Path, val_folder: Path, capfd):
    broken = shutil.copytree(val_folder, tmp_path / "val")
    victims = [sorted((broken / name).iterdir())[3] for name in ("5_sandal", "8_bag")]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(victims[1].read_bytes()[:90])
    target, settings, pair, transform = opened(str(run), f"eval.val={broken}", "cache=false", "batch_size=4")
    file = extract(target, pair.val, settings, ALL[:2], transform)
    bad = np.flatnonzero(~file.readable(ALL[0]))
    assert [pair.val.source.name(int(i)).split("/")[-1] for i in bad] == [v.name for v in victims]
    whole = extract(*opened(str(run), "cache=false")[:1], opened(str(run))[2].val, settings, ALL[:1], transform)
    good = np.setdiff1d(np.arange(60), bad)
    np.testing.assert_allclose(file.array(ALL[0])[good], whole.array(ALL[0])[good], atol=1e-5)
    assert victims[0].name in capfd.readouterr().err
    for path in broken.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="can be read"):
        extract(target, opened(str(run), f"eval.val={broken}")[2].val, settings, ALL[:1], transform)


def test_weights_that_are_not_finite_are_refused(run: Path):
    target, settings, pair, transform = opened(str(run), "cache=false")
    with torch.no_grad():
        next(target.backbone.parameters()).fill_(float("nan"))
    target.checkpoint_hash = "broken"
    with pytest.raises(UserError, match="not finite"):
        extract(target, pair.val, settings, ALL[:1], transform)


def test_transform_defaults(run: Path, train_folder: Path, tmp_path: Path):
    large = create_backbone(BackboneConfig(name="resnet10t"), mean=(0.5,) * 3, std=(0.2,) * 3, input_size=None).eval()
    target = Target("x", "backbone", large, "x", torch.device("cpu"))
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("RGB", (120, 90), (9 * i, 80, 200)).save(tmp_path / name / f"{i}.jpg")
    settings = resolve("knn", [f"data={tmp_path}"])
    images = open_pair(target, settings).train
    size = large.input_size
    assert transform_for(target, images, settings) == Transform(
        size, round(size * 256 / 224), "bicubic", (0.5,) * 3, (0.2,) * 3
    )
    settings = resolve("knn", [f"data={tmp_path}", "size=224"])
    assert transform_for(target, images, settings).resize == 256  # DINO's evaluation
    pixels = open_target("pixels", device="cpu")
    assert transform_for(pixels, images, settings).size == 224
    settings = resolve("knn", [f"data={tmp_path}"])
    found = transform_for(pixels, images, settings)
    assert found.size == 32
    with pytest.raises(UserError, match="not a multiple of the patch"):
        opened(str(run), "size=30")
    with pytest.raises(UserError, match="resize=20 is smaller"):
        opened(str(run), "resize=20")


def test_pixel_statistics(train_folder: Path):
    _, _, pair, transform = opened("pixels", f"data={train_folder}")
    values = np.stack([np.asarray(pair.train.source.read(int(i)), dtype=np.float64) / 255 for i in pair.train.indices])
    assert transform.mean == pytest.approx([values.mean()], abs=1e-6)
    assert transform.std == pytest.approx([values.std()], abs=1e-6)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("pooled", -2), "backbone's own output"),
        (Request("cls", 3), "layers 0 to 2"),
        (Request("cls", -4), "layers 0 to 2"),
        (Request("cls", "last4"), "last3"),
    ],
)
def test_layers_that_are_not_there(run: Path, request_: Request, words: str):
    with pytest.raises(UserError, match=words):
        check_requests(open_target(str(run), device="cpu"), [request_])


def test_convnets_and_pixels():
    backbone = create_backbone(
        BackboneConfig(name="resnet10t"), mean=(0.5,) * 3, std=(0.2,) * 3, input_size=None
    ).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pooled, mean, both = compute(
            backbone, x, [Request("pooled"), Request("patchmean"), Request("patchmean", "last2")]
        )
    torch.testing.assert_close(pooled, mean)
    assert both.shape == (2, 256 + 512) and torch.allclose(both[:, 256:], mean, atol=1e-5)
    with pytest.raises(UserError, match="no class token"):
        compute(backbone, x, [Request("cls")])
    assert compute(None, x, [Request("pooled")])[0].shape == (2, 3 * 64 * 64)
    with pytest.raises(UserError, match="raw pixels"):
        check_requests(open_target("pixels", device="cpu"), [Request("patchmean")])


_RANK = """
import json, sys
from pathlib import Path
from selfsup.eval import knn, linear
run, out = sys.argv[1], Path(sys.argv[2])
from selfsup import dist
words = ["workers=0", "cache=" + sys.argv[3]]
a = knn.evaluate_quietly(run, [*words, "k=5,20"], out / "knn.json")
grid = ["lr=0.01,0.1", "batch=32", "layer=-1,last2", "pooling=cls,patchmean"]
b = linear.evaluate_quietly(run, [*words, *grid, "epochs=4"], out / "linear.json")
c = linear.evaluate_quietly(run, [*words, "epochs=1", "lr=0.1", "batch=32", "augment=true"], out / "augmented.json")
assert bool(a) == bool(b) == bool(c) == (dist.rank() == 0)
dist.shutdown()
"""


def start(arguments: list[str], world: int) -> None:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(world):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        env |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", _RANK, *arguments]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [p.communicate(timeout=180)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * world, errors


def test_two_ranks_give_what_one_gives(run: Path, tmp_path: Path):
    for world, cache in ((1, "false"), (2, "true")):
        (tmp_path / str(world)).mkdir()
        start([str(run), str(tmp_path / str(world)), cache], world)
    for name in ("knn", "linear", "augmented"):
        one, two = (json.loads((tmp_path / str(w) / f"{name}.json").read_text()) for w in (1, 2))
        assert one["metrics"].keys() == two["metrics"].keys()
        if name == "knn":
            assert one == two
        else:
            for a, b in zip(one["settings"], two["settings"]):
                assert a["holdout_loss"] == pytest.approx(b["holdout_loss"], rel=1e-4)


def test_resolved_settings_are_a_complete_file():
    text = config.dump(resolve("linear", ["data=demo"]))
    assert "standardize: true" in text and "path: demo" in text
