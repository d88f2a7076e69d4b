"""The fixture `slurm`: a real cluster for the tests of a session, given to one test at a time, and empty at its start."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.slurm.cluster import Slurm, base_folder, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use the fixture have the marker, and come first.

    They take turns, so two workers of pytest-xdist with such tests would wait for one another. As --dist=worksteal hands out
    tests, the first worker gets all of them, and the others take from the end of its list.
    """
    for item in items:
        if "slurm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


def _take_folder() -> tuple[Path, IO[str]]:
    """A folder that no live process has, and its lock. Clusters of those that were killed are stopped first."""
    base = base_folder()
    taken: tuple[Path, IO[str]] | None = None
    for number in range(64):
        folder = base / f"test{number}"
        if taken and not folder.exists():
            return taken
        lock = open(base / f"test{number}.lock", "w")  # noqa: SIM115 (kept: closing it gives the lock away)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        if folder.exists():
            Slurm(folder).stop()
        if taken:
            lock.close()
        else:
            taken = folder, lock
    assert taken, f"{base}: no free folder"
    return taken


@pytest.fixture(scope="session")
def _slurm_of_process() -> Iterator[Slurm]:
    if reason := missing():
        pytest.skip(f"no Slurm: {reason}")
    folder, lock = _take_folder()
    with lock, Slurm(folder) as started:
        yield started


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Among the workers of pytest-xdist: jobs of two tests on the same cores would only wait for each other."""
    with open(folder / "slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def slurm(_slurm_of_process: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster without jobs, its two nodes idle (see tests.slurm.cluster). What a test leaves behind is killed."""
    common = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        common = common.parent
    with _one_at_a_time(common):
        try:
            yield _slurm_of_process
        finally:
            _slurm_of_process.reset()
