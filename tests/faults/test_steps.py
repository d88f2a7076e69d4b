"""Steps that go wrong: a spike, no memory, a loader worker that dies, images that cannot be read, a clock that jumps."""

import json
import os
import random
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.faults.lab import (
    Lab,
    checkpoints,
    ended,
    log,
    nobody_left,
    recipe,
    same,
    same_weights,
    steps_logged,
    told,
    weights,
)
from tests.faults.table import Cases
from tests.methods.tiny import write_images

SLOW = ("slow", {"seconds": 0.02})
SPIKE = ("spike.factor=10", "spike.window=8")


@pytest.mark.faults("spike")
@pytest.mark.parametrize("step", [13, 15, 20])
def test_spike_is_rolled_back(lab: Lab, tmp_path: Path, step: int) -> None:
    """Between two checkpoints, in the step of a checkpoint, in a step that is logged later."""
    out = tmp_path / "run"
    process = lab.run(out, *SPIKE, fault=("scale_loss", {"step": step, "factor": 1000.0}))
    expected = rf"step {step}: the loss spiked.*back to step {(step - 1) // 5 * 5}, leaving out step {step}\b"
    assert re.search(expected, process.stderr()), process.stderr()
    lines = log(out)
    assert len(lines) == 24
    reference = lab.undisturbed(*SPIKE, fault=("nan", {"step": step}))
    same_weights(out, reference)
    assert weights(out) != weights(lab.undisturbed())
    others = [x for x in log(reference) if x["step"] != step]
    assert [x for x in lines if x["step"] != step] == others


@pytest.mark.faults("spike")
def test_batches_before_a_spike_are_left_out_too(lab: Lab, tmp_path: Path) -> None:
    """Those the checkpoint does not hold, and the message counts no others."""
    fault = ("scale_loss", {"step": 18, "factor": 1000.0})
    for skip, first in ((2, 17), (9, 16)):
        out = tmp_path / str(skip)
        process = lab.run(out, *SPIKE, f"spike.skip={skip}", fault=fault)
        assert f"back to step 15, leaving out steps {first} to 18" in process.stderr(), process.stderr()
        assert [x["step"] for x in log(out) if x.get("left_out")] == list(range(first, 19))


@pytest.mark.faults("spike")
def test_too_many_spikes(lab: Lab, tmp_path: Path) -> None:
    """Exit 2 with what may be changed; doing so goes on."""
    out = tmp_path / "run"
    faults = [("scale_loss", {"step": step, "factor": 1000.0}) for step in (12, 17)]
    told(
        lab.run(out, *SPIKE, "spike.max_rollbacks=1", fault=faults, status=2), "step 17.*after 1 rollbacks", "--resume"
    )
    assert checkpoints(out)[-1] == 15
    lab.run(out, *SPIKE, "spike.max_rollbacks=2", fault=faults)
    assert [x["step"] for x in log(out) if x.get("left_out")] == [12, 17]


@pytest.mark.faults("spike")
def test_spike_before_any_checkpoint(lab: Lab, tmp_path: Path) -> None:
    """There is nothing to go back to yet: it is said, and the run goes on or starts again; no step is lost."""
    process = lab.run(tmp_path / "run", *SPIKE, fault=("scale_loss", {"step": 4, "factor": 1000.0}))
    assert re.search("step 4: the loss spiked", process.stderr()), process.stderr()
    assert len(log(tmp_path / "run")) == 24


@pytest.mark.faults("spike")
def test_killed_after_a_rollback(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """The batch stays left out."""
    fault = ("scale_loss", {"step": 13, "factor": 1000.0})
    for name in ("step_00000015", "step_00000020"):
        with cases(name):
            out = tmp_path / name
            kill = ("kill_at", {"name": f"make_folder checkpoints/.tmp-{name}", "before": 0, "when": "before"})
            lab.run(out, *SPIKE, fault=[fault, kill], status=-9)
            lab.run(out, *SPIKE, fault=fault)
            assert len(log(out)) == 24
            same_weights(out, lab.undisturbed(*SPIKE, fault=("nan", {"step": 13})))


@pytest.mark.faults("spike")
def test_spike_on_one_of_two_ranks(lab: Lab, tmp_path: Path) -> None:
    """Both go back."""
    out = tmp_path / "run"
    lab.run_ranks(out, *SPIKE, fault={1: ("scale_loss", {"step": 13, "factor": 1000.0})})
    assert len(log(out)) == 24
    same_weights(out, lab.undisturbed(*SPIKE, world=2, fault=("nan", {"step": 13})))


@pytest.mark.faults("memory")
def test_out_of_memory(lab: Lab, tmp_path: Path) -> None:
    """Sizes and what to lower, in two lines; nothing is lost."""
    out = tmp_path / "run"
    process = lab.run(out, fault=("out_of_memory", {"step": 13}), status=2)
    told(process, "out of memory.*step 13", "global_batch=8", "2.00 GiB", r"accumulate=2", "grad_checkpointing=true")
    assert checkpoints(out)[-1] >= 10
    advised = tmp_path / "advised"
    shutil.copytree(out, advised)
    process = lab.run(advised, "accumulate=2", "grad_checkpointing=true")
    assert "accumulate changes from 1 to 2" in process.stderr()
    pairs = list(zip(log(advised), log(lab.undisturbed())))
    assert len(pairs) == 24 and max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 1e-4
    lab.resumed_is_same(out)


@pytest.mark.faults("memory")
def test_out_of_memory_on_one_rank(lab: Lab, tmp_path: Path) -> None:
    """The other rank ends too, within seconds, and says why."""
    out = tmp_path / "run"
    ranks = lab.ranks(out, fault={1: ("out_of_memory", {"step": 13})})
    told(ranks[1], "out of memory.*rank 1")
    status = ranks[0].wait(30)
    assert status in (1, 2)
    assert re.search("rank 1.*out of memory", ranks[0].stderr(), re.DOTALL), ranks[0].stderr()
    assert "Traceback" not in ranks[0].stderr()
    lab.resumed_is_same(out, world=2)


@pytest.mark.faults("worker")
def test_killed_worker(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """One of two, both, the only one: the run goes on, says so, and leaves nobody behind."""
    for workers, victims in ((2, 1), (2, 2), (1, 1)):
        with cases(f"{victims} of {workers}"):
            out = tmp_path / f"{workers}_{victims}"
            process = lab.start(out, f"workers={workers}", fault=SLOW)
            process.wait_for(lambda out=out: steps_logged(out) >= 6)
            children = process.children()
            assert len(children) == workers
            for pid in children[:victims]:
                os.kill(pid, signal.SIGKILL)
            ended(process, 0)
            assert re.search("worker", process.stderr()) and "Traceback" not in process.stderr(), process.stderr()
            same(out, lab.undisturbed())
            nobody_left(process)


@pytest.mark.faults("worker")
def test_worker_killed_in_one_of_two_ranks(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ranks = lab.ranks(out, "workers=1", fault={0: SLOW, 1: SLOW})
    ranks[0].wait_for(lambda: steps_logged(out) >= 6)
    for pid in ranks[1].children():
        os.kill(pid, signal.SIGKILL)
    for process in ranks:
        ended(process, 0)
    same(out, lab.undisturbed(world=2))


def spoil(folder: Path) -> tuple[set[str], set[str]]:
    """Six of 120 images become what is found in the wild. (names that cannot be read, names that are converted)."""
    names = sorted(p.name for p in folder.iterdir())
    chosen = random.Random(0).sample(names, 6)
    empty, truncated, html, bomb, cmyk, deep = (folder / name for name in chosen)
    empty.write_bytes(b"")
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size // 2])
    html.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    Image.new("1", (4000, 4000)).save(bomb, "PNG")
    Image.open(cmyk).convert("CMYK").save(cmyk, "TIFF")
    Image.open(deep).convert("I").point(lambda v: v * 257).convert("I;16").save(deep, "PNG")
    return {p.name for p in (empty, truncated, html, bomb)}, {cmyk.name, deep.name}


@pytest.mark.faults("images")
def test_bad_images(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """Listed once each, replaced the same way by any number of workers, also when stopped in between and resumed."""
    images = write_images(tmp_path / "images", 120)
    bad, _ = spoil(images)
    file = recipe(tmp_path / "recipe.yaml", images, "data.max_pixels=1000000")

    def arguments(out: str, *overrides: str) -> list[Any]:
        return ["train", file, *overrides, "--out", tmp_path / out, "--resume"]

    def listed(out: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (tmp_path / out / "bad_files.jsonl").read_text().splitlines()]

    with cases("workers=0"):
        ended(lab.zygote.run(arguments("a")), 0)
        found = listed("a")
        assert sorted(Path(x["file"]).name for x in found) == sorted(bad)
        reasons = {Path(x["file"]).name: x["reason"] for x in found}
        assert all(reasons.values()) and len(set(reasons.values())) == 4, reasons
    with cases("workers=2"):
        ended(lab.zygote.run(arguments("b", "workers=2")), 0)
        same(tmp_path / "b", tmp_path / "a")
        assert sorted(map(str, listed("b"))) == sorted(map(str, listed("a")))
    with cases("killed and resumed"):
        kill = ("kill_at", {"name": "make_folder checkpoints/.tmp-step_00000020", "before": 0, "when": "before"})
        ended(lab.zygote.run(arguments("c", "workers=2"), fault=kill), -9)
        ended(lab.zygote.run(arguments("c", "workers=1")), 0)
        same(tmp_path / "c", tmp_path / "a")
        assert sorted(map(str, listed("c"))) == sorted(map(str, listed("a")))


@pytest.mark.faults("images")
def test_too_many_bad_images(lab: Lab, tmp_path: Path) -> None:
    """Above data.max_bad_fraction the run stops, and says which."""
    images = write_images(tmp_path / "images", 40)
    for path in sorted(images.iterdir())[:12]:
        path.write_bytes(b"")
    file = recipe(tmp_path / "recipe.yaml", images)
    process = lab.zygote.run(["train", file, "--out", tmp_path / "run"])
    told(process, r"could not be read.*max_bad_fraction", "empty file")
    nobody_left(process)


@pytest.mark.faults("clock")
def test_clock_jumps_back(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """By an hour in the middle of a run; by a day between a kill and the resume, so that all files are of the future."""
    with cases("during a run"):
        process = lab.run(tmp_path / "a", "hang_timeout=20", fault=("clock_back", {"step": 12, "seconds": 3600.0}))
        same(tmp_path / "a", lab.undisturbed())
        assert "Traceback" not in process.stderr()
        times = [
            x["time"]
            for x in map(json.loads, (tmp_path / "a" / "metrics.jsonl").read_text().splitlines())
            if "time" in x
        ]
        assert min(times) < times[0] - 3000, "the clock did not jump"
    with cases("between two"):
        out = tmp_path / "b"
        process = lab.start(out, "workers=1", fault=SLOW)
        process.wait_for(lambda: steps_logged(out) >= 12)
        process.kill()
        process.wait()
        for path in out.rglob("*"):
            stat = path.stat()
            os.utime(path, (stat.st_atime + 86400, stat.st_mtime + 86400))
        lab.run(out, fault=("clock_back", {"step": 0, "seconds": 86400.0}))
        same(out, lab.undisturbed())
    with cases("two ranks, one of them"):
        lab.run_ranks(tmp_path / "c", "hang_timeout=20", fault={1: ("clock_back", {"step": 12, "seconds": 3600.0})})
        same(tmp_path / "c", lab.undisturbed(world=2))
