"""A job that is started again takes its run from its earlier start, between real processes; that one ends and writes no more."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfsup.checkpoint import steps, verify
from selfsup.errors import UserError
from selfsup.guard.fence import Fence
from selfsup.guard.incarnation import Incarnation
from selfsup.guard.lease import Lease, holder
from tests.methods.tiny import METHOD_OPTIONS, TINY_RUN, write_images

EARLIER = """
import sys, time
from pathlib import Path
from selfsup.guard.fence import Fence
from selfsup.guard.lease import Lease

run, interval, role = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
if role == "rank 0":
    Lease.acquire(run, interval_s=interval, say=print)
else:
    Fence(run, interval).__enter__()
number = 0
while True:  # the worst there is: it never asks whether it may write
    with open(run / f"written by {role}", "a") as file:
        file.write(f"{number}\\n")
    number += 1
    time.sleep(0.002)
"""


def be(monkeypatch: pytest.MonkeyPatch, job: str | None, restart: object = 0) -> None:
    """Let this process belong to a start of a job."""
    for name, value in (("SELFSUP_JOB", job), ("SELFSUP_RESTART", None if job is None else str(restart))):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)


@pytest.fixture
def earlier() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def start(run: Path, role: str = "rank 0", interval: float = 1.0) -> subprocess.Popen[str]:
        """A process that belongs to what the environment says, once it writes."""
        command = [sys.executable, "-c", EARLIER, str(run), str(interval), role]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        wait_for(lambda: (run / f"written by {role}").exists())
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], object], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def acquire(run: Path, said: list[str] | None = None, interval: float = 1.0, **options: object) -> Lease:
    sink = said if said is not None else []
    return Lease.acquire(run, interval_s=interval, patience_s=600, say=sink.append, **options)  # type: ignore[arg-type]


def change(run: Path, **values: object) -> None:
    """Rewrite the lease in place, so that the holder's heartbeat goes on touching it."""
    path = run / "lease.json"
    text = json.dumps({**json.loads(path.read_text()), **values}) + "\n"
    with open(path, "r+") as file:
        file.write(text)
        file.truncate()


def elsewhere(run: Path) -> None:
    """What a host of another boot sees: nobody can tell it whether the process lives."""
    change(run, boot=json.loads((run / "lease.json").read_text())["boot"][::-1])


def contents(run: Path) -> dict[str, object]:
    """Everything in the folder but the heartbeat."""
    return {p.name: p.read_bytes() for p in run.iterdir()}


# ----------------------------------------------------------------------------------------------------- real processes


@pytest.mark.parametrize("where", ["this host", "another host"])
def test_the_later_start_takes_over_and_the_earlier_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: Callable, where: str
) -> None:
    """Of a process that renews its lease and of one of its other ranks, no write is seen after `acquire` returned."""
    be(monkeypatch, "12")
    old = [earlier(tmp_path, "rank 0"), earlier(tmp_path, "rank 1")]
    lease_of_old = json.loads((tmp_path / "lease.json").read_text())
    assert (lease_of_old["job"], lease_of_old["restart"]) == ("12", 0)
    if where == "another host":
        elsewhere(tmp_path)
    else:
        with pytest.raises(UserError, match="in use by process"):
            acquire(tmp_path)
    be(monkeypatch, "12", 1)
    said: list[str] = []
    with acquire(tmp_path, said) as lease:
        before = contents(tmp_path)
        assert [process.poll() for process in old] == [1, 1]
        assert before["written by rank 0"] and before["written by rank 1"]
        lease.check()
        assert json.loads((tmp_path / "lease.json").read_text())["restart"] == 1
        assert said == [
            f"taking over {tmp_path} from process {old[0].pid} on host {socket.gethostname()} since {lease_of_old['since']}, "
            "an earlier start of job 12 (restart 1); waiting 2 s for it to end"
        ]
        time.sleep(0.2)
        assert contents(tmp_path) == before
    for process in old:
        out, err = process.communicate()
        assert (out, err) == (
            "",
            f"selfsup: {tmp_path} was taken over by restart 1 of job 12; this is job 12 (restart 0), and ends\n",
        )


def test_two_intervals_are_waited_for_a_process_that_cannot_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: Callable
) -> None:
    """It is stopped, as when its node hangs: it ends as soon as it goes on, and the lease stays with the later start."""
    be(monkeypatch, "12", 3)
    old = earlier(tmp_path, interval=0.2)
    elsewhere(tmp_path)
    os.kill(old.pid, signal.SIGSTOP)
    be(monkeypatch, "12", 5)
    began = time.monotonic()
    with acquire(tmp_path, interval=0.3) as lease:
        assert time.monotonic() - began >= 0.6
        os.kill(old.pid, signal.SIGCONT)
        assert old.wait(timeout=60) == 1
        lease.check()


def test_a_start_that_is_superseded_while_it_waits_ends_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: Callable
) -> None:
    """Its heartbeat watches already during the wait."""
    be(monkeypatch, "12", 0)
    earlier(tmp_path, interval=1000)  # never looks
    elsewhere(tmp_path)
    be(monkeypatch, "12", 1)
    command = [sys.executable, "-c", EARLIER, str(tmp_path), "0.5", "rank 0"]
    second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: json.loads((tmp_path / "lease.json").read_text())["restart"] == 1)
        be(monkeypatch, "12", 2)
        with acquire(tmp_path, interval=0.5):
            assert second.wait(timeout=60) == 1
        assert "taken over by restart 2 of job 12" in second.communicate()[1]
    finally:
        second.kill()
        second.wait()


def ranks(images: Path, out: Path, restart: int, *more: str) -> list[subprocess.Popen[str]]:
    """Both ranks of a start of job 7."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    recipe = [
        *TINY_RUN,
        *METHOD_OPTIONS["dino"],
        f"data={images}",
        "steps=100000",
        "checkpoint.every=20",
        "log_every=5",
    ]
    started = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        env |= {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "SELFSUP_JOB": "7",
            "SELFSUP_RESTART": str(restart),
        }
        command = [
            sys.executable,
            "-m",
            "selfsup.cli",
            "train",
            str(out.parent / "empty.yaml"),
            *recipe,
            "--out",
            str(out),
        ]
        with open(said_by(out, restart, rank), "w") as file:
            started.append(subprocess.Popen([*command, *more], env=env, stderr=file))
    return started


def said_by(out: Path, restart: int, rank: int) -> Path:
    return out.parent / f"restart {restart} rank {rank}"


def logged(out: Path) -> list[int]:
    path = out / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_a_training_of_two_ranks_goes_on_in_the_later_start(tmp_path: Path) -> None:
    """Both ranks of the earlier one end; log and checkpoints are those of one run."""
    images, out = write_images(tmp_path / "images"), tmp_path / "run"
    (tmp_path / "empty.yaml").write_text("{}\n")
    old = ranks(images, out, 0)
    new: list[subprocess.Popen[str]] = []
    try:
        wait_for(lambda: len(steps(out / "checkpoints")) > 0)
        new = ranks(images, out, 1, "--resume")
        assert [process.wait(timeout=120) for process in old] == [1, 1]
        seen = len(logged(out))
        wait_for(lambda: len(logged(out)) > seen + 40)
        for process in new:
            process.send_signal(signal.SIGUSR1)
        assert [process.wait(timeout=120) for process in new] == [75, 75]
    finally:
        for process in [*old, *new]:
            process.kill()
            process.wait()
    said = said_by(out, 1, 0).read_text()
    assert "an earlier start of job 7 (restart 1)" in said and f"rank 1: {socket.gethostname()} cpu\n" in said
    assert "taken over by restart 1 of job 7" in said_by(out, 0, 0).read_text()
    found = logged(out)
    assert found == sorted(set(found))
    assert len(steps(out / "checkpoints")) >= 2
    for _, folder in steps(out / "checkpoints"):
        assert verify(folder)["world_size"] == 2


# ------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("state", ["lives", "is dead"])
def test_an_earlier_start_never_takes_it_from_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: Callable, state: str
) -> None:
    be(monkeypatch, "12", 2)
    later = earlier(tmp_path)
    if state == "is dead":
        later.kill()
        later.wait()
        assert holder(tmp_path) is None
    for restart in (1, 0):
        be(monkeypatch, "12", restart)
        with pytest.raises(UserError, match=r"a later start of job 12 \(restart 2\) has it: process") as refused:
            acquire(tmp_path)
        assert len(str(refused.value).splitlines()) == 2
    assert json.loads((tmp_path / "lease.json").read_text())["pid"] == later.pid
    assert (later.poll() is None) == (state == "lives")


@pytest.mark.parametrize(
    ("job", "restart"), [("12", 1), ("13", 2), ("1", 5), (None, None), ("12", "2x")], ids=lambda value: str(value)
)
def test_everybody_else_waits_for_a_live_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: Callable, job: str | None, restart: object
) -> None:
    """The same start, other jobs, and processes of none; they take over when it has died, without a wait."""
    be(monkeypatch, "12", 1)
    first = earlier(tmp_path, interval=0.05)
    be(monkeypatch, job, restart)
    with pytest.raises(UserError, match="in use by process"):
        acquire(tmp_path)
    elsewhere(tmp_path)
    with pytest.raises(UserError, match="heartbeat goes on"):
        acquire(tmp_path)
    assert first.poll() is None
    change(tmp_path, boot=json.loads((tmp_path / "lease.json").read_text())["boot"][::-1])
    first.kill()
    first.wait()
    said: list[str] = []
    with acquire(tmp_path, said) as lease:
        lease.check()
    assert len(said) == 1 and said[0].endswith("which is gone")


def test_a_later_start_does_not_wait_for_the_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: Callable
) -> None:
    be(monkeypatch, "12", 1)
    first = earlier(tmp_path)
    first.kill()
    first.wait()
    be(monkeypatch, "12", 2)
    said: list[str] = []
    with acquire(tmp_path, said, interval=1000) as lease:  # two of these would not end
        lease.check()
    assert said[0].endswith("which is gone")


def test_only_a_later_start_of_the_same_job_ends_a_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other losses stay found by `check`."""
    be(monkeypatch, "12", 1)
    lost: list[str] = []
    with acquire(tmp_path, interval=0.02, on_superseded=lost.append) as lease, Fence(tmp_path, 0.02, lost.append):
        own = json.loads((tmp_path / "lease.json").read_text())

        def replaced(**values: object) -> list[str]:
            """What was found in ten looks at a lease with other values, put in place of ours."""
            (tmp_path / "new").write_text(json.dumps({**own, "token": "other", **values}))
            os.replace(tmp_path / "new", tmp_path / "lease.json")
            time.sleep(0.2)
            with pytest.raises(UserError, match="taken over"):
                lease.check()
            return lost

        assert replaced(job="13", restart=7) == []
        assert replaced(restart=1) == [] and replaced(restart=0) == []
        assert replaced(restart=None) == [] and replaced(job=None) == [] and replaced(restart=True) == []
        (tmp_path / "lease.json").unlink()
        time.sleep(0.2)
        assert lost == [] and not list(tmp_path.glob("*.json"))
        (tmp_path / "lease.json").mkdir()
        time.sleep(0.2)
        (tmp_path / "lease.json").rmdir()
        (tmp_path / "lease.json").write_text(json.dumps({**own, "token": "other", "restart": 2}))
        wait_for(lambda: len(lost) == 2)  # once by each
        with pytest.raises(UserError, match="taken over"):
            lease.check()
        assert lost[2:] == lost[:1]
        assert {text.split(" was ")[0] for text in lost} == {f"selfsup: {tmp_path}"}
        time.sleep(0.2)
        assert len(lost) == 3


def test_processes_of_no_job_watch_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    be(monkeypatch, None)
    with Fence(tmp_path, 0.01):
        assert not [t for t in threading.enumerate() if t.name == "fence"]
    be(monkeypatch, "12")
    with Fence(tmp_path, 0.01):
        assert [t for t in threading.enumerate() if t.name == "fence"]
    assert not [t for t in threading.enumerate() if t.name == "fence"]


@pytest.mark.parametrize(
    ("job", "restart", "expected"),
    [
        ("12", "0", Incarnation("12", 0)),
        ("12_3", "41", Incarnation("12_3", 41)),
        ("local-0a1b2c3d", "1", Incarnation("local-0a1b2c3d", 1)),
        (None, "0", None),
        ("12", None, None),
        ("", "0", None),
        ("12", "", None),
        ("12", "-1", None),
        ("12", "1.0", None),
        ("12", "²", None),
        ("12", "9" * 5000, None),
        ("a\nb", "0", None),
        ("x" * 256, "0", None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_incarnation_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, job: str | None, restart: str | None, expected: Incarnation | None
) -> None:
    for name, value in (("SELFSUP_JOB", job), ("SELFSUP_RESTART", restart)):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    assert Incarnation.of_environment() == expected
