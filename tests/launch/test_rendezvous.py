"""Ranks that find each other, in processes of their own: whatever else listens, whoever does not come."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfsup.errors import UserError
from selfsup.launch import rendezvous
from selfsup.launch.environment import Place
from selfsup.launch.rendezvous import candidates

RANK = """
import dataclasses, json, signal, sys
from selfsup.errors import EarlyStop, RankLost, UserError
from selfsup.launch import rendezvous
from selfsup.launch.environment import Place
given = json.loads(sys.argv[1])
place = Place(**{**given["place"], "hosts": tuple(given["place"]["hosts"])})
for name, value in given["constants"].items():
    assert hasattr(rendezvous, name)
    setattr(rendezvous, name, value)
told = []
signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
try:
    store, port = rendezvous.meet(place, stopped=lambda: bool(told), **given["options"])
    import torch, torch.distributed as td
    td.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world)
    total = torch.tensor([place.rank + 1])
    td.all_reduce(total)
    print(int(total), port, flush=True)
    td.barrier()
except (EarlyStop, RankLost, UserError) as error:
    print(type(error).__name__, error, flush=True)
"""


class Ranks:
    """Starts ranks and hears what they say in the end."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[str]] = []

    def start(
        self, rank: int, world: int, *, key: str = "12.0", hosts: Any = None, constants: Any = None, **options: Any
    ) -> Any:
        job, _, restart = key.rpartition(".")
        hosts = hosts or ["127.0.0.1"] * world
        place = Place(job, int(restart), rank, world, rank, world, 0, f"node{rank}", hosts)
        given = {"place": vars(place), "options": {"timeout_s": 60.0, **options}, "constants": constants or {}}
        command = [sys.executable, "-c", RANK, json.dumps(given)]
        self.processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return self.processes[-1]

    def said(self) -> list[str]:
        """Of each rank the line it ended with."""
        out = [process.communicate(timeout=150) for process in self.processes]
        return [said.strip() or err for said, err in out]


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """None outlives its test."""
    started = Ranks()
    yield started
    for process in started.processes:
        process.kill()
        process.communicate()


@pytest.fixture
def key(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A job that no other test, nor another session, has: its ports are its own."""
    return f"{tmp_path}.0"


@contextlib.contextmanager
def listening(port: int, say: bytes | None = None) -> Iterator[None]:
    """A program that has nothing to do with us: silent, or saying this to all who connect."""
    with socket.create_server(("127.0.0.1", port)) as server:
        kept: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])
                    if say is not None:
                        kept[-1].sendall(say)

        threading.Thread(target=serve, daemon=True).start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        for each in kept:
            each.close()


def test_candidates():
    """A pure function of the key; within the range, and all of it if it is small."""
    assert candidates("12.0") == candidates("12.0") != candidates("12.1")
    found = candidates("12.0")
    assert len(set(found)) == 16 and all(20_000 <= port < 32_000 for port in found)
    assert sorted(candidates("x", "29500-29503")) == [29500, 29501, 29502, 29503]
    assert all(29500 <= port <= 29600 for port in candidates("12.0", "29500-29600"))


def test_they_meet(ranks: Ranks, key: str):
    for rank in range(3):
        ranks.start(rank, 3, key=key)
    port = candidates(key)[1]
    assert ranks.said() == [f"6 {port}"] * 3


def test_among_other_programs(ranks: Ranks, key: str):
    """One is silent, one talks, one is the store of another job, one the door of another job: rank 0 comes last."""
    from torch.distributed import TCPStore

    ports = candidates(key)
    other = TCPStore("127.0.0.1", ports[2], is_master=True, wait_for_workers=False)
    with listening(ports[0]), listening(ports[1], b"SSH-2.0-x\r\n" * 99), listening(ports[3], b"selfsup 12.0 4242\n"):
        ranks.start(1, 2, key=key)
        time.sleep(3)
        ranks.start(0, 2, key=key)
        assert ranks.said() == [f"3 {ports[5]}"] * 2
    del other


def test_two_jobs_in_one_small_range(ranks: Ranks, key: str):
    """Each rank finds its own rank 0."""
    low = candidates(key)[0]
    small = f"{low}-{low + 7}"
    for job in (key, f"{key}1.0"):
        for rank in (1, 0):
            ranks.start(rank, 2, key=job, ports=small)
    said = ranks.said()
    assert said[0] == said[1] != said[2] == said[3] and all(line.startswith("3 ") for line in said)


def test_an_earlier_start_of_the_job_is_another(ranks: Ranks, key: str):
    """A lost node's rank 0 still waits there; the next start does not meet it."""
    old = ranks.start(0, 2, key=key)
    for rank in (1, 0):
        ranks.start(rank, 2, key=key[:-1] + "1")
    assert [process.communicate(timeout=150)[0][:2] for process in ranks.processes[1:]] == ["3 ", "3 "]
    assert old.poll() is None


def test_the_same_start_again(ranks: Ranks, key: str):
    """Rank 0 was killed and everything is begun anew under the same key."""
    first = ranks.start(0, 2, key=key)
    time.sleep(2)
    first.kill()
    first.wait()
    for rank in range(2):
        ranks.start(rank, 2, key=key)
    assert [line[:2] for line in ranks.said()[1:]] == ["3 ", "3 "]


def test_a_rank_that_never_comes_is_named(ranks: Ranks, key: str):
    """With its host; by the others too, who need not wait for longer."""
    hosts = ["127.0.0.1", "127.0.0.1", "n7", "n7"]
    for rank in (0, 1, 3):
        ranks.start(
            rank, 4, key=key, hosts=hosts if rank < 3 else ["127.0.0.1"] * 4, timeout_s=25 if rank == 0 else 120
        )
    for line in ranks.said():
        assert line.startswith("RankLost") and "after 25 s rank 2 (n7) did not come to rank 0 on node0" in line


def test_waiting_is_said(ranks: Ranks, key: str):
    rank = ranks.start(0, 3, key=key, timeout_s=4, hosts=["127.0.0.1", "a", "b"], constants={"_TELL_S": 1.0})
    _, err = rank.communicate(timeout=60)
    assert "s for rank 1 (a), rank 2 (b)" in err


def test_rank_0_that_never_comes_is_named(ranks: Ranks, key: str):
    with listening(candidates(key)[0]):
        ranks.start(1, 2, key=key, timeout_s=20)
        (line,) = ranks.said()
    assert line.startswith("RankLost") and "rank 0 on 127.0.0.1 was not reached on ports" in line
    assert str(candidates(key)[3]) in line and "another program listens" in line and "refused" in line


def test_ports_that_do_not_answer(ranks: Ranks, key: str):
    """As behind a firewall: this one's queue is full, so that the kernel drops who else comes."""
    port = candidates(key)[0]
    with socket.create_server(("127.0.0.1", port), backlog=0), socket.create_connection(("127.0.0.1", port)):
        ranks.start(1, 2, key=key, timeout_s=2, ports=f"{port}-{port}")
        (line,) = ranks.said()
    assert f"rank 0 on 127.0.0.1 was not reached on ports {port} (no answer" in line


def test_a_host_without_an_address(ranks: Ranks, key: str):
    ranks.start(1, 2, key=key, timeout_s=2, hosts=["nowhere.invalid"] * 2)
    (line,) = ranks.said()
    assert "rank 0 on nowhere.invalid was not reached" in line and "ame" in line, line


def heard(process: Any, words: str) -> None:
    """Until it has said this."""
    for line in process.stderr:
        if words in line:
            return
    raise AssertionError(f"it never said {words!r}")


def test_rank_0_that_dies_meanwhile(ranks: Ranks, key: str):
    first = ranks.start(0, 3, key=key)
    second = ranks.start(1, 3, key=key, constants={"_TELL_S": 0.5})
    heard(second, "which waits for others")
    first.kill()
    said = second.stdout.read()
    assert said.startswith("RankLost") and "rank 0 on 127.0.0.1 has gone" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_the_wait(ranks: Ranks, key: str, rank: int):
    process = ranks.start(rank, 2, key=key, timeout_s=300, constants={"_TELL_S": 0.5})
    heard(process, "has waited")
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
    assert said.startswith("EarlyStop stopped before the first step") and f"rank {1 - rank}" in said


def test_no_free_port(key: str):
    port = candidates(key)[0]
    place = Place(key[:-2], 0, 0, 2, 0, 2, 0, "n1", ("127.0.0.1",) * 2)
    with listening(port), pytest.raises(UserError, match=rf"ports: of {port} no two are free on n1"):
        rendezvous.meet(place, ports=f"{port}-{port}")
    with pytest.raises(UserError, match="no two are free"):
        rendezvous.meet(replace(place, hosts=("n1", "n2")), ports=f"{port}-{port}")
