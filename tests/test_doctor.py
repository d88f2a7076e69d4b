"""`selfsup doctor`: what it sees is true, its work is bounded, and the command it proposes runs."""

import json
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from selfsup import doctor, methods
from selfsup.cli import app
from selfsup.config import DataConfig, load
from selfsup.data.datasets import DatasetSource
from selfsup.doctor import advice, machine, report
from selfsup.doctor.machine import Device, Machine
from selfsup.doctor.survey import Classes, Survey, survey
from selfsup.errors import UserError
from tests.methods.tiny import cli, write_images

SURVEYING = sys.modules["selfsup.doctor.survey"]  # the package has a function of this name
FILES = sys.modules["selfsup.doctor.files"]


def here(**changes: Any) -> Machine:
    """Two CPUs and no GPU."""
    base: dict[str, Any] = {
        "cpu": "a CPU", "cpus": 2, "bf16": False, "memory": 16 * 10**9, "free": 12 * 10**9, "disk": "/", "disk_size": 10**12,
        "disk_free": 10**11, "shared_free": 10**10,
    }  # fmt: skip
    return Machine(**{**base, **changes})


def gpus(count: int, memory: float = 80e9, bf16: bool = True) -> tuple[Device, ...]:
    return tuple(Device("GPU", int(memory), int(memory), bf16) for _ in range(count))


def seen(count: int, across: int, down: int, channels: int = 3, **changes: Any) -> Survey:
    """As if 100 images had been decoded."""
    mean, std = (0.5, 0.45, 0.4)[:channels], (0.25, 0.25, 0.25)[:channels]
    found = Survey("PHOTOS", count, 0.1, decoded=100, channels=channels, mean=mean, std=std, decode_ms=5.0)
    found.width, found.height = np.full(100, across), np.full(100, down)
    for key, value in changes.items():
        setattr(found, key, value)
    return found


# -------------------------------------------------------------------------------------------------------------- the look


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 colour images in four classes, and next to them: two copies, an empty file, HTML, half a file, a grey one."""
    root = write_images(tmp_path_factory.mktemp("doctor") / "images", count=40, size=40, classes=4)
    data = (root / "class_0" / "image_000.png").read_bytes()
    for name in ("copy.png", "again.PNG"):
        (root / "class_1" / name).write_bytes(data)
    (root / "class_2" / "empty.jpg").write_bytes(b"")
    (root / "class_2" / "page.jpg").write_bytes(b"<html>gone</html>")
    (root / "class_3" / "half.png").write_bytes(data[: len(data) // 2])
    Image.new("L", (80, 30), 9).save(root / "class_3" / "grey.bmp")
    return root


def test_what_is_in_a_folder(folder: Path) -> None:
    found = survey(str(folder))
    assert (found.count, found.decoded, found.readable, found.bad_count) == (46, 46, 43, 3)
    assert {Path(name).name for name, _ in found.bad} == {"empty.jpg", "page.jpg", "half.png"}
    assert found.missing_count == 1 and found.missing[0].endswith("empty.jpg")
    assert found.formats == {"PNG": 42, "BMP": 1} and found.modes == {"RGB": 42, "L": 1}
    assert (found.channels, found.grey, found.blank) == (3, 1, 1)
    assert found.duplicates.found == 2 and {Path(b).name for _, b in found.duplicates.examples} <= {
        *("copy.png", "again.PNG", "image_000.png"),
    }
    assert found.duplicates.hashed == found.duplicates.same_size < found.count == found.duplicates.looked_at
    assert found.classes is not None and found.classes.count == 4 and found.classes.labelled == 46
    assert found.classes.largest[1] == 12 and found.classes.smallest == ("class_0", 10)
    assert found.width.max() == 80 and found.height.min() == 30 and found.elongation.max() == pytest.approx(80 / 30)


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 200, (50, 50, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
    pixels = np.stack([np.asarray(Image.open(tmp_path / f"{i}.png")) for i in range(3)]) / 255
    found = survey(str(tmp_path))
    assert found.mean == pytest.approx(pixels.mean(axis=(0, 1, 2)), abs=1e-3)
    assert found.std == pytest.approx(pixels.std(axis=(0, 1, 2)), abs=1e-3)


def test_grey_and_many_channels(tmp_path: Path) -> None:
    for i in range(4):
        array = np.random.default_rng(i).integers(0, 255, (20, 24, 5), dtype=np.uint8)
        (tmp_path / "five").mkdir(exist_ok=True), (tmp_path / "grey").mkdir(exist_ok=True)
        np.save(tmp_path / "five" / f"{i}.npy", array)
        Image.fromarray(array[:, :, 0]).convert("RGB").save(tmp_path / "grey" / f"{i}.png")
    five, grey = survey(str(tmp_path / "five")), survey(str(tmp_path / "grey"))
    assert (five.channels, len(five.mean), five.bad_count, int(five.width[0])) == (5, 5, 0, 24)
    assert (grey.channels, grey.grey, len(grey.mean)) == (1, 4, 1)


def test_other_sources(folder: Path, tmp_path: Path) -> None:
    """The bundled zip, a list with a file that is not there, and a data set without files, whose labels cost a look."""
    demo = survey("demo", sample=20)
    assert (demo.count, demo.decoded, demo.channels, demo.duplicates.looked_at) == (10_000, 20, 1, 10_000)
    assert demo.classes is not None and demo.classes.count == 10
    listed = tmp_path / "list.txt"
    listed.write_text(
        f"{folder}/class_0/image_000.png\tcat\n{folder}/class_1/copy.png\tdog\n{folder}/nothing.png\tdog\n"
    )
    found = survey(str(listed))
    assert (found.count, found.missing_count, found.bad_count, found.duplicates.found) == (3, 1, 1, 1)

    class Images:
        def __init__(self) -> None:
            self.asked = 0

        def __len__(self) -> int:
            return 1000

        def __getitem__(self, i: int) -> Any:
            self.asked += 1
            return Image.new("RGB", (8, 8), (i // 2 % 256, 0, 0)), i % 2

    data = Images()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SURVEYING, "open_source", lambda *a, **k: DatasetSource(data, 3, DataConfig(), "images"))
        found = survey("anything", sample=50)
    assert found.decoded == 50 and found.sizes_seen == 0 and found.classes is not None and found.classes.looked_at == 50
    assert data.asked < 400 and found.duplicates.what == "decoded images"


def test_work_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample, so many sizes, so many hashes; and what was not done is said."""
    write_images(tmp_path, count=30, size=16)
    for i in range(30):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / f"same_size_{i}.bmp")
    monkeypatch.setattr(FILES, "MOST_HASHED", 7)
    found = survey(str(tmp_path), sample=12)
    assert (found.decoded, found.duplicates.hashed, found.duplicates.found) == (12, 7, 0)
    assert found.duplicates.same_size >= 30 and "no duplicate found" in "\n".join(report.data_lines(found))
    monkeypatch.setattr(FILES, "MOST_SIZES", 20)
    assert survey(str(tmp_path)).sizes_seen == 20
    again, other = survey(str(tmp_path), sample=12), survey(str(tmp_path), sample=12)
    assert again.width.tolist() == other.width.tolist()
    assert survey(str(tmp_path), seconds=0.0).decoded == 1  # no time at all


def test_many_files_are_listed_in_seconds(tmp_path: Path) -> None:
    """10,000 here, nearly all of the same size; the time is in proportion to their number."""
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "0.png")
    data = (tmp_path / "0.png").read_bytes()
    for i in range(1, 10_000):
        (tmp_path / f"{i}.png").write_bytes(data + i.to_bytes(4, "big"))
    began = time.process_time()
    found = survey(str(tmp_path), sample=50)
    assert found.count == 10_000 and found.duplicates.hashed == 9_999 and time.process_time() - began < 10


# ------------------------------------------------------------------------------------------------------------ the advice

CASES = [
    (seen(10_000, 28, 28, 1), here(), "demo", 32),
    (seen(60_000, 32, 32), here(gpus=gpus(1)), "demo", 128),
    (seen(5_000, 500, 375), here(), "demo", 32),
    (seen(5_000, 500, 375), here(gpus=gpus(1)), "dino_vits16_smalldata", 64),
    (seen(1_281_167, 500, 375), here(gpus=gpus(8), cpus=64), "dino_vits16", 1024),
    (seen(1_281_167, 500, 375), here(gpus=gpus(1, 24e9), cpus=8), "dino_vits16", 1024),
    (seen(5_000, 120, 140), here(gpus=gpus(2, 11e9, bf16=False)), "dino_vits16_smalldata", 64),
    (seen(40, 4000, 600), here(gpus=gpus(4)), "dino_vits16_smalldata", 8),
    (seen(3, 300, 300, 1), here(gpus=gpus(1)), "dino_vits16_smalldata", 2),
    (seen(900, 300, 300, bad_count=20, width=np.full(80, 300), height=np.full(80, 300)), here(), "demo", 32),
]  # fmt: skip


@pytest.mark.parametrize(("data", "computer", "recipe", "batch"), CASES)
def test_proposals_are_whole(data: Survey, computer: Machine, recipe: str, batch: int, tmp_path: Path) -> None:
    """They load, the batch divides, there are enough images, and every choice has a reason."""
    found = advice.propose(data, computer, tmp_path)
    assert found is not None and (found.recipe, found.config.global_batch) == (recipe, batch)
    config = methods.complete(load(found.recipe, found.overrides))
    assert config == found.config and config.global_batch <= data.count
    processes = int(found.command.split("--nproc-per-node ")[1].split()[0]) if "torchrun" in found.command else 1
    assert config.global_batch % (config.accumulate * processes) == 0 and processes <= max(1, len(computer.gpus))
    assert config.backbone.in_chans == data.channels and len(config.mean) == data.channels
    assert config.views.global_.scale[0] >= config.views.local.scale[0]
    what = {choice.what for choice in found.choices}
    assert {"recipe", "global_batch", "learning rate", "crop size", "crop scales", "precision", "workers"} <= what
    assert all(choice.why for choice in found.choices)
    rate = next(choice.value for choice in found.choices if choice.what == "learning rate")
    assert float(rate) == pytest.approx(advice.learning_rate(found), rel=0.01)
    if recipe != "demo":  # a ViT takes whole patches
        assert config.views.global_.size % 16 == 0 == config.views.local.size % 16


def test_what_the_machine_changes(tmp_path: Path) -> None:
    def options(data: Survey, computer: Machine) -> Any:
        found = advice.propose(data, computer, tmp_path)
        assert found is not None
        return found

    large = seen(1_281_167, 500, 375)
    assert options(large, here(gpus=gpus(1, 24e9))).config.accumulate == 16
    assert "torchrun --nproc-per-node 8" in options(large, here(gpus=gpus(8))).command
    assert options(large, here(gpus=gpus(1, bf16=False))).config.precision == "fp16"
    assert options(large, here(gpus=gpus(8), cpus=64)).config.workers == 7
    starved = options(seen(5_000, 30, 30), here(free=10**9, cpus=64, disk_free=10**6, shared_free=64 << 20))
    assert starved.config.workers == 1 and sum("free" in w for w in starved.warnings) == 3
    labelled = Classes(3, 9, 0, ("a", 3), 3.0, ("b", 3), 9)
    found = options(seen(9000, 30, 30, classes=labelled), here())
    assert found.then is not None and found.then.startswith("selfsup eval knn ")
    assert options(seen(9000, 30, 30), here()).then is None
    wide = options(seen(9000, 900, 300), here(gpus=gpus(1))).config.views
    assert wide.global_.scale[1] < 0.5 and wide.local.scale[1] <= wide.global_.scale[0]
    assert advice.propose(seen(1, 300, 300), here(), tmp_path) is None


def labelled(classes: int, smallest: int, largest: int, unlabelled: int = 0) -> Classes:
    count = classes * (smallest + largest) // 2
    return Classes(classes, count, unlabelled, ("few", smallest), smallest, ("many", largest), count + unlabelled)


FIVE: dict[str, Any] = {"mean": (0.5,) * 5, "std": (0.25,) * 5}
ALTERNATIVES = [
    # what is seen, the machine, the methods that are named in this order, and words of a reason
    (CASES[0][0], here(), ["mae", "moco", "simsiam", "ibot"], "grey images"),
    (CASES[3][0], here(gpus=gpus(1)), ["moco", "simsiam", "ibot"], "queue"),
    (CASES[4][0], here(gpus=gpus(8), cpus=64), ["swav", "dinov2"], "640 GB"),
    (CASES[5][0], here(gpus=gpus(1, 24e9), cpus=8), ["moco", "simsiam", "ibot"], "64 at a time"),
    (CASES[6][0], CASES[6][1], ["moco", "simsiam", "ibot"], "hidden patches"),
    (CASES[7][0], CASES[7][1], ["moco", "ibot"], "8 at a time"),
    (CASES[9][0], here(), ["moco", "simsiam", "ibot"], "queue"),
    (seen(5_000, 300, 300, 5, **FIVE), here(), ["mae", "moco", "simsiam", "ibot"], "5 channels"),
    (seen(5_000, 300, 300, 5, **FIVE), here(gpus=gpus(1)), ["mae", "moco", "simsiam", "ibot"], "5 channels"),
    (seen(5_000, 300, 300, 1, modes=Counter({"I;16": 99, "L": 1})), here(), ["mae", "moco", "simsiam", "ibot"], "I;16 pixels"),
    (seen(5_000, 40, 40, classes=labelled(4, 1_000, 1_500)), here(), ["supervised", "supcon", "moco", "simsiam", "ibot"],
     "labels of 4 classes, balanced"),
    (seen(5_000, 300, 300, classes=labelled(4, 50, 2_000, 200)), here(gpus=gpus(1)), ["supcon", "moco", "simsiam", "ibot"],
     "the largest 40 times the smallest, which it will hardly learn"),
    (seen(900_000, 300, 300, classes=labelled(1_000, 900, 900)), here(gpus=gpus(8)), ["supervised", "supcon", "swav", "dinov2"],
     "labels of 1,000 classes"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "computer", "named", "words"), ALTERNATIVES)
def test_alternatives(data: Survey, computer: Machine, named: list[str], words: str, tmp_path: Path) -> None:
    """Those that suit, each with its reason and a command that fits the data as the first proposal does."""
    found = advice.propose(data, computer, tmp_path)
    assert found is not None and found.config.method.name == "dino"
    assert [each.method for each in found.alternatives] == named
    assert any(words in each.why for each in found.alternatives)
    for each in found.alternatives:
        config = methods.complete(load(each.recipe, each.overrides))
        kind = methods.find(config.method.name)
        assert config == each.config and config.method.name == each.method and config.data.path == data.spec
        processes = int(each.command.split("--nproc-per-node ")[1].split()[0]) if "torchrun" in each.command else 1
        assert config.global_batch % (config.accumulate * processes) == 0 and config.global_batch <= data.count
        assert config.accumulate == 1 or not hasattr(kind, "whole_batch")
        assert config.backbone.in_chans == data.channels and config.workers == found.config.workers
        assert config.method.options.get("queue_length", 0) <= data.count and config.data.val is None
        assert kind.labels != "needed" or (data.classes is not None and not data.classes.unlabelled)
    whole = [a for a in found.alternatives if hasattr(methods.find(methods.METHODS[a.method]), "whole_batch")]
    assert (found.passed_over is None) or all(a.method in ("simsiam", "supcon") for a in whole)
    shown = report.lines(computer, data, found)
    assert all(f"or {a.recipe} ({a.method}): {a.why}" in shown for a in found.alternatives) and shown[-1] != ""
    told = report.as_json(computer, data, found)["proposal"]["alternatives"]
    assert [each["command"] for each in told] == [a.command for a in found.alternatives]


def test_every_proposed_command_is_whole(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they are pasted: `--print-config` shows what was meant; the small ones are built from it."""
    doctor.run(str(folder), out=tmp_path / "runs")
    pasted = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if "selfsup train" in line]
    assert len(pasted) >= 5
    for words in pasted:
        shown = CliRunner().invoke(app, [*words[1:], "--print-config"])
        assert shown.exit_code == 0, (words, shown.output, shown.exception)
        (tmp_path / "config.yaml").write_text(shown.output)
        config = load(str(tmp_path / "config.yaml"), ["data.classes=4"])
        method = methods.create(methods.complete(config))
        size = config.views.global_.size
        with torch.no_grad():
            assert method.export()(torch.zeros(2, config.backbone.in_chans, size, size)).pooled.shape[0] == 2


@pytest.mark.slow
def test_the_other_commands_run(folder: Path, tmp_path: Path) -> None:
    done = cli("doctor", str(folder), "--out", str(tmp_path / "runs"), "--json")
    for each in json.loads(done.stdout)["proposal"]["alternatives"]:
        trained = cli(
            *shlex.split(each["command"])[1:], "stop_at=2", "threads=1", "tensorboard=false", "eval.every=null"
        )
        assert trained.returncode == 75, (each["command"], trained.stderr)


@pytest.mark.parametrize("kind", ["colour", "list"])
def test_the_command_runs(folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is pasted, from a path that a shell would split, with broken images among them."""
    spec = tmp_path / "my images"
    if kind == "list":
        spec = spec.with_suffix(".txt")
        spec.write_text("".join(f"{p}\n" for p in sorted(folder.rglob("*.png"))[:20]))
    else:
        spec.symlink_to(folder)
    done = cli("doctor", str(spec), "--out", str(tmp_path / "runs"))
    assert done.returncode == 0, done.stderr
    pasted = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("selfsup ")]
    assert pasted[0][1] == "train" and (len(pasted) == 2) == (kind == "colour")
    trained = cli(*pasted[0][1:], "stop_at=2", "threads=1", "tensorboard=false")
    assert trained.returncode == 75, trained.stderr
    assert (tmp_path / "runs" / "my_images" / "config.yaml").is_file()


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON, the machine alone, and images none of which can be read: told, and then exit 2."""
    doctor.run(str(folder), as_json=True, out=tmp_path / "not" / "there")
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"machine", "data", "proposal"} and found["data"]["quantiles"]["width"][-1] == 80
    assert found["proposal"]["command"].startswith("selfsup train demo") and found["machine"]["disk"] == str(tmp_path)
    doctor.run(None, as_json=True)
    assert set(json.loads(capsys.readouterr().out)) == {"machine"}
    doctor.run(None)
    assert "memory" in capsys.readouterr().out
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match="0 of 3 images"):
        doctor.run(str(tmp_path))
    assert "3 of 3 decoded cannot be read" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such folder"):
        doctor.run(str(tmp_path / "nothing"))


def test_this_machine() -> None:
    found = machine.look(Path("runs"))
    assert found.cpus >= 1 and 0 < found.free <= found.memory and 0 < found.disk_free <= found.disk_size
