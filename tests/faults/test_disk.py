"""A disk that is full, a run folder that is removed, made read-only, or used by two."""

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfsup import checkpoint
from tests.faults import lab as checks
from tests.faults.lab import Lab, checkpoints, ended, log, nobody_left, same, steps_logged, told
from tests.faults.table import Cases
from tests.small_disk import as_root, mounted

SLOW = ("slow", {"seconds": 0.02})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    with mounted(tmp_path / "disk", "8m") as folder:
        yield folder


def size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def leave(disk: Path, free: int) -> Path:
    """A file that fills the disk but for so many bytes, to the page."""
    ballast = disk / "ballast"
    with open(ballast, "wb") as file:
        stat = os.statvfs(disk)
        count = max(0, stat.f_bavail * stat.f_frsize - free)
        os.posix_fallocate(file.fileno(), 0, count // stat.f_frsize * stat.f_frsize)
    return ballast


@pytest.mark.faults("full")
def test_disk_full(lab: Lab, small_disk: Path, cases: Cases) -> None:
    """Room for a hundredth, a half, nine tenths of a checkpoint, and for not even the log."""
    needed = size(lab.undisturbed() / "checkpoints" / "step_00000020")
    for name, free in (("half", needed // 2), ("most", needed * 9 // 10), ("little", needed // 20), ("none", 0)):
        with cases(f"room for {name} of a checkpoint"):
            out = small_disk / name
            lab.run(out, "stop_at=7", status=75)
            assert checkpoints(out) == [5, 7]
            before = log(out)
            ballast = leave(small_disk, free)
            process = lab.run(out, "checkpoint.every=10", status=2)
            message = told(process, "No space left|free")
            if name in ("half", "most"):
                assert re.search(r"step_00000010.* needs 0\.\d MB and 0\.\d MB are free", message), message
            assert 7 in checkpoints(out), "what was there before is gone"
            assert log(out)[: len(before)] == before
            ballast.unlink()
            lab.resumed_is_same(out)
            shutil.rmtree(out)


@pytest.mark.faults("full")
def test_disk_full_under_one_of_two_ranks(lab: Lab, small_disk: Path) -> None:
    """Both end, with the reason, and neither waits for the other."""
    out = small_disk / "run"
    for process in lab.ranks(out, "stop_at=7"):
        ended(process, 75)
    ballast = leave(small_disk, 100_000)
    ranks = lab.ranks(out)
    told(ranks[0], "free", timeout=30)
    told(ranks[1], timeout=30)
    assert 7 in checkpoints(out)
    ballast.unlink()
    lab.resumed_is_same(out, world=2)


@pytest.mark.faults("full")
def test_file_size_limit(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """RLIMIT_FSIZE (ulimit -f): below the size of the weights; below that of the log."""
    for limit in (100_000, 4096):
        with cases(f"{limit} bytes"):
            out = tmp_path / str(limit)
            lab.run(out, "stop_at=7", status=75)
            before = log(out)
            process = lab.run(out, fault=("file_limit", {"size": limit}), status=2)
            message = told(process, "File too large")
            if limit == 100_000:
                assert re.search(r"needs 0\.\d MB", message), message
            assert checkpoints(out)[-1] == 7
            assert log(out)[: len(before)] == before
            lab.resumed_is_same(out)


FAILING = {
    "write .tmp-config.yaml": 0,
    "make_folder checkpoints/.tmp-step_00000015": 10,
    "write checkpoints/.tmp-step_00000015/optimizer.safetensors": 10,
    "fsync checkpoints/.tmp-step_00000015/model.safetensors": 10,
    "fsync checkpoints/.tmp-step_00000015": 10,
    "rename checkpoints/.tmp-step_00000015 checkpoints/step_00000015": 10,
    "rename checkpoints/step_00000005 checkpoints/.tmp-pruned-step_00000005": 15,
    "remove checkpoints/.tmp-pruned-step_00000005": 15,
    "write checkpoints/.tmp-step_00000024/trainer.json": 20,
}
"""A call that fails -> the newest checkpoint that is valid then."""


@pytest.mark.faults("full")
def test_failing_disk(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """ENOSPC half way through a write, EIO in another operation, at the start, in a save in the middle and in the last."""
    for i, (name, newest) in enumerate(FAILING.items()):
        with cases(name):
            code = errno.ENOSPC if name.startswith(("write", "make_folder")) else errno.EIO
            out = tmp_path / str(i)
            process = lab.run(out, fault=("fail_at", {"name": name, "before": 0, "code": code}), status=2)
            told(process, "cannot be written", os.strerror(code))
            assert max((step for step, _ in checkpoint.steps(out / "checkpoints")), default=0) == newest
            if newest:
                checkpoint.verify(checkpoint.folder_of(out / "checkpoints", newest))
            lab.resumed_is_same(out)


@pytest.mark.faults("full")
def test_failing_disk_of_one_of_two_ranks(lab: Lab, tmp_path: Path) -> None:
    """The rank that does not commit: both exit 2, one with the reason, and neither waits for the other."""
    out = tmp_path / "run"
    name = "write checkpoints/.tmp-step_00000015/rank_00001.safetensors"
    ranks = lab.ranks(out, fault={1: ("fail_at", {"name": name, "before": 0, "code": errno.ENOSPC})})
    told(ranks[1], "step_00000015: cannot be written", timeout=20)
    told(ranks[0], "another rank", timeout=20)
    assert checkpoints(out) == [5, 10]
    lab.resumed_is_same(out, world=2)


@pytest.mark.faults("folder")
def test_run_folder_removed(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """rm -rf, and mv: the run ends saying so, and does not make the folder anew."""
    for name in ("removed", "moved"):
        with cases(name):
            out = tmp_path / name
            process = lab.start(out, "workers=2", fault=SLOW)
            process.wait_for(lambda out=out: steps_logged(out) >= 6)
            if name == "removed":
                checks.remove(out)
            else:
                out.rename(tmp_path / "elsewhere")
            told(process, "gone|removed|no longer", timeout=20)
            nobody_left(process)
            assert not out.exists(), f"left behind: {sorted(out.rglob('*'))}"
    with cases("moved back"):
        (tmp_path / "elsewhere").rename(tmp_path / "moved")
        lab.resumed_is_same(tmp_path / "moved")


@pytest.mark.faults("folder")
def test_run_folder_without_write_permission(lab: Lab, tmp_path: Path) -> None:
    """In the middle of a run: exit 2; with permission again: the same run."""
    out = tmp_path / "run"
    process = lab.start(out, fault=[SLOW, ("ordinary_user", {})])
    process.wait_for((out / "checkpoints" / "latest").exists)
    folders = [out, *(p for p in out.rglob("*") if p.is_dir() and not p.name.startswith(".tmp"))]
    for folder in folders:
        folder.chmod(0o555)
    try:
        told(process, "cannot be written|may write", "Permission denied")
        assert checkpoints(out)
        log(out)
    finally:
        for folder in [out, *(p for p in out.rglob("*") if p.is_dir())]:
            folder.chmod(0o755)
    lab.resumed_is_same(out)


@pytest.mark.faults("folder")
def test_read_only_file_system(lab: Lab, small_disk: Path) -> None:
    """Remounted read-only between a stop and the resume: exit 2, nothing changed; writable again: the same run."""
    out = small_disk / "run"
    lab.run(out, "stop_at=13", status=75)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    as_root("mount", "-o", "remount,ro", str(small_disk))
    process = lab.run(out, status=2)
    told(process, "cannot be written", "Read-only")
    as_root("mount", "-o", "remount,rw", str(small_disk))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    lab.resumed_is_same(out)


@pytest.mark.faults("twice")
@pytest.mark.parametrize("resume", [True, False])
def test_second_launch_is_refused(lab: Lab, tmp_path: Path, resume: bool) -> None:
    """At once, naming the first, which is not disturbed."""
    out = tmp_path / "run"
    first = lab.start(out, fault=SLOW)
    first.wait_for(lambda: steps_logged(out) >= 3)
    began = time.monotonic()
    second = lab.run(out, resume=resume, status=2, timeout=20)
    assert time.monotonic() - began < 3
    told(second, rf"\b{first.pid}\b", "in use")
    assert first.status is None, "the first had ended: nothing was tested"
    ended(first, 0)
    same(out, lab.undisturbed())


@pytest.mark.faults("twice")
def test_many_launches_at_once(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """Five at the same moment, on a new folder and on one whose run was killed: one trains, the others are refused."""
    out = tmp_path / "run"
    for name in ("a new folder", "after a kill"):
        with cases(name):
            gate = tmp_path / f"{name}.gate"
            faults = [("slow", {"seconds": 0.05}), ("gate", {"path": str(gate)})]
            started = [lab.start(out, fault=faults) for _ in range(5)]
            time.sleep(0.3)
            gate.touch()
            if name == "a new folder":
                running = wait_for_one(started)
                running.wait_for(lambda: steps_logged(out) >= 6)
                running.kill()
                assert running.wait() == -9
                refused = [p for p in started if p is not running]
            else:
                for process in started:
                    process.wait(60)
                refused = [p for p in started if p.status != 0]
                same(out, lab.undisturbed())
            assert len(refused) == 4
            for process in refused:
                told(process, "in use")


def wait_for_one(started: list[checks.Process]) -> checks.Process:
    """The one that still runs when the others have ended."""
    deadline = time.monotonic() + 20
    while True:
        running = [p for p in started if p.status is None]
        assert running and time.monotonic() < deadline, [p.stderr() for p in started]
        if len(running) == 1:
            return running[0]
        time.sleep(0.01)
