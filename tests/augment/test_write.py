"""The command: files, manifest, masks, boxes; a kill in the middle; what cannot be done; the sheet; networks."""

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from selfsup import augment
from selfsup.augment import settings
from selfsup.augment.transfer import Transfer, spread, statistics
from selfsup.cli import app
from selfsup.errors import UserError
from tests.methods.tiny import METHOD_OPTIONS, TINY_RUN

RECIPE = ["recipe=labelled", "copies=3", "workers=0", "noise=0.5", "style=fourier", "blur=0.5"]


def photographs() -> dict[str, np.ndarray]:
    from skimage import data

    found = {name: getattr(data, name)() for name in ("chelsea", "coffee", "rocket", "astronaut")}
    return {k: np.asarray(Image.fromarray(v).resize((v.shape[1] // 6, v.shape[0] // 6))) for k, v in found.items()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of twelve small photographs, their masks, their boxes."""
    root = tmp_path_factory.mktemp("photos")
    images, annotations = [], []
    for n, (name, pixels) in enumerate([*photographs().items()] * 3):
        relative = f"{'animal' if n % 2 == 0 else 'thing'}/{name}{n // 4}"
        for folder in ("images", "masks"):
            (root / folder / relative).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(pixels, 5 * n, 1)).save(root / "images" / f"{relative}.png")
        height, width = pixels.shape[:2]
        ids = np.zeros((height, width), np.uint8)
        ids[10:40, 20:60] = 1 + n % 3
        mask = Image.fromarray(ids)
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
        mask.save(root / "masks" / f"{relative}.png")
        images.append({"id": n + 7, "file_name": f"{relative}.png", "width": width, "height": height})
        annotations.append({"id": n, "image_id": n + 7, "category_id": n % 3, "bbox": [20, 10, 40, 30], "area": 1200})
    coco = {"images": images, "annotations": annotations, "categories": [{"id": k, "name": f"c{k}"} for k in range(3)]}
    (root / "boxes.json").write_text(json.dumps(coco))
    return root


def labelled(photos: Path) -> list[str]:
    return [*RECIPE, f"masks={photos / 'masks'}", f"boxes={photos / 'boxes.json'}"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def written(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "out"
    augment.run(str(photos / "images"), out, labelled(photos))
    return out


def test_what_is_written(photos: Path, written: Path) -> None:
    """Class folders, originals first, the manifest's parameters; masks with their ids, palette and place; boxes as COCO."""
    records = [json.loads(line) for line in (written / "manifest.jsonl").read_text().splitlines()]
    assert len(records) == 12 * 4 == len([*written.glob("images/*/*.png")]) == len([*written.glob("masks/*/*.png")])
    assert [(r["index"], r["copy"]) for r in records] == [(i, c) for i in range(12) for c in range(4)]
    drawn = [r["drawn"] for r in records if r["copy"]]
    assert all(-10 <= d["angle"] <= 10 and d["fill"] == 1 for d in drawn) and len({d["angle"] for d in drawn}) == 36
    assert {d.get("hflip", 0) for d in drawn} == {0, 1} and any("noise_std" in d for d in drawn)
    coco = json.loads((written / "boxes.json").read_text())
    by_name = {image["file_name"]: image["id"] for image in coco["images"]}
    assert [image["id"] for image in coco["images"]] == list(range(1, 49)) and len(coco["annotations"]) > 40
    for record in records:
        assert record["image"].split("/")[1] == Path(record["source"]).parent.name
        image, mask = Image.open(written / record["image"]), Image.open(written / record["mask"])
        assert image.size == mask.size == (record["width"], record["height"]) and mask.mode == "P"
        assert (written / record["image"]).stat().st_size == record["bytes"]
        ids = np.asarray(mask)
        assert set(np.unique(ids)) <= {0, 1, 2, 3, 255}
        own = [a for a in coco["annotations"] if a["image_id"] == by_name[record["image"].removeprefix("images/")]]
        for entry in own:
            x, y, w, h = entry["bbox"]
            rows, columns = np.nonzero((ids > 0) & (ids < 255))
            assert columns.min() >= x - 1.5 and columns.max() <= x + w + 0.5
            assert rows.min() >= y - 1.5 and rows.max() <= y + h + 0.5
        if record["copy"] == 0:
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(record["source"])))
            assert own[0]["bbox"] == [20, 10, 40, 30] and "angle" not in record["drawn"]
        elif record["drawn"].get("style"):
            assert record["style_of"] != record["source"]
    recipe = (written / "recipe.yaml").read_text()
    assert "rotate: 10" in recipe and "workers" not in recipe


def test_workers_do_not_matter(photos: Path, written: Path, tmp_path: Path) -> None:
    augment.run(str(photos / "images"), tmp_path / "out", [*labelled(photos), "workers=2"])
    assert content(tmp_path / "out") == content(written)


def _enlarge(data: str, out: Path, words: list[str]) -> None:
    augment.run(data, out, words)


def test_a_kill_in_the_middle(photos: Path, written: Path, tmp_path: Path) -> None:
    """SIGKILL when some files are there, then a torn line, a lost file and a leftover; --resume ends with equal bytes."""
    out = tmp_path / "out"
    words = labelled(photos)
    child = multiprocessing.get_context("fork").Process(target=_enlarge, args=(str(photos / "images"), out, words))
    child.start()
    deadline = time.monotonic() + 60
    while len([*out.glob("images/*/*.png")]) < 9 and time.monotonic() < deadline:
        time.sleep(0.002)
    child.kill()
    child.join()
    assert child.exitcode == -9 and not (out / "boxes.json").exists()
    with open(out / "manifest.jsonl", "a") as manifest:
        manifest.write('{"index": 99, "copy"')
    whole = (out / "manifest.jsonl").read_text().splitlines()[:-1]
    (out / json.loads(whole[-1])["image"]).write_bytes(b"half")
    with pytest.raises(UserError, match="--resume"):
        augment.run(str(photos / "images"), out, words)
    with pytest.raises(UserError, match="rotate: 11"):
        augment.run(str(photos / "images"), out, [*words, "rotate=11"], resume=True)
    counts = augment.run(str(photos / "images"), out, words, resume=True)
    assert counts == {"images": 12, "files": 48, "bad": 0}
    left = {k: v for k, v in content(out).items() if "/.tmp-" not in k}
    assert left == content(written)


@pytest.mark.systems("Offline: writing an enlarged data set")
def test_the_documented_commands(photos: Path, tmp_path: Path) -> None:
    """The command line: an enlarged data set that trains, and the sheet with a row for each operation."""
    run = CliRunner()
    out, picture = tmp_path / "bigger", tmp_path / "sheet.png"
    words = ["augment", str(photos / "images"), str(out), "recipe=rotation", "copies=2", "workers=0", "format=jpeg"]
    done = run.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "36 files of 12 images" in done.output and len([*out.glob("images/animal/*.jpg")]) == 18
    from selfsup.data.sources import open_source

    source = open_source(str(out / "images"), channels=3)
    assert len(source) == 36 and source.classes == ["animal", "thing"]
    done = run.invoke(
        app, ["augment", "--show", "all", f"data={photos / 'images'}", "lighting=0.1", "--picture", str(picture)]
    )
    assert done.exit_code == 0, done.output
    names = done.output.strip().partition(": ")[2].split(", ")
    assert names == [n for n in settings.SWITCHES if n not in ("module", "transfer")] + ["all"]
    sheet = np.asarray(Image.open(picture)).astype(int)
    assert sheet.shape[0] == 20 + len(names) * 148
    for row, name in enumerate(names):  # something changed in every row: of the two images of each column
        band = sheet[20 + row * 148 : 164 + row * 148]
        pairs = [(band[:, x : x + 144], band[:, x + 148 : x + 292]) for x in range(110, 110 + 1200, 300)]
        assert any(np.abs(a - b).mean() > 0.5 for a, b in pairs), name
    assert "rotation" in run.invoke(app, ["augment", "--recipes"]).output


@pytest.mark.parametrize(
    "words, expected",
    [
        (["recipe=flip"], "flips"),
        ([], "recipe=NAME"),
        (["rotat=3"], "rotate"),
        (["rotate=3", "size=32"], "views.global.size"),
        (["hflip=0.5", "masks=nowhere"], "masks=nowhere"),
        (["hflip=0.5", "masks=MASKS/animal"], "no mask "),
        (["hflip=0.5", "boxes=MASKS/animal/chelsea0.png"], "COCO"),
        (["hflip=0.5", "styles=IMAGES"], "style=fourier"),
        (["module=a.b:C", "transfer=demo"], "one of them"),
        (["lighting=0.1", "channels=1"], "3 channels"),
        (["module=nowhere.at:All"], "cannot be imported"),
    ],
)
def test_what_cannot_be_done(photos: Path, tmp_path: Path, words: list[str], expected: str) -> None:
    words = [w.replace("MASKS", str(photos / "masks")).replace("IMAGES", str(photos / "images")) for w in words]
    with pytest.raises(UserError, match=expected) as caught:
        augment.run(str(photos / "images"), tmp_path / "out", [*words, "workers=0"] if words else [])
    assert len(str(caught.value).splitlines()) <= 2


def test_not_into_the_images_themselves(photos: Path) -> None:
    with pytest.raises(UserError, match="beside it"):
        augment.run(str(photos / "images"), photos / "images" / "more", ["hflip=0.5"])


def test_bad_images_and_many_channels(tmp_path: Path) -> None:
    """What cannot be read is listed and left out; arrays of five channels stay arrays; an odd size is no hindrance."""
    folder = tmp_path / "bands"
    folder.mkdir()
    random = np.random.default_rng(0)
    for n in range(5):
        np.save(folder / f"{n}.npy", random.integers(0, 256, (17, 23 + n, 5), dtype=np.uint8))
    (folder / "x.png").write_bytes(b"no image")
    words = [
        "copies=2",
        "workers=0",
        "originals=false",
        "rotate=20",
        "fill=wrap",
        "noise=1",
        "style=statistics",
        "blur=1",
    ]
    counts = augment.run(str(folder), tmp_path / "out", [*words, "hflip=0.5", "scale=[0.5,1]"])
    assert counts == {"images": 6, "files": 10, "bad": 1}
    made = [np.load(p, allow_pickle=False) for p in sorted((tmp_path / "out" / "images").glob("*.npy"))]
    assert {a.shape for a in made} == {(17, 23 + n, 5) for n in range(5)} and all(a.dtype == np.uint8 for a in made)
    assert '"bad"' in (tmp_path / "out" / "manifest.jsonl").read_text()


# --------------------------------------------------------------------------------------------------------------- networks


class Warmer(nn.Module):
    """An image-to-image network: more red, less blue."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1] ** 0.5, x[:, 1:2], x[:, 2:] ** 2], 1)


def test_a_module_and_a_resume_within_its_batches(photos: Path, tmp_path: Path) -> None:
    words = [f"module={__name__}:Warmer", "module_probability=0.5", "copies=2", "workers=0", "batch=4"]
    augment.run(str(photos / "images"), tmp_path / "a", words)
    augment.run(str(photos / "images"), tmp_path / "b", words)
    lines = (tmp_path / "b" / "manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "manifest.jsonl").write_text("".join(lines[:17]))  # five images and a part of the sixth
    augment.run(str(photos / "images"), tmp_path / "b", words, resume=True)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    live = 0
    for line in lines:
        record = json.loads(line)
        before, after = (np.asarray(Image.open(p)) / 255 for p in (record["source"], tmp_path / "a" / record["image"]))
        if record["drawn"].get("module"):
            live += 1
            assert np.abs(after[..., 0] - before[..., 0] ** 0.5).max() < 0.003
        else:
            assert np.array_equal(before, after)
    assert 4 < live < 20


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ConvNet with random weights, exported: early random filters see colour and texture too."""
    import timm

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net")
    options = {"layers": [1, 1], "channels": [16, 32], "stem_chs": 16}
    net = timm.create_model("resnetv2_50", num_classes=0, **options).eval()
    timm.models.save_for_hf(net, folder, safe_serialization=True, model_args=options)
    return folder


def test_transfer(backbone: Path) -> None:
    """Statistics of features come near those of the style image, the picture stays; each image's result is its own."""
    four = [np.asarray(Image.fromarray(p).resize((48, 40))) for p in photographs().values()]
    x = torch.from_numpy(np.stack(four)).permute(0, 3, 1, 2).float() / 255
    move = Transfer(str(backbone), 3, 40, 10.0, None, torch.device("cpu"))
    contents, styles = x[:2], x[2:]
    out = move(contents, styles)
    assert out.shape == contents.shape and out.min() >= 0 and out.max() <= 1

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        with torch.no_grad():
            maps = zip(move.features(a), move.features(b), strict=True)
            return sum(float((torch.cat(statistics(m)) - torch.cat(statistics(n))).norm()) for m, n in maps)

    assert distance(out, styles) < 0.6 * distance(contents, styles)
    for before, after in zip(contents, out, strict=True):
        assert np.corrcoef(before.mean(0).flatten(), after.mean(0).flatten())[0, 1] > 0.5
    assert (move(contents[1:], styles[1:])[0] - out[1]).abs().mean() < 0.003
    assert spread(12) == [2, 5, 8, 11] and spread(3) == [0, 1, 2] and spread(5)[-1] == 4


@pytest.mark.systems("Style change (Fourier, feature statistics, any image-to-image module)")
@pytest.mark.parametrize("style", ["style=fourier", "style=statistics", "transfer=NET", f"module={__name__}:Warmer"])
def test_the_documented_styles(photos: Path, backbone: Path, tmp_path: Path, style: str) -> None:
    """By the command line; partners come from styles=FOLDER, and every copy is another picture than its original."""
    words = [style.replace("NET", str(backbone)), "copies=1", "workers=0", "batch=8", "transfer_steps=2"]
    if not style.startswith("module"):
        words.append(f"styles={photos / 'images' / 'thing'}")
    done = CliRunner().invoke(app, ["augment", str(photos / "images"), str(tmp_path / "out"), *words])
    assert done.exit_code == 0 and "24 files of 12 images" in done.output, done.output
    for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["copy"]:
            other = record.get("style_of") or record.get("transfer_of")
            assert style.startswith("module") or Path(other).parent.name == "thing"
            before = np.asarray(Image.open(record["source"])).astype(int)
            after = np.asarray(Image.open(tmp_path / "out" / record["image"]))
            same = Path(other or "").stem[:-1] == Path(record["source"]).stem[:-1]  # shifted: of the same style
            assert same or np.abs(after - before).mean() > 0.5


@pytest.mark.systems("Rotate, translate, fill modes, Gaussian and salt-and-pepper noise")
def test_the_documented_keys_of_training(photos: Path, tmp_path: Path) -> None:
    """Two steps of a tiny run in which every image is moved and noisy; the picture of its views is there."""
    keys = ["rotate=15", "translate=0.1", "zoom=[0.9,1.1]", "shear=5", "fill=reflect", "noise=0.5", "salt_pepper=0.5"]
    words = [
        "demo",
        *TINY_RUN,
        *METHOD_OPTIONS["dino"],
        *(f"views.global.{key}" for key in keys),
        "views.local.fill=wrap",
    ]
    words += [
        "views.local.rotate=30",
        "backbone.in_chans=3",
        "data.mean=null",
        "data.std=null",
        "steps=2",
        "report=false",
    ]
    words += ["method=dino", f"data={photos / 'images'}", "precision=fp32", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["train", *words])
    assert done.exit_code == 0 and "done: 2 steps" in done.output, done.output
    assert (tmp_path / "run" / "pictures" / "augmentations.png").is_file()
