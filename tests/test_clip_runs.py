"""Runs on clips: supervised and DINO train, resume bit for bit, export, and are evaluated; on real photographs that move."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import selfsup
from benchmarks.make_motion_clips import make
from selfsup.backbones import timm_difference
from selfsup.backbones.clips import ClipBackbone
from selfsup.cli import app
from selfsup.errors import EarlyStop, UserError
from selfsup.eval import knn, linear, pca, tsne

TINY = [
    "backbone=timesformer", "backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2", "backbone.patch_size=8",
    "backbone.frames=4", "data.frames=4", "global_batch=12", "workers=0", "threads=1", "tensorboard=false", "precision=fp32",
    "log_every=1", "views.global.size=16", "views.local.size=8", "backbone.drop_path_rate=0.2",
]  # fmt: skip
METHODS = {
    "supervised": [
        "method=supervised", "views.global.count=1", "views.local.count=0", "views.global.policy=randaugment",
        "views.global.blur=0.5", "views.global.solarize=0.1"],
    "dino": [
        "method=dino", "method.out_dim=64", "method.hidden_dim=32", "method.bottleneck_dim=16", "views.local.count=2",
        "views.local.frames=2", "data.stride=2", "views.local.stride=1", "method.freeze_last_layer='0 steps'",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """8 motions x 4 and 2 clips of 7 frames."""
    return make(tmp_path_factory.mktemp("clips"), clips=4, frames=7, size=24)


def config(clips: Path, method: str, *more: str):
    words = [*TINY, *METHODS[method], f"data={clips / 'train'}", f"data.val={clips / 'val'}", "steps=5", *more]
    return selfsup.load_config(None, words)


@pytest.fixture(scope="module")
def runs(clips: Path, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        selfsup.train(config(clips, method), out=out / method, quiet=True)
    return {method: out / method for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_resumes_bit_for_bit_in_the_middle_of_an_epoch(method: str, clips: Path, runs, tmp_path: Path) -> None:
    """32 clips in batches of 12; with other workers after the stop."""
    with pytest.raises(EarlyStop):
        selfsup.train(config(clips, method, "stop_at=2"), out=tmp_path, quiet=True)
    selfsup.train(config(clips, method, "workers=2"), out=tmp_path, resume=True, quiet=True)
    name = Path("checkpoints/step_00000005")
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / name / file).read_bytes() == (runs[method] / name / file).read_bytes()
    first, again = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (runs[method], tmp_path)
    )
    assert first == again and len(first) == 5


@pytest.mark.parametrize("method", METHODS)
def test_exports_what_loads(method: str, runs) -> None:
    backbone = selfsup.load_backbone(runs[method] / "backbone")
    assert isinstance(backbone, ClipBackbone) and backbone.frames == 4
    f = backbone(torch.randn(2, 3, 6, 16, 24))
    assert timm_difference(backbone, runs[method] / "backbone") == 0.0
    assert f.patches.shape == (2, 32, 6, 2, 3) and f.pooled.shape == (2, 32)


@pytest.mark.parametrize("clips_each", [1, 3])
def test_knn_of_clips(clips_each: int, runs, tmp_path: Path) -> None:
    result = knn.evaluate_quietly(
        str(runs["dino"]), ["k=3", "workers=0", f"data.clips={clips_each}"], tmp_path / "knn.json"
    )
    assert 0 <= result["metrics"]["top1"] <= 1
    assert result["protocol"]["clips"] == {"frames": 4, "stride": 2, "clips": clips_each}
    assert result["protocol"]["bank_images"] == 32 and result["protocol"]["val_images"] == 16


def test_clips_are_averaged(clips: Path, runs) -> None:
    """Features of three clips of a video are the mean of those of each."""
    from selfsup.data.clip_frames import centred
    from selfsup.data.sources import open_source
    from selfsup.eval.datasets import Images
    from selfsup.eval.features import extract, transform_for
    from selfsup.eval.poolings import Request
    from selfsup.eval.settings import KnnSettings
    from selfsup.eval.targets import open_target

    target = open_target(str(runs["dino"]), device="cpu")
    data = target.config.data.model_copy(update={"clips": 3})
    source = open_source(str(clips / "val"), channels=3, config=data)
    images, settings = Images(source, np.arange(4), str(clips / "val")), KnnSettings(workers=0, cache=False)
    transform = transform_for(target, images, settings)
    requests = [Request("pooled"), Request("cls+patchmean"), Request("patchmean", -2)]
    file = extract(target, images, settings, requests, transform, quiet=True)
    folder = sorted(Path(source.name(1)).iterdir())
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (transform.mean, transform.std))
    found = []
    for k in range(3):
        frames = [
            np.asarray(Image.open(folder[n]).resize((16, 16), Image.Resampling.BICUBIC)) for n in centred(7, 4, 2, k, 3)
        ]
        clip = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2) / 255  # [C, T, S, S]
        found.append(target.backbone(((clip - mean) / std)[None]).pooled)
    torch.testing.assert_close(
        torch.from_numpy(file.array(requests[0])[1:2].copy()), torch.stack(found).mean(0), atol=1e-5, rtol=1e-4
    )
    assert file.array(requests[1]).shape == (4, 64) and np.isfinite(file.array(requests[2])).all()


def test_linear_classify_and_tsne(runs, tmp_path: Path) -> None:
    result = linear.evaluate_quietly(str(runs["supervised"]), ["epochs=2", "workers=0"], tmp_path / "linear.json")
    assert result["protocol"]["bank_images"] == 32
    with pytest.raises(UserError, match="augment=true"):
        linear.evaluate_quietly(str(runs["supervised"]), ["augment=true", "workers=0"], tmp_path / "linear.json")
    tsne.run(str(runs["dino"]), ["workers=0"], tmp_path / "tsne.png")
    assert Image.open(tmp_path / "tsne.png").size[0] > 400


def test_a_backbone_folder_alone_is_enough(clips: Path, runs, tmp_path: Path) -> None:
    """Frames are those that it was built for."""
    words = [f"data={clips / 'train'}", f"data.val={clips / 'val'}", "k=3", "workers=0"]
    result = knn.evaluate_quietly(str(runs["dino"] / "backbone"), words, tmp_path / "knn.json")
    assert result["protocol"]["clips"]["frames"] == 4


def test_the_sheet_shows_frames_of_each_view(runs, tmp_path: Path) -> None:
    """Two views of 4 frames and two of 2; and the picture that is drawn of them later, with the videos' first frames."""
    drawn = Image.open(runs["dino"] / "pictures" / "augmentations.png")
    command("eval", "augmentations", runs["dino"], "images=8", "--out", tmp_path / "sheet.png")
    again = Image.open(tmp_path / "sheet.png")
    cell = drawn.width // 12
    assert cell > 40 and again.width == drawn.width + cell and drawn.height == again.height


def test_clips_and_backbones_that_do_not_go_together(clips: Path, tmp_path: Path) -> None:
    vit = ["backbone.embed_dim=32", "backbone.depth=1", "backbone.num_heads=2"]
    common = (
        [w for w in TINY if not w.startswith("backbone")]
        + METHODS["supervised"]
        + [f"data={clips / 'train'}", "steps=2"]
    )
    for words, message in (
        (["backbone=vit_tiny_patch16_224", *vit], "data.frames=4: vit_tiny_patch16_224 takes images"),
        (["backbone=timesformer", *vit, "data.frames=null"], "takes clips; give data.frames=8"),
    ):
        with pytest.raises(UserError, match=message):
            selfsup.train(selfsup.load_config(None, [*common, *words]), out=tmp_path / str(len(words)), quiet=True)


def command(*words: object) -> None:
    """The command line, in this process."""
    app([str(word) for word in words], standalone_mode=False)


SMALL = ("backbone.embed_dim=16", "backbone.depth=1", "backbone.num_heads=1", "steps=2", "global_batch=8", "workers=0")


@pytest.mark.systems("TimeSformer (video)")
@pytest.mark.parametrize("attention", ["joint", "space"])
def test_documented_command(attention: str, clips: Path, tmp_path: Path) -> None:
    """The recipe, smaller and shorter, with each attention that the other test has not."""
    data = (f"data={clips}/train", f"data.val={clips}/val")
    recipe = ("train", "timesformer_motion", *data, f"backbone.attention={attention}", *SMALL, "report=false")
    command(*recipe, "tensorboard=false", "--out", tmp_path)
    assert selfsup.load_backbone(tmp_path / "backbone").model.attention == attention


@pytest.mark.systems("Video classification")
def test_documented_commands_on_video_files(tmp_path: Path) -> None:
    """Trained on .mp4, evaluated on .mkv: the figures of the classifier and of the k-NN are written."""
    make(tmp_path / "a", clips=2, frames=6, size=24, kind="mp4")
    make(tmp_path / "b", clips=2, frames=6, size=24, kind="mkv")
    data = (f"data={tmp_path}/a/train", f"data.val={tmp_path}/b/val")
    command(
        "train", "timesformer_motion", *data, *SMALL, "report=false", "tensorboard=false", "--out", tmp_path / "run"
    )
    command("eval", "knn", tmp_path / "run", "k=3", "data.clips=2", "workers=0")
    for name in ("classify", "knn"):
        found = json.loads((tmp_path / "run" / "eval" / f"{name}.json").read_text())
        assert 0 <= found["metrics"]["top1"] <= 1
    assert (tmp_path / "run" / "classifier" / "config.json").is_file()


def test_fine_tuning_of_a_run_on_clips(clips: Path, runs, tmp_path: Path) -> None:
    data = [f"data={clips / 'train'}", f"data.val={clips / 'val'}", "steps=1", "global_batch=8", "workers=0"]
    command("eval", "finetune", runs["dino"], *data, "--out", tmp_path / "finetune.json")
    assert 0 <= json.loads((tmp_path / "finetune.json").read_text())["metrics"]["top1"] <= 1


def test_what_is_of_images_alone_says_so(runs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="maps have three axes, where those of images are needed"):
        pca.run(str(runs["dino"]), ["workers=0", "size=32"], tmp_path / "pca.png")


def test_answers_of_other_clips_are_not_reused(clips: Path, runs, tmp_path: Path) -> None:
    words = ["method=distill", f"teacher={runs['supervised']}", f"teacher.cache={tmp_path / 'cache'}", "steps=1"]
    words += [
        "method.losses.ce=0",
        "method.losses.soft=1",
        "views.global.count=1",
        "views.local.count=0",
        "views.global.blur=0",
        "views.global.solarize=0",
    ]
    words += [f"data={clips / 'train'}"]
    selfsup.train(selfsup.load_config(None, [*TINY, *words]), out=tmp_path / "first", quiet=True)
    with pytest.raises(UserError, match="views"):
        selfsup.train(selfsup.load_config(None, [*TINY, *words, "data.stride=2"]), out=tmp_path / "second", quiet=True)
