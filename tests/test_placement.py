"""Where ranks compute: two on one GPU are refused on all of them, and each is listed."""

import re
import socket
from pathlib import Path

import pytest
import torch

from selfsup import placement
from selfsup.errors import UserError
from selfsup.placement import Place
from selfsup.runtime import device_index, share_of_cpus
from tests.test_dist import start


def gpu(host: str, index: int, uuid: str) -> Place:
    return Place(host, f"cuda:{index} NVIDIA H200", uuid)


@pytest.mark.parametrize(
    "places",
    [
        [Place("n1", "cpu"), Place("n1", "cpu"), Place("n2", "cpu")],
        [gpu("n1", 0, "GPU-a"), gpu("n1", 1, "GPU-b"), gpu("n2", 0, "GPU-c"), gpu("n2", 1, "GPU-d")],
        [gpu("n1", 0, "GPU-a"), gpu("n1", 0, "GPU-b")],  # each task was bound to its own, and sees it as its first
        [gpu("n1", 0, ""), gpu("n1", 0, "")],  # a driver that tells no uuid: nothing is known
    ],
    ids=["CPU", "one node's indices", "bound", "no uuid"],
)
def test_devices_that_differ(places: list[Place]) -> None:
    placement.check(places)


@pytest.mark.parametrize(
    ("places", "pair"),
    [
        ([gpu("n1", 0, "GPU-a"), gpu("n1", 0, "GPU-a")], (0, 1)),
        ([gpu("n1", 0, "GPU-a"), gpu("n2", 0, "GPU-c"), gpu("n2", 1, "GPU-d"), gpu("n2", 0, "GPU-c")], (1, 3)),
        ([gpu("n1", 0, "GPU-a"), Place("n1", "cpu"), gpu("n1", 3, "GPU-a")], (0, 2)),
    ],
)
def test_two_ranks_on_one_device(places: list[Place], pair: tuple[int, int]) -> None:
    with pytest.raises(UserError) as refused:
        placement.check(places)
    text, second = str(refused.value), places[pair[1]]
    assert f"ranks {pair[0]} and {pair[1]} both compute on {second.host} {second.device} ({second.uuid})" in text
    assert "tasks_per_node" in text and "binding" in text and len(text.splitlines()) == 2


def test_lines() -> None:
    places = [gpu("n1", 0, "GPU-abc"), Place("n2", "cpu")]
    assert placement.lines(places) == ["rank 0: n1 cuda:0 NVIDIA H200 (GPU-abc)", "rank 1: n2 cpu"]
    many = placement.lines([Place(f"n{i}", "cpu") for i in range(300)])
    assert many[63:] == ["rank 63: n63 cpu", "and 236 more ranks"]
    assert len(placement.lines([Place("n1", "cpu")] * 64)) == 64


def test_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert Place.current(torch.device("cpu")) == Place("n7", "cpu")
    monkeypatch.delenv("SLURMD_NODENAME")
    assert Place.current(torch.device("cpu")).host == socket.gethostname()
    assert placement.survey(torch.device("cpu")) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_this_gpu() -> None:
    place = Place.current(torch.device("cuda", 0))
    assert place.device == f"cuda:0 {torch.cuda.get_device_name(0)}"
    assert re.fullmatch(r"GPU-[0-9a-f-]{36}", place.uuid)


SURVEY = """
from selfsup import placement
os.environ["SLURMD_NODENAME"] = "n" * (rank + 1)
found = placement.survey(torch.device("cpu"))
texts = dist.gather_texts("é" * (3 * rank)), dist.gather_texts("")

# as if each rank had a GPU, and all the same
placement.Place.current = classmethod(lambda cls, device: cls("n1", "cuda:0 A", "GPU-x"))
try:
    placement.survey(torch.device("cpu"))
    refused = ""
except UserError as error:
    refused = str(error)
report(found=found, texts=texts, refused=refused, agreed=dist.agree(rank))
"""


def test_two_processes(tmp_path: Path) -> None:
    found = start(SURVEY, tmp_path, 2)
    assert found[0] == found[1]
    assert found[0]["found"] == ["rank 0: n cpu", "rank 1: nn cpu"]
    assert found[0]["texts"] == [["", "ééé"], ["", ""]]
    assert found[0]["refused"].startswith("ranks 0 and 1 both compute on n1 cuda:0 A (GPU-x)")
    assert found[0]["agreed"] == 1


# --------------------------------------------------------------------------------------------- the device and its CPUs


@pytest.mark.parametrize(
    ("local", "local_world", "visible", "expected"),
    [
        (0, 1, 1, 0),
        (0, 1, 8, 0),
        (3, 4, 4, 3),
        (1, 2, 8, 1),
        (0, 4, 1, 0),
        (3, 4, 1, 0),
        (2, 4, 2, None),
        (0, 1, 0, None),
    ],
)
def test_device_index(local: int, local_world: int, visible: int, expected: int | None) -> None:
    """One visible device for several ranks is that which Slurm bound to this one."""
    if expected is not None:
        assert device_index(local, local_world, visible) == expected
        return
    with pytest.raises(UserError, match=f"local rank {local} has no GPU: torch sees {visible}"):
        device_index(local, local_world, visible)


@pytest.mark.parametrize(
    ("cpus", "world", "local_world", "of_task", "tasks", "expected"),
    [
        (16, 1, 1, None, None, 16),
        (16, 4, 4, None, None, 4),
        (2, 4, 4, None, None, 1),
        (16, 4, 4, None, "4", 4),
        (64, 8, 4, "8", "8", 8),  # all the node's CPUs: a share, but no more than the task's
        (64, 8, 4, "32", "8", 16),
        (8, 8, 4, "8", "8", 8),  # confined to the task's own
        (8, 4, 4, "8", "1", 2),  # torchrun in one task: its ranks share the task's
        (2, 4, 4, "4", "4", 2),
        (1, 1, 1, "8", "1", 1),
        (16, 1, 1, "3", "1", 3),
        (16, 2, 2, "0", "2", 8),
        (16, 2, 2, "many", "2", 8),
    ],
)
def test_share_of_cpus(
    cpus: int, world: int, local_world: int, of_task: str | None, tasks: str | None, expected: int
) -> None:
    given = {"SLURM_CPUS_PER_TASK": of_task, "SLURM_NTASKS": tasks}
    assert share_of_cpus(cpus, world, local_world, {k: v for k, v in given.items() if v is not None}) == expected
