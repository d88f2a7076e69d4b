"""What people get wrong: exit code 2 and one or two lines that name the key or file, never a traceback."""

import ctypes
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from selfsup import checkpoint
from selfsup.config import dump, load
from selfsup.log import read_metrics
from tests.methods.tiny import METHOD_OPTIONS, TINY_RUN, cli, write_images

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def recipe(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(dump(load(None, [*TINY_RUN, *METHOD_OPTIONS["dino"], "precision=fp32", f"data={images}"])))
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`selfsup ...` in this process: (exit code, stderr)."""
    from selfsup.cli import main

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["selfsup", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capfd.readouterr().err

    return call


@pytest.fixture
def refused(call: Callable[..., tuple[int, str]]) -> Refused:
    """The message of a command that must be refused."""

    def refused(*arguments: object) -> str:
        code, err = call(*arguments)
        assert code == 2, err
        assert "Traceback" not in err
        message = err[err.index("selfsup: ") :]  # after what the run announced
        assert 1 <= len(message.strip().splitlines()) <= 2, message
        return message

    return refused


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped at step 4 of 10."""
    run = tmp_path_factory.mktemp("run") / "run"
    done = cli("train", str(recipe), "stop_at=4", "--out", str(run))
    assert done.returncode == 75, done.stderr
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


# ------------------------------------------------------------------------------------------------------------------ keys


@pytest.mark.parametrize(
    "override, named",
    [
        ("stesp=5", "did you mean steps?"),
        ("interval=5", "interval"),
        ("method.outdim=5", "did you mean method.out_dim?"),
        ("steps=many", "steps='many'"),
        ("global_batch=0", "global_batch=0"),
        ("method.out_dim=-1", "method.out_dim=-1"),
        ("views.global.interpolation=nearest", "views.global.interpolation"),
        ("method=simclrr", "method.name='simclrr'"),
        ("backbone=vit_smal_patch16_224", "vit_small_patch16_224"),
        ("backbone.depht=3", "backbone.depht"),
        ("accumulate=3", "accumulate=3"),
        ("device=gpu", "device='gpu'"),
        ("precision=fp16", "precision=fp16"),
        ("views.global.count=0", "views.global.count=0"),
        ("data.mean=[0.5]", "data.mean"),
        ("init_from.head_only=1 steps", "init_from.head_only"),
        ("mix=mixup", "mix.name=mixup: method=dino does not learn from labels"),
        ("mix={name: mixup, group: 3}", "mix.group=3: a process computes 8 images at a time"),
        ("mix={name: ricap, group: 3}", "ricap mixes 4 images"),
        ("views.global.policy_fill=[1, 2]", "views.global.policy_fill holds 2 levels for 3 channels"),
    ],
)
def test_keys_and_values(refused: Refused, recipe: Path, tmp_path: Path, override: str, named: str) -> None:
    extra = ["views.local.count=0"] if "global.count" in override else []
    if "global.count" in override:
        extra += ["views.global.blur=0.5", "views.global.solarize=0"]
    extra += ["views.global.policy=randaugment"] if "policy_fill" in override else []
    assert named in refused("train", recipe, override, *extra, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()  # the folder can be used for the next try


def test_no_cuda(refused: Refused, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device=cuda" in refused("train", recipe, "device=cuda", "--out", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------------ data


def test_missing_folder(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    assert str(tmp_path / "none") in refused("train", recipe, f"data={tmp_path / 'none'}", "--out", tmp_path / "run")


def test_empty_folder(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    """Says which suffixes were looked for."""
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "empty" / "deep" / "readme.md").write_text("no image")
    message = refused("train", recipe, f"data={tmp_path / 'empty'}", "--out", tmp_path / "run")
    assert str(tmp_path / "empty") in message and "png" in message.lower()


def test_seven_images_with_global_batch_64(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "seven", count=7)
    message = refused("train", recipe, f"data={tmp_path / 'seven'}", "global_batch=64", "--out", tmp_path / "run")
    assert "7 images" in message and "global_batch=64" in message


def test_unknown_datasets(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("nothing_here.png\n")
    for spec in ("torchvision:CIFAR1O", f"torchvision:CIFAR10:{tmp_path}", f"{tmp_path}/list.txt", f"{tmp_path}/l.txt"):
        message = refused("train", recipe, f"data={spec}", "--out", tmp_path / "run")
        assert spec.split(":")[-1] in message or "CIFAR10" in message


def corrupt(folder: Path, good: Path) -> list[str]:
    """One file of every kind that cannot be read, and of kinds that look strange and can."""
    jpeg = folder / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(jpeg)
    content = jpeg.read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404</body></html>")
    png = (good / "image_000.png").read_bytes()
    (folder / "truncated.png").write_bytes(png[: len(png) // 2])
    Image.new("1", (12_000, 10_000)).save(folder / "bomb.png")
    bad = ["truncated.jpg", "empty.jpg", "page.jpg", "truncated.png", "bomb.png"]
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (40, 40, 4), np.uint8), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65535, (40, 40), np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(rng.integers(0, 255, (40, 40), np.uint8)).convert("P").save(folder / "palette.GIF")
    Image.fromarray(rng.integers(0, 255, (40, 40, 4), np.uint8)).save(folder / "alpha.PNG")
    Image.fromarray(rng.integers(0, 255, (40, 40, 2), np.uint8), "LA").save(folder / "grey_alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 255, (30, 50, 3), np.uint8)).save(folder / "rotated.jpeg", exif=exif)
    return bad


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_replaced_and_listed(
    call: Callable[..., tuple[int, str]], recipe: Path, images: Path, tmp_path: Path, workers: int
) -> None:
    """Every kind that cannot be read is named once in bad_files.jsonl, the strange ones train; two runs are the same."""
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    bad = corrupt(folder, images)
    losses = []
    for name in ("a", "b"):
        out = tmp_path / name
        options = ["data.max_bad_fraction=0.5", "steps=14", f"workers={workers}"]
        code, err = call("train", recipe, f"data={folder}", *options, "--out", out)
        assert code == 0, err
        listed = [json.loads(line) for line in (out / "bad_files.jsonl").read_text().splitlines()]
        assert sorted(Path(entry["file"]).name for entry in listed) == sorted(bad)
        assert all(entry["reason"] for entry in listed)
        losses.append([line["loss"] for line in read_metrics(out / "metrics.jsonl")])
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all()


def test_too_many_corrupt_images_stop_the_run(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", count=30)
    for path in sorted(folder.iterdir())[:15]:
        path.write_bytes(path.read_bytes()[:100])
    message = refused("train", recipe, f"data={folder}", "steps=50", "--out", tmp_path / "run")
    assert "could not be read" in message and "bad_files.jsonl" in message and "max_bad_fraction" in message


def test_not_a_number_in_an_array(call: Callable[..., tuple[int, str]], recipe: Path, tmp_path: Path) -> None:
    """A float .npy of NaN alone cannot be read; single NaNs and infinities of others never reach a batch."""
    rng = np.random.default_rng(0)
    (tmp_path / "arrays").mkdir()
    for i in range(20):
        array = rng.random((40, 40, 4), np.float32)
        if i == 3:
            array[:] = np.nan
        if i == 4:
            array[7, 7, 1], array[8, 8, 2] = np.inf, np.nan
        np.save(tmp_path / "arrays" / f"{i:02d}.npy", array)
    options = ["backbone.in_chans=4", "data.max_bad_fraction=0.5", f"data={tmp_path / 'arrays'}"]
    code, err = call("train", recipe, *options, "--out", tmp_path / "run")
    assert code == 0, err
    assert all(isinstance(line["loss"], float) for line in read_metrics(tmp_path / "run" / "metrics.jsonl"))
    listed = (tmp_path / "run" / "bad_files.jsonl").read_text()
    assert "03.npy" in listed and "05.npy" not in listed


# ----------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("key", ["views.global.size", "views.local.size"])
def test_size_not_divisible_by_the_patch(refused: Refused, recipe: Path, tmp_path: Path, key: str) -> None:
    """Names a size that works."""
    message = refused("train", recipe, f"{key}=36", "--out", tmp_path / "run")
    assert "36" in message and "32" in message and "40" in message and "8" in message


def test_a_backbone_bound_to_one_size(
    refused: Refused, call: Callable[..., tuple[int, str]], recipe: Path, tmp_path: Path
) -> None:
    """A Mixer cannot take local crops of another size; with crops of one size it trains."""
    mixer = ["backbone=mixer_s32_224", "backbone.img_size=64", "views.global.size=64", "views.local.size=32"]
    message = refused("train", recipe, *mixer, "--out", tmp_path / "run")
    assert "32" in message and "bound to 64" in message
    code, err = call("train", recipe, *mixer, "views.local.size=64", "steps=2", "--out", tmp_path / "run")
    assert code == 0, err


# ------------------------------------------------------------------------------------------------------------ run folder


def test_a_folder_that_holds_a_run(refused: Refused, recipe: Path, run: Path) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert "already holds a run" in refused("train", recipe, "--out", run)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_no_write_permission(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in refused("train", recipe, "--out", tmp_path / "file" / "run")
    assert "/proc/run" in refused("train", recipe, "--out", "/proc/run")
    assert "is a file" in refused("train", recipe, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def become_a_user() -> None:
    """Before exec: root gives up its right to override permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize("mode, arguments", [(0o500, []), (0o000, []), (0o000, ["--resume"])])
def test_no_write_permission_of_a_user(recipe: Path, tmp_path: Path, mode: int, arguments: list[str]) -> None:
    """A folder that may be read only, and one that may not even be looked into."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=mode)
    done = subprocess.run(
        [sys.executable, "-m", "selfsup.cli", "train", str(recipe), "--out", str(folder / "run"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=become_a_user,
    )
    folder.chmod(0o700)
    assert done.returncode == 2, done.stderr
    assert str(folder) in done.stderr and "Permission denied" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2 and list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------------- resume, wrong weights


def rewrite(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Change the tensors of a checkpoint's file and make its manifest true again."""
    path = folder / name
    save_file(change(load_file(path)), path)
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


CHANGES = {
    "a key more": lambda t: {**t, "student.extra": torch.zeros(2)},
    "a key less": lambda t: {k: v for k, v in t.items() if k != "center"},
    "other names": lambda t: {f"module.{k}": v for k, v in t.items()},
    "another shape": lambda t: {**t, "center": torch.zeros(3)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoint_with_wrong_keys(refused: Refused, recipe: Path, run: Path, change: str) -> None:
    rewrite(run / "checkpoints" / "step_00000004", "model.safetensors", CHANGES[change])
    message = refused("train", recipe, "--out", run, "--resume")
    assert "step_00000004" in message and "does not fit" in message


@pytest.mark.parametrize("change", ["an unknown parameter", "another shape"])
def test_checkpoint_with_wrong_optimizer_state(recipe: Path, run: Path, change: str) -> None:
    """In a process of its own: a fused optimizer given a moment of another size reads beyond its end."""

    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if change == "an unknown parameter":
            return {**tensors, "nobody|exp_avg": torch.zeros(2)}
        key = next(k for k in tensors if k.endswith("|exp_avg"))
        return {**tensors, key: torch.zeros(1, 2, 3)}

    rewrite(run / "checkpoints" / "step_00000004", "optimizer.safetensors", edit)
    done = cli("train", str(recipe), "--out", str(run), "--resume")
    assert done.returncode == 2, done.stderr
    assert "step_00000004" in done.stderr and "Traceback" not in done.stderr


def test_checkpoint_that_lost_optimizer_state(refused: Refused, recipe: Path, run: Path) -> None:
    """Half of the moments gone is no resume: AdamW would start anew for them without a word."""
    rewrite(run / "checkpoints" / "step_00000004", "optimizer.safetensors", lambda t: dict(list(t.items())[::2]))
    assert "step_00000004" in refused("train", recipe, "--out", run, "--resume")


def test_weights_with_wrong_keys(refused: Refused, recipe: Path, run: Path, tmp_path: Path) -> None:
    """A file of another project's names, or of nothing, is not loaded halfway: as init_from and as a target."""
    weights = load_file(run / "backbone" / "model.safetensors")
    half = dict(list(weights.items())[: len(weights) // 2])
    for name, tensors in {"half": half, "none": {"x": torch.zeros(2)}}.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        message = refused("train", recipe, f"init_from={path}", "--out", tmp_path / "run")
        assert path.name in message
    assert "none.pth" in refused("train", recipe, f"init_from={tmp_path / 'none.pth'}", "--out", tmp_path / "run")


def test_resume_with_another_configuration(refused: Refused, recipe: Path, run: Path) -> None:
    assert "seed=5" in refused("train", recipe, "seed=5", "--out", run, "--resume")
    assert "method.out_dim=32" in refused("train", recipe, "method.out_dim=32", "--out", run, "--resume")
    assert "steps=5" in refused("train", recipe, "steps=5", "--out", run, "--resume")


def test_resume_with_other_files(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    """An image added, removed or renamed under a run."""
    folder = write_images(tmp_path / "images")
    done = cli("train", str(recipe), f"data={folder}", "stop_at=2", "--out", str(tmp_path / "run"))
    assert done.returncode == 75, done.stderr
    (folder / "image_003.png").rename(folder / "other.png")
    message = refused("train", recipe, f"data={folder}", "--out", tmp_path / "run", "--resume")
    assert str(folder) in message


def test_resume_past_damage_is_loud(call: Callable[..., tuple[int, str]], recipe: Path, run: Path) -> None:
    """The only checkpoint truncated: begins at 0, says why, and ends as an undisturbed run does."""
    path = run / "checkpoints" / "step_00000004" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, err = call("train", recipe, "--out", run, "--resume")
    assert code == 0 and "damaged" in err and "model.safetensors" in err and "starting at step 0" in err
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, 11))


def test_config_of_the_run_is_broken(refused: Refused, recipe: Path, run: Path) -> None:
    (run / "config.yaml").write_text("steps: [\n")
    assert "config.yaml" in refused("train", recipe, "--out", run, "--resume")


# -------------------------------------------------------------------------------------------------------- never finite


POISON = """
from selfsup.methods.dino import DINO

class Poison(DINO):
    def forward(self, batch, s):
        out = super().forward(batch, s)
        if batch.step >= 3:
            out["loss"] = out["loss"] * float("nan")
        return out

class Short(DINO):
    '''Four bad steps in the middle of a logging window, then healthy again.'''
    def forward(self, batch, s):
        out = super().forward(batch, s)
        if 4 <= batch.step < 8:
            out["loss"] = out["loss"] * float("nan")
        return out
"""


@pytest.fixture
def poison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "poisoned_methods.py").write_text(POISON)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "poisoned_methods", raising=False)


@pytest.mark.usefixtures("poison")
def test_never_finite_again(
    refused: Refused, call: Callable[..., tuple[int, str]], recipe: Path, tmp_path: Path
) -> None:
    """Steps are refused, weights stay those before them bit for bit, and after max_nonfinite of them the run stops."""
    out = tmp_path / "run"
    options = ["method=poisoned_methods:Poison", *METHOD_OPTIONS["dino"], "log_every=1", "steps=40"]
    options += ["checkpoint.every=1", "checkpoint.keep_last=50", "max_nonfinite=5"]
    message = refused("train", recipe, *options, "--out", out)
    assert "loss" in message and "5 steps in a row" in message and "max_nonfinite" in message
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["loss"] for line in lines[3:]] == ["nan"] * 5
    assert [line.get("refused_in_row") for line in lines] == [None] * 3 + [1, 2, 3, 4, 5]
    folders = [p for _, p in checkpoint.steps(out / "checkpoints")]
    for name in ("model.safetensors", "optimizer.safetensors"):
        before = (folders[2] / name).read_bytes()
        assert (folders[1] / name).read_bytes() != before
        assert all((f / name).read_bytes() == before for f in folders[3:]), name


@pytest.mark.usefixtures("poison")
def test_the_limit_holds_inside_a_logging_window(refused: Refused, recipe: Path, tmp_path: Path) -> None:
    """max_nonfinite=3 and four refused steps between two log lines: the run stops, though the newest step was fine."""
    options = ["method=poisoned_methods:Short", *METHOD_OPTIONS["dino"], "log_every=20", "steps=20", "max_nonfinite=3"]
    assert "in a row" in refused("train", recipe, *options, "--out", tmp_path / "run")


# ------------------------------------------------------------------------------------------------------------ processes


def test_world_size_does_not_divide_the_batch(recipe: Path, tmp_path: Path) -> None:
    done = cli("train", str(recipe), "global_batch=7", "--out", str(tmp_path / "run"), processes=2)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if "selfsup: " in line]
    assert ours and all("global_batch=7" in line and "2 processes" in line for line in ours)
    assert "use a multiple of 2" in done.stderr
    assert "exitcode  : 2" in done.stderr or "exitcode: 2" in done.stderr  # torchrun's account of the ranks


def test_an_error_on_the_main_rank_reaches_the_others(recipe: Path, run: Path) -> None:
    """Only rank 0 looks at the folder; the other must not wait for it."""
    done = cli("train", str(recipe), "--out", str(run), processes=2)
    assert done.returncode != 0 and "already holds a run" in done.stderr


def test_several_processes_need_a_folder(recipe: Path) -> None:
    done = cli("train", str(recipe), env={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.returncode == 2 and "--out" in done.stderr and "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_targets_and_labels(refused: Refused, images: Path, run: Path, tmp_path: Path) -> None:
    """A target that is none, and images without labels where labels are needed."""
    assert "nowhere" in refused("eval", "knn", tmp_path / "nowhere", f"data={images}")
    message = refused("eval", "knn", run, f"data={images}")
    assert "label" in message and str(images) in message
    assert "did you mean" in refused("eval", "knn", run, f"data={images}", "temprature=0.1")
    assert "nowhere" in refused("export", tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize("name", ["distill_demo", "deit_tiny_demo"])
def test_recipe_that_needs_a_teacher(refused: Refused, tmp_path: Path, name: str) -> None:
    text = refused("train", name, "teacher.path=null", "--out", tmp_path / "run")
    assert (
        "learns from a teacher and there is none; give teacher=RUN, an exported folder, a checkpoint or a timm name"
        in text
    )
    text = refused("train", name, "teacher=resnet18", "--out", tmp_path / "run")
    assert "teacher=resnet18: a teacher without loaded weights" in text
