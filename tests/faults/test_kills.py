"""kill -9 at every operation of a save and at random times; checkpoints that are damaged afterwards."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import lab as checks
from tests.faults.lab import EVERY, STEPS, Lab, checkpoints, ended, log, nobody_left, same, steps_logged
from tests.faults.table import Cases

SHARES = 4

Point = tuple[str, int, str, int]
"""(name of a call, how many of that name came before, 'before', 'after' or 'half', step of the last checkpoint before)."""


@pytest.fixture(scope="session")
def calls(_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """Every operation on the disk of an undisturbed run, in order; but for the report that follows the last save."""
    folder = tmp_path_factory.mktemp("trace")
    _lab.run(folder / "run", fault=("trace", {"path": str(folder / "calls.jsonl")}))
    every = [(name, before) for name, before in map(json.loads, (folder / "calls.jsonl").read_text().splitlines())]
    assert any("report.html" in name for name, _ in every)
    return every[: next(i for i, (name, _) in enumerate(every) if "report.html" in name)]


def role(name: str) -> str:
    """A call's name without the numbers of steps."""
    return re.sub(r"\d{8}", "N", name)


def saves(calls: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """The calls of each save, which begins with a new folder; before the first one: the start of the run."""
    parts: list[list[tuple[str, int]]] = [[]]
    for call in calls:
        if call[0].startswith("make_folder"):
            parts.append([])
        parts[-1].append(call)
    return parts


def points(calls: list[tuple[str, int]]) -> list[Point]:
    """Where to kill: before each call of the start and of a save that prunes, after each call of the first save, half way
    through each write of both and each removal, and around the last save."""
    start, *all_saves = saves(calls)
    first, pruning, last = all_saves[0], all_saves[2], all_saves[-1]
    chosen: list[Point] = [(*call, "before", 0) for call in start] + [(*call, "before", 2 * EVERY) for call in pruning]
    chosen += [(*call, "after", 0) for call in [*start, *first]]
    halves = [(call, 0) for call in [*start, *first]] + [(call, 2 * EVERY) for call in pruning]
    chosen += [(*call, "half", step) for call, step in halves if call[0].startswith(("write ", "remove "))]
    return [*chosen, (*last[0], "before", STEPS - STEPS % EVERY), (*last[-1], "after", STEPS)]


@pytest.mark.faults("commit")
def test_the_points_of_a_save(calls: list[tuple[str, int]]) -> None:
    """A save that prunes has a dozen and more places to be killed at; every save is of the same operations."""
    start, *all_saves = saves(calls)
    names = list(dict.fromkeys(role(name) for name, _ in all_saves[2]))
    print(f"\n{len(start)} operations at the start, {len(all_saves[2])} in a save:", *names, sep="\n    ")
    assert len(names) >= 12
    for kind in ("make_folder", "write", "fsync", "rename", "remove"):
        assert any(name.startswith(kind) for name in names), kind
    assert len(all_saves) == len(range(EVERY, STEPS + 1, EVERY)) + (STEPS % EVERY > 0)
    assert all([role(n) for n, _ in save] == [role(n) for n, _ in all_saves[2]] for save in all_saves[2:])
    names_of_first = [role(n) for n, _ in all_saves[0]]
    assert [n for n in names_of_first if n not in names] == []


@pytest.mark.faults("commit")
@pytest.mark.parametrize("share", range(SHARES))
def test_killed_at_a_point(lab: Lab, tmp_path: Path, calls: list[tuple[str, int]], cases: Cases, share: int) -> None:
    """Whatever a save was doing: what was complete before is valid, and the resumed run is the undisturbed one."""
    for i, (name, before, when, done) in enumerate(points(calls)[share::SHARES]):
        with cases(f"{when} {name} ({before} such calls came before it)"):
            out = tmp_path / f"{i:03d}"
            lab.run(out, status=-9, fault=("kill_at", {"name": name, "before": before, "when": when}))
            assert max(whole(out), default=0) >= done
            lab.resumed_is_same(out)
            shutil.rmtree(out)


def whole(run: Path) -> list[int]:
    """Steps of the checkpoints that verify."""
    from selfsup import checkpoint

    found = []
    for step, folder in checkpoint.steps(run / "checkpoints"):
        try:
            checkpoint.verify(folder)
            found.append(step)
        except checkpoint.InvalidCheckpoint:
            continue
    return found


@pytest.mark.faults("commit")
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_around_the_export(lab: Lab, tmp_path: Path, when: str) -> None:
    """All steps are done, the backbone is not there yet, or just so: the resumed run only exports."""
    lab.run(tmp_path / "run", status=-9, fault=("kill_in_export", {"when": when}))
    assert checkpoints(tmp_path / "run")[-1] == STEPS
    lab.resumed_is_same(tmp_path / "run")


@pytest.mark.faults("random")
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_times(lab: Lab, tmp_path: Path, cases: Cases, seed: int) -> None:
    """Four kills in each of five runs; the last run has loader workers, which end with their trainer."""
    lab.undisturbed()
    rng, out = random.Random(seed), tmp_path / "run"
    workers = ["workers=2"] if seed == 4 else []
    killed = []
    for n in range(4):
        with cases(f"seed {seed}, kill {n}"):
            process = lab.start(out, *workers)
            delay = rng.uniform(0.05, 0.6 * lab.seconds)
            process.ends_within(delay)
            process.kill()
            assert process.wait() in (-9, 0)
            killed.append(process)
            assert workers or "Traceback" not in process.stderr()  # of a worker that misses its trainer
            whole_lines(out)
    lab.resumed_is_same(out, *workers)
    for process in killed:
        nobody_left(process)


@pytest.mark.faults("random")
def test_killed_while_starting(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """Again and again before the first step, 12 ms later each time: nothing in the folder is in the way of the next."""
    out = tmp_path / "run"
    for n in range(15):
        with cases(f"{12 * n} ms"):
            process = lab.start(out)
            process.ends_within(0.012 * n)
            process.kill()
            assert process.wait() == -9
            assert "Traceback" not in process.stderr() and "in use" not in process.stderr(), process.stderr()
    lab.resumed_is_same(out)


def whole_lines(run: Path) -> None:
    """What is in the log is whole lines of the steps from the first."""
    if (run / "metrics.jsonl").exists():
        log(run)


# ---------------------------------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "flipped": flip, "deleted": Path.unlink}
FILES = ("model.safetensors", "optimizer.safetensors", "rank_00000.safetensors", "trainer.json", "MANIFEST.json")


@pytest.fixture(scope="session")
def stopped(_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped at step 15, with checkpoints 10 and 15."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    _lab.run(out, "stop_at=15", status=75)
    assert checkpoints(out) == [10, 15]
    return out


@pytest.mark.faults("damage")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(lab: Lab, stopped: Path, tmp_path: Path, cases: Cases, damage: str) -> None:
    for file in FILES:
        with cases(f"{file} {damage}"):
            out = tmp_path / file
            shutil.copytree(stopped, out)
            DAMAGES[damage](out / "checkpoints" / "step_00000015" / file)
            process = lab.resumed_is_same(out)
            warning = re.search("passing over a damaged checkpoint: .*step_00000015.*", process.stderr())
            assert warning and file in warning[0], process.stderr()
            assert "resuming at step 10" in process.stderr()
            assert checkpoints(out)[-1] == STEPS


@pytest.mark.faults("damage")
def test_damage_beyond_a_file(lab: Lab, stopped: Path, tmp_path: Path, cases: Cases) -> None:
    """`latest` is lost or wrong; the newest folder is empty; every checkpoint is damaged: from the start, and said so."""

    def from_the_start(root: Path) -> None:
        for folder in root.glob("step_*"):
            truncate(folder / "model.safetensors")

    def emptied(root: Path) -> None:
        shutil.rmtree(root / "step_00000015")
        (root / "step_00000015").mkdir()

    damages: dict[str, tuple[Callable[[Path], object], str]] = {
        "latest deleted": (lambda root: (root / "latest").unlink(), "resuming at step 15"),
        "latest wrong": (lambda root: (root / "latest").write_bytes(b"\xffstep_00000099"), "resuming at step 15"),
        "folder emptied": (emptied, "passing over a damaged checkpoint.*resuming at step 10"),
        "all damaged": (from_the_start, "passing over.*passing over.*starting at step 0"),
    }
    for name, (damage, expected) in damages.items():
        with cases(name):
            out = tmp_path / name.replace(" ", "_")
            shutil.copytree(stopped, out)
            damage(out / "checkpoints")
            process = lab.run(out)
            assert re.search(expected, process.stderr(), re.DOTALL), process.stderr()
            same(out, lab.undisturbed())


@pytest.mark.faults("damage")
def test_status_verifies(lab: Lab, stopped: Path, tmp_path: Path, cases: Cases) -> None:
    """`selfsup status RUN --verify` names what is damaged, and changes nothing."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    with cases("whole"):
        process = lab.zygote.run(["status", out, "--verify"])
        ended(process, 0)
        assert "step_00000010" in process.stdout() and "step_00000015" in process.stdout()
    with cases("damaged"):
        flip(out / "checkpoints" / "step_00000015" / "optimizer.safetensors")
        before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
        process = lab.zygote.run(["status", out, "--verify"])
        ended(process, 2)
        said = process.stdout() + process.stderr()
        assert re.search("step_00000015.*optimizer.safetensors", said), said
        assert "Traceback" not in said
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.faults("damage")
def test_the_checks_can_fail(lab: Lab, tmp_path: Path) -> None:
    """'The same' tells a run of another seed, a log with a step missing or twice, half a line, and one other bit."""
    other = tmp_path / "seed"
    lab.run(other, "seed=1", resume=False)
    with pytest.raises(AssertionError):
        same(other, lab.undisturbed())
    with pytest.raises(AssertionError):
        checks.same_weights(other, lab.undisturbed())
    whole = (lab.undisturbed() / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    for name, lines in {
        "missing": [*whole[:3], *whole[4:]],
        "twice": [*whole[:3], *whole[2:]],
        "half": [*whole[:-1], whole[-1][:-5]],
        "short": whole[:-1],
    }.items():
        out = tmp_path / name
        shutil.copytree(lab.undisturbed(), out)
        (out / "metrics.jsonl").write_bytes(b"".join(lines))
        with pytest.raises((AssertionError, ValueError)):
            same(out, lab.undisturbed())
    shutil.copytree(lab.undisturbed(), tmp_path / "bit")
    flip(tmp_path / "bit" / "backbone" / "model.safetensors")
    with pytest.raises(AssertionError, match="backbone/model"):
        same(tmp_path / "bit", lab.undisturbed())
    assert steps_logged(lab.undisturbed()) == STEPS
