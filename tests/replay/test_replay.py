"""Refused steps: what is kept and when not, what a replay finds, and that a strange folder does no harm."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from selfsup import UserError, methods, runtime, schedules
from selfsup.config import Config
from selfsup.data import photometric
from selfsup.data.loader import Loader
from selfsup.data.mixing import Mixer
from selfsup.data.sources import Source, open_source
from selfsup.data.views import COLUMN
from selfsup.log import read_metrics
from selfsup.methods.contract import ViewBatch
from selfsup.methods.dino import DINO
from selfsup.replay import replay, run
from selfsup.replay.refused import keep, kept, read
from selfsup.train import train
from tests.methods.tiny import METHOD_OPTIONS, tiny_config, write_images
from tests.small_disk import mounted

STEP = 6


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("images"), count=24)
    Image.new("RGB", (40, 40), (10, 200, 30)).save(folder / "image_007.png")
    return folder


class LossIsNaN(DINO):
    """DINO whose second micro-batch has no finite loss, in any precision."""

    def forward(self, batch, s):  # type: ignore[no-untyped-def]
        out = super().forward(batch, s)
        if 0 not in batch.positions:
            out["loss"] = out["loss"] * float("nan")
        return out


class GradientIsNaN(DINO):
    """DINO whose loss is finite; the derivative of a square root at 0 is not."""

    def forward(self, batch, s):  # type: ignore[no-untyped-def]
        out = super().forward(batch, s)
        features = self.student.backbone.model.norm(self.student.backbone.model.cls_token)
        out["loss"] = out["loss"] + ((features - features.detach()) ** 2).sum().sqrt()
        return out


class Stumbles(GradientIsNaN):
    """At its fifth step alone."""

    def forward(self, batch, s):  # type: ignore[no-untyped-def]
        return super().forward(batch, s) if batch.step == 4 else DINO.forward(self, batch, s)


class NormOverflows(DINO):
    """Every gradient is finite in float32, but the sum of their squares is not."""

    def forward(self, batch, s):  # type: ignore[no-untyped-def]
        out = super().forward(batch, s)
        return {**out, "loss": out["loss"] * 1e25}


class Fails(DINO):
    """Cannot compute at all."""

    def forward(self, batch, s):  # type: ignore[no-untyped-def]
        raise IndexError("no such\nrow")


class Mixes(DINO):
    """DINO of mixed images, which depend on the step and the places in the batch."""

    def __init__(self, config, options):  # type: ignore[no-untyped-def]
        super().__init__(config, options)
        self.mixer = Mixer(config.mix, config.seed, config.global_batch)

    def forward(self, batch, s):  # type: ignore[no-untyped-def]
        drawn = self.mixer.at(batch.positions, batch.step, batch.images[0].shape[-1])
        return super().forward(replace(batch, images=[drawn.images(batch.images[0]), *batch.images[1:]]), s)


class Made:
    """A method in training, and its batches of one step."""

    def __init__(self, images: Path, *overrides: str, kind: type | None = None) -> None:
        name = "dino" if kind is None else f"tests.replay.test_replay:{kind.__name__}"
        options = [f"method={name}", *METHOD_OPTIONS["dino"], *overrides]
        config = tiny_config("dino", f"data={images}", "precision=fp32", "device=cpu", *options)
        self.config: Config = methods.complete(config)
        self.method: Any = methods.create(self.config)
        dtype = torch.float64 if self.config.precision == "fp64" else torch.float32
        self.method.to(dtype=dtype).to(memory_format=torch.channels_last).train()  # as the trainer does
        self.source: Source = open_source(self.config.data.path, channels=3, config=self.config.data)
        c = self.config
        loader = Loader(
            self.source, self.method.views(), seed=c.seed, global_batch=c.global_batch, accumulate=c.accumulate
        )
        self.batches = [loader.make(STEP, m) for m in range(c.accumulate)]
        self.names = [self.source.name(int(i)) for batch in self.batches for i in batch.ids]
        plan = schedules.plan(c, len(self.source))
        every = {**schedules.optimizer_schedules(c, plan), **self.method.schedules(plan)}
        self.s = schedules.evaluate(every, STEP)

    def keep(self, folder: Path, **changes: Any) -> Path:
        given = {
            "step": STEP + 1,
            "rank": 0,
            "batches": self.batches,
            "method": self.method,
            "s": self.s,
            "config": self.config,
            "names": self.names,
            "parts": {"loss": float("nan")},
            "steps_since": 0,
        }
        found = keep(folder, **{**given, **changes})
        assert found is not None
        return found

    def loss(self, micro: int, step: int = STEP) -> float:
        """As the trainer computes it."""
        batch = self.batches[micro]
        mean, std, dtype = self.config.mean, self.config.std, self.method.center.dtype
        views = ViewBatch(
            [photometric.apply(c, p, mean, std, "cpu", dtype) for c, p in zip(batch.crops, batch.params)],
            batch.positions,
            batch.labels,
            batch.ids,
            step=step,
            global_batch=self.config.global_batch,
        )
        with runtime.autocast(self.config):
            return float(self.method(views, self.s)["loss"].detach())


def printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    run(folder)
    return capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- replaying


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_the_same_step_is_computed(images: Path, tmp_path: Path, precision: str) -> None:
    """Two micro-batches, drop path: the losses are the trainer's bit for bit, and depend on the step number."""
    made = Made(images, "accumulate=2", "backbone.drop_path_rate=0.5", f"precision={precision}")
    folder = made.keep(tmp_path / "refused")
    report = replay(folder)
    (attempt,) = report["attempts"]
    assert attempt["precision"] == precision
    expected = [made.loss(m) for m in range(2)]
    assert [part["loss"] for part in attempt["micro"]] == expected
    assert attempt["loss"] == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert expected != [made.loss(m, step=STEP + 1) for m in range(2)]
    assert replay(folder) == report


@pytest.mark.parametrize("name", ["mixup", "cutmix", "ricap"])
def test_mixed_images_are_mixed_again(images: Path, tmp_path: Path, name: str) -> None:
    """And erased, and lit."""
    views = ["views.global.erase=0.5", "views.global.erase_fill=noise", "views.global.lighting=0.1"]
    made = Made(images, "accumulate=2", f"mix={name}", "mix.group=4", *views, kind=Mixes)
    (attempt,) = replay(made.keep(tmp_path / "refused"))["attempts"]
    expected = [made.loss(m) for m in range(2)]
    assert [part["loss"] for part in attempt["micro"]] == expected
    assert expected != [made.loss(m, step=STEP + 1) for m in range(2)]


def test_rows_of_a_former_version(images: Path, tmp_path: Path) -> None:
    """They ended with solarization; nothing was erased then."""
    made = Made(images)
    folder = made.keep(tmp_path / "refused")
    report = replay(folder)
    tensors("batch.safetensors", lambda t: t.update({k: v[..., :14].clone() for k, v in t.items() if "params" in k}))(
        folder
    )
    assert replay(folder) == report


@pytest.mark.systems("Background checkpoints, retention, lease, hang report, spike rollback, replay of refused steps")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_from_a_run(images: Path, tmp_path: Path, precision: str) -> None:
    """What training kept of a step whose gradients were not finite: its loss, which was, comes out bit for bit."""
    options = ("accumulate=2", "backbone.drop_path_rate=0.5", f"precision={precision}", "log_every=1")
    train(Made(images, *options, kind=Stumbles).config, out=tmp_path / "run", quiet=True)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "refused_in_row" in line] == [5]
    (folder,) = kept(tmp_path / "run" / "refused")
    report = replay(folder)
    assert report["step"] == 5 and report["steps_since"] == 0 and folder.name == "step_00000005_rank_00000"
    assert report["attempts"][0]["loss"] == lines[4]["loss"] and np.isfinite(lines[4]["loss"])
    assert report["attempts"][0]["backward"]["module"] == "student.backbone.model.norm"


def test_finite_in_replay(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said plainly, with the number of steps since; no other precision is tried, and ranks are not forgotten."""
    folder = Made(images).keep(tmp_path / "refused", steps_since=7)
    report = replay(folder)
    assert [a["precision"] for a in report["attempts"]] == ["fp32"] and report["attempts"][0]["finite"]
    loss = report["attempts"][0]["loss"]
    text = printed(folder, capsys)
    assert f"finite in replay: loss {loss:.6g}; 7 good steps were taken between the refusal and the copy" in text
    assert "NOT FINITE" not in text and "ranks" not in text
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps({**info, "world": 4, "steps_since": 1}))
    text = printed(folder, capsys)
    assert "1 good step was taken" in text and "another of the 4 ranks" in text


def test_overflow_of_fp16_names_the_module(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Activations above 65504: the layer is named, with what went in; float32 computes it."""
    made = Made(images, "precision=fp16")
    with torch.no_grad():
        made.method.student.backbone.model.blocks[1].mlp.fc1.weight.mul_(1e6)
    folder = made.keep(tmp_path / "refused", loss_scale=1024.0)
    report = replay(folder)
    first, second, third = report["attempts"]
    assert [(a["precision"], a["loss_scale"], a["finite"]) for a in report["attempts"]] == [
        ("fp16", 1024.0, False),
        ("fp16", 1.0, False),
        ("fp32", 1.0, True),
    ]
    for attempt in (first, second):
        assert attempt["forward"]["module"] == "student.backbone.model.blocks.1.mlp.fc1"
        assert attempt["forward"]["input"]["bad"] == 0 and 0.1 < attempt["forward"]["input"]["max"] < 100
        assert attempt["forward"]["output"]["bad"] > 0
    assert third["forward"] is None and third["gradients"]["count"] == 0
    text = printed(folder, capsys)
    assert "finite in fp32, not in fp16: precision=fp32 would train on it" in text
    assert "first output that is not finite: student.backbone.model.blocks.1.mlp.fc1 (Linear), micro-batch 0" in text


def test_overflow_of_the_loss_scale(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradients that overflow in fp16 only because of the scale: nothing has to be done, which is said."""
    folder = Made(images, "precision=fp16").keep(tmp_path / "refused", parts={"loss": 4.25, "loss_scale": 2.0**30})
    first, second = replay(folder)["attempts"]
    assert not first["finite"] and first["forward"] is None and first["backward"] is not None
    assert first["loss_scale"] == 2.0**30 and second["finite"] and second["loss_scale"] == 1
    assert first["loss"] == second["loss"]
    assert "training halves it by itself" in printed(folder, capsys)


def test_overflow_of_fp32_is_finite_in_fp64(images: Path, tmp_path: Path) -> None:
    made = Made(images)
    with torch.no_grad():
        made.method.student.backbone.model.patch_embed.proj.weight.mul_(1e38)
    first, second = replay(made.keep(tmp_path / "refused"))["attempts"]
    assert first["precision"] == "fp32" and not first["finite"]
    assert second["precision"] == "fp64" and second["finite"]


def test_a_loss_that_is_never_finite(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the second micro-batch, outside every module; the first one's loss is shown as well."""
    folder = Made(images, "accumulate=2", kind=LossIsNaN).keep(tmp_path / "refused")
    report = replay(folder)
    assert [a["precision"] for a in report["attempts"]] == ["fp32", "fp64"]
    for attempt in report["attempts"]:
        assert attempt["forward"]["module"] == "" and attempt["forward"]["micro"] == 1
        assert np.isfinite(attempt["micro"][0]["loss"]) and np.isnan(attempt["micro"][1]["loss"])
        assert attempt["gradients"]["count"] > 5 and len(attempt["gradients"]["first"]) == 5
    text = printed(folder, capsys)
    assert "the method itself, behind its modules (LossIsNaN), micro-batch 1" in text
    assert "not finite in fp64 either" in text and re.search(r"loss by micro-batch: \d\.\d+, nan", text)


def test_gradients_alone(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finite loss whose derivative is not: the module behind which it happens, and the parameters it reaches."""
    folder = Made(images, kind=GradientIsNaN).keep(tmp_path / "refused")
    first = replay(folder)["attempts"][0]
    assert np.isfinite(first["loss"]) and first["forward"] is None and not first["finite"]
    assert first["backward"]["module"] == "student.backbone.model.norm"
    assert first["backward"]["finite"] == ""  # the method itself: its loss had a finite gradient
    names = first["gradients"]["first"]
    assert "student.backbone.model.cls_token" in names
    assert first["gradients"]["count"] < first["gradients"]["of"]
    assert "first gradient that is not finite: that of the output of student.backbone.model.norm" in printed(
        folder, capsys
    )


def test_a_norm_that_overflows(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Made(images, kind=NormOverflows).keep(tmp_path / "refused")
    first, second = replay(folder)["attempts"]
    assert not first["finite"] and first["gradients"]["count"] == 0 and second["finite"]
    assert "every gradient is finite, but the norm over all of them is not" in printed(folder, capsys)


def test_weights_that_are_not_finite(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made(images)
    made.method.center[3] = torch.nan
    with torch.no_grad():
        made.method.student.head.mlp[0].bias[0] = torch.inf
    folder = made.keep(tmp_path / "refused")
    assert set(replay(folder)["weights"]["first"]) == {"center", "student.head.mlp.0.bias"}
    assert "the weights themselves are not finite" in printed(folder, capsys)


def test_running_statistics_start_anew_in_each_attempt(images: Path, tmp_path: Path) -> None:
    """Batch norm: what a forward pass moves is put back, so that the second attempt sees what the first one saw."""
    made = Made(images, "method.head_batch_norm=true", kind=NormOverflows)
    folder = made.keep(tmp_path / "refused")
    first, second = replay(folder)["attempts"]
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert replay(folder)["attempts"] == [first, second]


def test_recorded_on_a_gpu(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one the CPU computes it, and says so; automatic choices are made anew."""
    folder = Made(images, "device=cuda", "compile=true", "grad_checkpointing=true").keep(tmp_path / "refused")
    if torch.cuda.is_available():
        assert replay(folder)["device"] == "cuda"
    else:
        assert "on cpu (recorded on cuda)" in printed(folder, capsys)


def test_other_ranks_are_pointed_at(images: Path, tmp_path: Path) -> None:
    made = Made(images)
    first = made.keep(tmp_path / "refused")
    second = made.keep(tmp_path / "refused", rank=1)
    made.keep(tmp_path / "refused", step=9)
    assert replay(first)["others"] == [second.name] and replay(second)["others"] == [first.name]


# -------------------------------------------------------------------------------------------------------------- the picture


def test_images_and_picture(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every image by name, position and range; crops of one colour are marked; the sheet shows what was trained on."""
    made = Made(images, "global_batch=24", "accumulate=2", "views.global.size=64")
    folder = made.keep(tmp_path / "refused")
    report = replay(folder)
    found = {image["name"]: image for image in report["images"]}
    assert set(found) == set(made.names) and len(found) == 24
    (name,) = [n for n in found if "image_007" in n]
    assert (found[name]["min"], found[name]["max"], found[name]["constant"], found[name]["views"]) == (10, 200, 5, 5)
    assert sum(image["constant"] > 0 for image in found.values()) == 1
    assert [image["position"] for image in report["images"]] == list(range(24))
    batch = made.batches[1]
    assert report["images"][12]["id"] == int(batch.ids[0])
    assert report["images"][12]["max"] == max(int(c[:, 0].max()) for c in batch.crops)

    picture = np.asarray(Image.open(report["picture"]).convert("RGB"))
    mean, std = made.config.mean, made.config.std
    trained = photometric.apply(batch.crops[0], batch.params[0], mean, std, "cpu")[0, 3]
    shown = (trained * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)).clamp(0, 1) * 255
    assert contains(picture, shown.round().byte().permute(1, 2, 0).numpy())

    text = printed(folder, capsys)
    assert "5 of 5 crops are of one colour" in text and "24, values 0 to 255 of 255; 1 with crops of one colour" in text
    assert all(n in text for n in found)


def contains(picture: np.ndarray, part: np.ndarray) -> bool:
    """Whether `part` is somewhere in `picture`, pixel for pixel."""
    h, w = part.shape[:2]
    places = np.argwhere((picture[: -h + 1, : -w + 1] == part[0, 0]).all(-1))
    return any(np.array_equal(picture[y : y + h, x : x + w], part) for y, x in places)


@pytest.mark.parametrize(("channels", "size"), [(1, 32), (4, 224), (3, 8)])
def test_picture_of_any_channels_and_sizes(tmp_path: Path, channels: int, size: int) -> None:
    from selfsup.replay.contact_sheet import MOST, displayed, draw, save

    crops = torch.randn(2, 80, channels, size, size)[:, :MOST]
    crops[0, 0] = torch.nan
    shown = displayed(crops, [0.5] * channels, [0.25] * channels)
    assert shown.shape == (2, MOST, 3, size, size) and int(shown[0, 0].max()) == 0
    kinds, rows = [shown, shown[..., : size // 2, : size // 2]], [["a", "b"], ["c", "d"]]
    sheet = draw([kinds], [[str(i) for i in range(80)]], rows, "title", {(0, 1)})
    save(sheet, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == sheet.size and sheet.width < 2000 and sheet.height < 6000
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


def test_the_picture_follows_no_link(images: Path, tmp_path: Path) -> None:
    folder = Made(images).keep(tmp_path / "refused")
    (tmp_path / "precious.txt").write_text("mine")
    (folder / "batch.png").symlink_to(tmp_path / "precious.txt")
    assert replay(folder)["picture"] == str(folder / "batch.png")
    assert (tmp_path / "precious.txt").read_text() == "mine" and not (folder / "batch.png").is_symlink()
    assert replay(folder, out=tmp_path)["picture"] == str(tmp_path / "batch.png")
    assert replay(folder, out=tmp_path / "absent")["picture"] is None


def test_plotting_is_not_imported(images: Path, tmp_path: Path) -> None:
    folder = Made(images).keep(tmp_path / "refused")
    code = (
        f"import sys, pathlib; from selfsup.replay import run; run(pathlib.Path({str(folder)!r}));"
        "print([m for m in sys.modules if m.startswith(('matplotlib', 'selfsup.eval', 'faiss', 'sklearn'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]" and "verdict" in done.stdout


# ---------------------------------------------------------------------------------------------------------------- keeping


def test_what_is_kept(images: Path, tmp_path: Path) -> None:
    """Everything comes back as it was; the method is not touched; nothing else is left in the folder."""
    made = Made(images, "accumulate=2")
    before = {k: v.clone() for k, v in made.method.state_dict().items()}
    folder = made.keep(tmp_path / "refused", parts={"loss": float("inf"), "grad_norm": 2.5}, steps_since=3, rank=2)
    assert folder == tmp_path / "refused" / "step_00000007_rank_00002"
    assert sorted(p.name for p in folder.iterdir()) == ["batch.safetensors", "info.json", "model.safetensors"]
    assert [p.name for p in (tmp_path / "refused").iterdir()] == [folder.name]
    found = read(folder)
    assert found.config == made.config and found.info.schedules == made.s and found.info.names == made.names
    assert (found.info.step, found.info.rank, found.info.world, found.info.steps_since) == (7, 2, 1, 3)
    assert found.info.figures == {"loss": "inf", "grad_norm": 2.5}
    for mine, theirs in zip(made.batches, found.batches, strict=True):
        for key in ("ids", "positions", "labels"):
            assert torch.equal(getattr(mine, key), getattr(theirs, key))
        for key in ("crops", "params"):
            assert all(torch.equal(a, b) for a, b in zip(getattr(mine, key), getattr(theirs, key), strict=True))
    assert found.model.keys() == before.keys()
    assert all(
        torch.equal(found.model[k], v) and torch.equal(made.method.state_dict()[k], v) for k, v in before.items()
    )


def test_limit(images: Path, tmp_path: Path) -> None:
    """The first three stay; a step that is there already is not written again, whatever it holds."""
    made, folder = Made(images), tmp_path / "refused"
    first = made.keep(folder)
    made.keep(folder, step=8)
    made.keep(folder, step=8, rank=1)
    arguments = {"batches": made.batches, "method": made.method, "s": made.s, "config": made.config}
    more = {**arguments, "names": made.names, "parts": {}, "steps_since": 0, "rank": 0}
    assert keep(folder, step=9, **more) is None and keep(folder, step=9, limit=3, **more) is None
    assert len(kept(folder)) == 3 and len(list(folder.iterdir())) == 3
    stamp = (first / "info.json").stat().st_mtime_ns
    assert keep(folder, step=7, **more) == first
    assert (first / "info.json").stat().st_mtime_ns == stamp
    assert keep(folder, step=9, limit=4, **more) is not None


def test_ranks_share_the_limit(images: Path, tmp_path: Path) -> None:
    """Six processes at once, room for three: three whole folders and nothing else."""
    made, folder = Made(images), tmp_path / "refused"
    children = []
    for rank in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                keep(
                    folder, step=7, rank=rank, batches=made.batches, method=made.method, s=made.s, config=made.config,
                    names=made.names, parts={}, steps_since=0, limit=3,
                )  # fmt: skip
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    assert len(kept(folder)) == 3 == len(list(folder.iterdir()))
    for path in kept(folder):
        assert len(read(path).batches) == 1


def test_what_a_killed_process_left_is_cleaned(images: Path, tmp_path: Path) -> None:
    made, folder = Made(images), tmp_path / "refused"
    stale, other = folder / ".tmp-step_00000002_rank_00000", folder / ".tmp-step_00000002_rank_00001"
    for path in (stale, other):
        path.mkdir(parents=True)
        (path / "batch.safetensors").write_bytes(b"half")
    made.keep(folder)
    assert not stale.exists() and other.exists()  # that of another rank may be in the making


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "200k") as folder:
        yield folder


def refuse(made: Made, folder: Path) -> tuple[Path | None, list[str]]:
    said: list[str] = []
    found = keep(
        folder, step=7, rank=0, batches=made.batches, method=made.method, s=made.s, config=made.config,
        names=made.names, parts={}, steps_since=0, say=said.append,
    )  # fmt: skip
    return found, said


def test_full_disk(images: Path, small_disk: Path) -> None:
    """Said, not raised; nothing is left that would keep the disk full."""
    found, said = refuse(Made(images), small_disk / "refused")
    assert found is None and len(said) == 1
    assert "step 7" in said[0] and "No space left" in said[0] and "training goes on" in said[0]
    assert list((small_disk / "refused").iterdir()) == []


def test_file_size_limit(images: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        found, said = refuse(Made(images), tmp_path / "refused")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert found is None and "File too large" in said[0]
    assert list((tmp_path / "refused").iterdir()) == []


def test_a_run_folder_that_was_removed_is_not_made_again(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = refuse(Made(images), tmp_path / "run" / "refused")
    assert found is None and len(said) == 1 and not (tmp_path / "run").exists()
    made = Made(images)
    assert keep(
        tmp_path / "run" / "refused", step=7, rank=0, batches=made.batches, method=made.method, s=made.s,
        config=made.config, names=made.names, parts={}, steps_since=0,
    ) is None  # fmt: skip
    assert "the refused step 7 cannot be kept" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- hostile and damaged


@pytest.fixture(scope="module")
def sound(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Made(images, "accumulate=2", "global_batch=4").keep(tmp_path_factory.mktemp("sound") / "refused")


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        replay(folder)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 800, text
    return text


def info(**changes: Any) -> Callable[[Path], None]:
    """Change info.json; None takes a key away."""

    def change(folder: Path) -> None:
        values = {**json.loads((folder / "info.json").read_text()), **changes}
        (folder / "info.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "info.json").read_text())
        values["config"].update(changes)
        (folder / "info.json").write_text(json.dumps(values))

    return change


def tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        values = load_file(folder / file)
        change(values)
        save_file({k: v.contiguous() for k, v in values.items()}, folder / file)

    return changed


def batch(name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    """Change one tensor of the second micro-batch; None takes it away."""
    key = f"micro.1.{name}"

    def changed(values: dict[str, torch.Tensor]) -> None:
        if change is None:
            del values[key]
        else:
            values[key] = change(values[key])

    return tensors("batch.safetensors", changed)


def put(column: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(params: torch.Tensor) -> torch.Tensor:
        params[0, 0, column] = value
        return params

    return change


def text(content: str | bytes, file: str = "info.json") -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(file: str, size: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, size)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "has no info.json"),
    "no batch": (lambda f: (f / "batch.safetensors").unlink(), "batch.safetensors: missing"),
    "no model": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing"),
    "model is a folder": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), "missing"),
    "info is not JSON": (text("{"), "cannot be read as JSON"),
    "info is bytes": (text(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "info is a list": (text("[]"), "expected a JSON object"),
    "info is too deep": (text("[" * 200_000), "cannot be read as JSON"),
    "info is another version": (info(format=2), "format=2"),
    "no step": (info(step=None), "step"),
    "step zero": (info(step=0), "step=0"),
    "step is text": (info(step="x"), "step='x'"),
    "schedules is a list": (info(schedules=[1]), "schedules"),
    "schedule is not a number": (info(schedules={"lr": "x"}), "schedules"),
    "schedules lack one": (info(schedules={"lr": 0.1}), "cannot compute this batch: KeyError"),
    "unknown key": (info(surprise=1), "surprise"),
    "loss scale of zero": (info(loss_scale=0), "loss_scale=0"),
    "a name too few": (info(names=["a"]), "1 names for the 4 images"),
    "names hold numbers": (info(names=[1, 2, 3, 4]), "names"),
    "no config": (info(config=None), "config"),
    "config is a list": (info(config=[]), "config"),
    "unknown key in config": (config(globl_batch=8), "global_batch"),
    "unknown method": (config(method={"name": "dyno"}), "did you mean dino"),
    "method option": (config(method={"name": "dino", "out_dim": -1}), "out_dim=-1"),
    "method is a function": (config(method={"name": "os:getcwd"}), "not a class"),
    "method is another class": (config(method={"name": "pathlib:Path"}), "is no method"),
    "method is not there": (
        config(method={"name": "no_such_package.x:Y"}),
        "not part of selfsup and cannot be imported",
    ),
    "unknown backbone": (config(backbone={"name": "vit_huger"}), "timm has no such model"),
    "backbone from a pickle": (config(backbone={"name": "resnet18", "checkpoint_path": "/x.pth"}), "checkpoint_path"),
    "another backbone": (config(backbone={"name": "resnet10t"}), "model.safetensors: does not fit info.json"),
    "means of another length": (config(data={"mean": [0.5]}), "data.mean"),
    "batch is cut": (cut("batch.safetensors", 1000), "not a whole safetensors file"),
    "batch is cut in its header": (cut("batch.safetensors", 5), "not a whole safetensors file"),
    "batch is empty": (cut("batch.safetensors", 0), "not a whole safetensors file"),
    "batch is a pickle": (lambda f: torch.save({}, f / "batch.safetensors"), "not a whole safetensors file"),
    "header is longer than the file": (text(b"\xff" * 8 + b"{}", "batch.safetensors"), "not a whole safetensors file"),
    "batch holds nothing": (tensors("batch.safetensors", dict.clear), "micro.0.ids is missing"),
    "model is cut": (cut("model.safetensors", 10_000), "model.safetensors: not a whole safetensors file"),
    "model lacks a weight": (tensors("model.safetensors", lambda t: t.pop("center")), "does not fit info.json"),
    "model has one too many": (tensors("model.safetensors", lambda t: t.update(x=torch.ones(1))), "does not fit"),
    "weight of another shape": (tensors("model.safetensors", lambda t: t.update(center=torch.ones(3))), "does not fit"),
    "no ids": (batch("ids", None), "micro.1.ids is missing"),
    "no params": (batch("params.1", None), "micro.1.params.1 is missing"),
    "no crops": (batch("crops.0", None), "micro.1.crops.0 is missing"),
    "local crops left out": (batch("crops.1", None), "micro.1.crops.1 is missing"),
    "ids are floats": (batch("ids", torch.Tensor.float), "int64 [B] is expected"),
    "labels too few": (batch("labels", lambda t: t[:-1]), "hold 2, 2 and 1 numbers"),
    "position outside": (batch("positions", lambda t: t + 100), "outside the global batch of 4"),
    "position below": (batch("positions", lambda t: t - 100), "outside the global batch of 4"),
    "crops are floats": (batch("crops.0", torch.Tensor.float), "uint8 [views, 2, 3, size, size] is expected"),
    "crops lack a dimension": (batch("crops.0", lambda t: t[0]), "is expected"),
    "crops of no view": (batch("crops.0", lambda t: t[:0]), "is expected"),
    "crops of one channel": (batch("crops.0", lambda t: t[:, :, :1]), "is expected"),
    "crops not square": (batch("crops.0", lambda t: t[..., :-1]), "is expected"),
    "crops too few": (batch("crops.0", lambda t: t[:, :1]), "is expected"),
    "crops of a size the ViT refuses": (
        tensors("batch.safetensors", lambda t: t.update({k: v[..., :31, :31] for k, v in t.items() if "crops.0" in k})),
        "cannot compute this batch",
    ),
    "a view too few": (
        tensors("batch.safetensors", lambda t: t.update({k: v[:1] for k, v in t.items() if k.endswith(".0")})),
        "cannot compute this batch",
    ),
    "micro-batches that differ": (
        tensors(
            "batch.safetensors",
            lambda t: t.update({k: v[:1] for k, v in t.items() if "1.params.1" in k or "1.crops.1" in k}),
        ),
        "micro.1 holds other crops than micro.0",
    ),
    "params too short": (batch("params.0", lambda t: t[..., :-1]), "is expected"),
    "params are doubles": (batch("params.0", torch.Tensor.double), "is expected"),
    "order beyond the table": (batch("params.0", put(6, 24)), "no view draws"),
    "order between two": (batch("params.0", put(6, 0.5)), "no view draws"),
    "order is NaN": (batch("params.0", put(6, float("nan"))), "no view draws"),
    "blur that needs all memory": (batch("params.0", put(12, 1e9)), "no view draws"),
    "brightness is infinite": (batch("params.0", put(7, float("inf"))), "no view draws"),
    "a box beyond the crop": (batch("params.0", put(COLUMN["erase_w"], 1000)), "no view draws"),
    "a box before the crop": (batch("params.0", put(COLUMN["cutout_y"], -1)), "no view draws"),
    "a fill that there is not": (batch("params.0", put(COLUMN["erase_fill"], -3)), "no view draws"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folder(sound: Path, tmp_path: Path, kind: str) -> None:
    """One line that names the file and what is wrong with it; nothing in the folder is changed."""
    damage, expected = DAMAGE[kind]
    folder = shutil.copytree(sound, tmp_path / sound.name)
    damage(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    text = refusal(folder)
    assert expected in text and str(folder) in text
    after = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "batch.png"}
    assert after == before


def test_random_damage(sound: Path, tmp_path: Path) -> None:
    """200 random changes of bytes: an answer or one line, never another exception."""
    draw = np.random.default_rng(5)
    refused = 0
    for case in range(200):
        folder = shutil.copytree(sound, tmp_path / str(case) / sound.name)
        path = folder / draw.choice(["info.json", "batch.safetensors", "model.safetensors"], p=[0.4, 0.4, 0.2])
        data = bytearray(path.read_bytes())
        for _ in range(draw.integers(1, 4)):
            at = int(draw.integers(0, min(len(data), draw.choice([64, 2000, len(data)]))))
            data[at] = draw.integers(0, 256)
        path.write_bytes(data[: len(data) - draw.integers(0, 50)] if draw.random() < 0.1 else data)
        try:
            replay(folder)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), case
        shutil.rmtree(tmp_path / str(case))
    assert 60 < refused < 200


def test_names_do_nothing_to_a_terminal(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters are escaped; a name that is not UTF-8 on disk can be kept and shown."""
    made = Made(images)
    made.names[0], made.names[1], made.names[2] = "\x1b[2Jgone\n", os.fsdecode(b"caf\xe9.png"), "Grüße.png"
    folder = made.keep(tmp_path / "refused")
    text = printed(folder, capsys)
    assert printed(folder, capsys) == text
    info(names=["\ud800\x07", *made.names[1:]])(folder)
    assert "\\ud800\\x07" in printed(folder, capsys)
    assert "\x1b" not in text and "\\x1b[2Jgone\\n" in text and "caf\\udce9.png" in text and "Grüße.png" in text


@pytest.mark.parametrize("kind", ["run", "refused", "nothing", "empty"])
def test_another_folder_is_named(sound: Path, tmp_path: Path, kind: str) -> None:
    """The run or the folder of refused steps instead of one: the message says which there are."""
    shutil.copytree(sound, tmp_path / "run" / "refused" / sound.name)
    (tmp_path / "empty").mkdir()
    folder = {"run": tmp_path / "run", "refused": tmp_path / "run" / "refused", "nothing": tmp_path / "no"}.get(kind)
    text = refusal(folder or tmp_path / "empty")
    if kind in ("run", "refused"):
        assert f"name one refused step: {tmp_path / 'run' / 'refused' / sound.name}" in text
    else:
        assert "a refused step is a folder such as RUN/refused/step_00000123_rank_00000" in text


def test_a_method_that_fails(images: Path, tmp_path: Path) -> None:
    text = refusal(Made(images, kind=Fails).keep(tmp_path / "refused"))
    assert "Fails cannot compute this batch: IndexError: no such row" in text
    assert (tmp_path / "refused" / "step_00000007_rank_00000" / "batch.png").is_file()


def test_a_method_from_outside_the_tree(images: Path, tmp_path: Path) -> None:
    """Needs its module: without it one line says so; with it the replay works, in a process of its own."""
    made = Made(images)
    package = tmp_path / "package"
    package.mkdir()
    (package / "mine.py").write_text("from selfsup.methods.dino import DINO\nclass Mine(DINO):\n    pass\n")
    method = made.config.method.model_copy(update={"name": "mine:Mine"})
    folder = made.keep(tmp_path / "refused", config=made.config.model_copy(update={"method": method}))
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from selfsup import UserError
        from selfsup.replay import run
        try:
            run(Path({str(folder)!r}))
        except UserError as error:
            print(error)
            sys.exit(2)
    """)
    for path, status, expected in ((None, 2, "add its folder to PYTHONPATH"), (package, 0, "finite in replay")):
        env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == status and expected in done.stdout, done.stderr
