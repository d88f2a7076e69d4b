"""The watchdog, over real processes: stopped, hanging with and without the interpreter, killed, failed, and well."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from selfsup.errors import UserError
from selfsup.guard import hang_report, ranks
from selfsup.guard.processes import Process
from selfsup.guard.ranks import SIZE, Beat, Peer

PRELUDE = """
import ctypes, os, shutil, sys, threading, time
from pathlib import Path
from selfsup.guard import watchdog
from selfsup.errors import EarlyStop, RankLost, UserError
from selfsup.guard.watchdog import Watchdog

folder, rank, world, timeout, interval = Path(sys.argv[1]), *map(int, sys.argv[2:4]), *map(float, sys.argv[4:])
on_abort = lambda: print("aborting", flush=True)

def meet(step):  # waits for every rank, as a collective does
    (folder / f"meet.{rank}.{step}").touch()
    while not all((folder / f"meet.{r}.{step}").exists() for r in range(world)):
        time.sleep(0.005)

def train(steps, work=lambda step: time.sleep(0.01)):
    for step in range(steps):
        watch.at("forward", step)
        work(step)
        watch.at("gradients", step)
        meet(step)

def until(name):
    while not (folder / name).exists():
        time.sleep(0.01)

code = 0
try:
    with Watchdog(folder / "ranks", timeout, rank=rank, world=world, interval_s=interval or None,
                  on_abort=lambda: on_abort()) as watch:
        BODY
except UserError as error:
    print("user error:", error)
    code = 2
except RankLost as error:
    print("lost:", error)
    code = 1
sys.exit(code)
"""


class Ranks:
    """Processes that watch one another."""

    def __init__(
        self, folder: Path, world: int, body: str, timeout_s: float, interval_s: float, start: list[int]
    ) -> None:
        self.folder, self.ranks = folder, folder / "ranks"
        code = PRELUDE.replace("BODY", textwrap.indent(textwrap.dedent(body).strip(), " " * 8).strip())
        self.processes = {}
        for rank in start or range(world):
            arguments = [str(folder), str(rank), str(world), str(timeout_s), str(interval_s)]
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )

    def says(self, rank: int) -> dict:
        try:
            return json.loads(ranks.file_of(self.ranks, rank).read_text())
        except (OSError, ValueError):
            return {}

    def wait_for(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + 40
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: all(self.says(rank).get("step", -1) >= step for rank in self.processes))

    def send(self, rank: int, number: signal.Signals) -> int:
        pid = self.processes[rank].pid
        os.kill(pid, number)
        return pid

    def end(self, rank: int) -> tuple[int, str, str]:
        """(exit code, what it printed, what it complained of)."""
        out, err = self.processes[rank].communicate(timeout=60)
        return self.processes[rank].returncode, out, err


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def start(
        world: int, body: str, timeout_s: float = 1.5, interval_s: float = 0, only: list[int] | None = None
    ) -> Ranks:
        started.append(Ranks(tmp_path, world, body, timeout_s, interval_s, only or []))
        return started[-1]

    yield start
    for one in started:
        for process in one.processes.values():
            process.kill()
            process.communicate()


# ------------------------------------------------------------------------------------------------------------- all well


def test_nothing_to_report(tmp_path: Path, launch: Callable) -> None:
    """Longer than the timeout, and each step shorter: not a word, and no file that says it runs."""
    (tmp_path / "ranks").mkdir()
    for name in ("rank_00007.json", "rank_00007.stack.txt"):
        (tmp_path / "ranks" / name).write_text('{"state": "running"}')
    run = launch(2, "train(25, lambda step: time.sleep(0.1))", timeout_s=2)
    for rank in (0, 1):
        assert run.end(rank) == (0, "", "")
        said = run.says(rank)
        assert (said["state"], said["step"], said["phase"]) == ("done", 24, "gradients")
        assert said["pid"] == run.processes[rank].pid and said["beat"] > 5
    assert sorted(p.name for p in run.ranks.iterdir()) == ["rank_00000.json", "rank_00001.json"]


def test_long_work_of_one_rank_is_no_hang(launch: Callable) -> None:
    """Rank 0 evaluates for three times the timeout, and says so; the others wait for it."""
    body = """
    from selfsup.guard import watchdog
    def work(step):
        end = time.monotonic() + (4.5 if rank == 0 and step == 3 else 0)
        while time.monotonic() < end:
            watchdog.alive()
            time.sleep(0.05)
    train(8, work)
    """
    run = launch(2, body)
    for rank in range(2):
        code, _, err = run.end(rank)
        assert code == 0 and "no progress" not in err
        assert run.says(rank)["state"] == "done"


def test_early_stop_is_no_failure_and_forks_are_left_alone(launch: Callable) -> None:
    body = """
    if os.fork() == 0:
        raise SystemExit(3)  # a forked child leaves the block: this is not its watch
    assert os.wait()[1] >> 8 == 3
    assert (folder / "ranks/rank_00000.stack.txt").exists()
    assert '"running"' in (folder / "ranks/rank_00000.json").read_text()
    train(3)
    raise EarlyStop("enough")
    """
    run = launch(1, body)
    assert "EarlyStop: enough" in run.end(0)[2]
    assert run.says(0)["state"] == "done" and run.says(0)["beat"] > 0
    assert not ranks.stack_of(run.ranks, 0).exists()


def test_a_pause_of_all_is_no_hang(launch: Callable) -> None:
    """Ctrl-Z, a suspended job: for longer than the timeout, and it goes on."""
    run = launch(2, "train(4); until('go')", timeout_s=2)
    run.wait_for_step(3)
    for rank in (0, 1):
        run.send(rank, signal.SIGSTOP)
    beats = [run.says(rank)["beat"] for rank in (0, 1)]
    time.sleep(2.5)
    for rank in (0, 1):
        run.send(rank, signal.SIGCONT)
    run.wait_for(lambda: all(run.says(rank)["beat"] > beats[rank] + 1 for rank in (0, 1)))
    (run.folder / "go").touch()
    for rank in (0, 1):
        code, _, err = run.end(rank)
        assert code == 0 and "no progress" not in err and run.says(rank)["state"] == "done", err


def test_disk_that_fails_neither_ends_the_run_nor_the_thread(launch: Callable) -> None:
    body = """
    train(2)
    shutil.rmtree(folder / "ranks")
    (folder / "ranks").touch()
    train(30, lambda step: time.sleep(0.05))
    (folder / "ranks").unlink()
    (folder / "ranks").mkdir()
    until("ranks/rank_00000.json")
    """
    run = launch(1, body)
    code, _, err = run.end(0)
    assert code == 0 and err.count("heartbeat: Not a directory") == 1 and len(err.splitlines()) == 1, err
    assert run.says(0)["state"] == "done"


def test_faulthandler_and_alarm_are_given_back(launch: Callable) -> None:
    body = """
    import faulthandler, signal
    train(2)
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 14
    watch.__exit__(None, None, None)
    assert not faulthandler.is_enabled() and not faulthandler.unregister(signal.SIGALRM)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    with Watchdog(folder / "ranks", timeout, rank=0, world=1, interval_s=interval):
        signal.signal(signal.SIGALRM, lambda *_: print("theirs", flush=True))
        began = time.monotonic()
        signal.alarm(1)
        signal.pause()  # twenty heartbeats pass, and leave it alone
        assert time.monotonic() - began < 10
    """
    code, out, err = launch(1, body, timeout_s=20, interval_s=0.05).end(0)
    assert (code, out, err) == (0, "theirs\n", "")


# ---------------------------------------------------------------------------------------------------------------- hangs


def test_one_of_two_stopped(launch: Callable) -> None:
    run = launch(2, "train(10000)")
    run.wait_for_step(3)
    pid = run.send(1, signal.SIGSTOP)
    began = time.monotonic()
    code, out, err = run.end(0)
    assert code == 1 and out == "aborting\n" and time.monotonic() - began < 20
    host = Process.current().host
    step = run.says(1)["step"]
    row = rf"  rank 1: host {host}, pid {pid}, stopped, in '(forward|gradients)' of step {step}, last heartbeat [1-9]"
    assert re.search(row, err) and "suspect: rank 1, silent for" in err and "(stopped)" in err
    assert re.search(rf"  rank 0: host {host}, pid {run.processes[0].pid}, \w+, in 'gradients' of", err)
    assert "no stack" in err and "hang_timeout=1.5" in err and "--resume" in err
    assert run.says(0)["state"] == "failed" and "rank 1 silent" in run.says(0)["message"]
    assert "meet" in ranks.stack_of(run.ranks, 0).read_text()
    run.send(1, signal.SIGCONT)  # and when it goes on, it learns what happened
    code, _, err = run.end(1)
    assert code == 1 and "rank 0 reports a hang: rank 1" in err and run.says(1)["state"] == "failed"


def test_a_live_hang_shows_its_stack_once(launch: Callable) -> None:
    body = """
    def hang_here(step):
        if rank == 1 and step == 3:
            time.sleep(1000)
    train(10000, hang_here)
    """
    run = launch(3, body)
    ends = [run.end(rank) for rank in range(3)]
    assert [code for code, _, _ in ends] == [1, 1, 1]
    reports = [err for _, _, err in ends if "no progress for" in err]
    assert len(reports) == 1 and reports[0] == ends[0][2]
    assert "suspect: rank 1, does not come out of 'forward'" in reports[0] and "suspect: rank 2" not in reports[0]
    stack = reports[0].split("rank 1 stands at:")[1]
    assert "in hang_here" in stack and "in train" in stack and "watchdog.py" not in stack
    for rank in (1, 2):
        assert "selfsup: rank 0 reports a hang: rank 1 does not come out of 'forward'" in ends[rank][2]
        assert run.says(rank)["state"] == "failed"


def test_the_lowest_rank_stopped_another_reports(launch: Callable) -> None:
    run = launch(3, "train(10000)")
    run.wait_for_step(3)
    run.send(0, signal.SIGSTOP)
    ends = [run.end(rank) for rank in (1, 2)]
    assert [code for code, _, _ in ends] == [1, 1]
    assert "suspect: rank 0, silent for" in ends[0][2] and "no progress" not in ends[1][2]
    assert "rank 1 reports a hang: rank 0" in ends[1][2]


GIL = """
def hang_with_the_interpreter(step):
    if rank == world - 1 and step == 3:
        ctypes.PyDLL(None).sem_wait(ctypes.create_string_buffer(64))
train(10000, hang_with_the_interpreter)
"""


def test_a_hang_that_holds_the_interpreter(launch: Callable) -> None:
    run = launch(2, GIL)
    code, _, err = run.end(0)
    assert code == 1 and "suspect: rank 1, silent for" in err and "something holds its interpreter" in err, err
    assert "in hang_with_the_interpreter" in err.split("rank 1 stands at:")[1]


def test_alone_with_a_hang_that_holds_the_interpreter(launch: Callable) -> None:
    """Nobody is left to report: faulthandler writes the stack to stderr."""
    run = launch(1, GIL)
    assert run.processes[0].stderr is not None
    for line in run.processes[0].stderr:
        if "in hang_with_the_interpreter" in line:
            break
    else:
        raise AssertionError("ended without a stack")


def test_alone_and_nothing_blocks_the_end(launch: Callable) -> None:
    """A hang alone ends with 1, even if nobody reads stderr, and on_abort hangs as well."""
    body = """
    watchdog._LAST_WORDS_S = 0.5
    on_abort = lambda: time.sleep(1000)
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, b"x" * 1000)
    except BlockingIOError:
        os.set_blocking(2, True)
    time.sleep(1000)
    """
    run = launch(1, body)
    assert run.processes[0].wait(timeout=40) == 1


def test_files_of_an_earlier_start_accuse_nobody(launch: Callable) -> None:
    """Rank 1 never starts; what the rank 1 of another day left says that it failed, or runs."""
    run = launch(2, "pass", only=[1])
    assert run.end(1)[0] == 0
    old = Beat.decode(ranks.file_of(run.ranks, 1).read_bytes())
    assert old is not None
    for state in ("failed", "running"):
        file = ranks.file_of(run.ranks, 1)
        file.write_bytes(replace(old, state=state, message="of another day", user_error=True).encode())
        os.utime(file, (time.time() - 60, time.time() - 60))
        code, _, err = launch(2, "time.sleep(1000)", timeout_s=1, only=[0]).end(0)
        assert code == 1 and "rank 1: not heard of since this start" in err and "another day" not in err, err
        assert "suspect: rank 1, not heard of" in err


# --------------------------------------------------------------------------------------------------------- other's ends


def test_one_of_two_killed_and_no_collective_notices(launch: Callable) -> None:
    run = launch(2, "train(10000)", timeout_s=600, interval_s=0.1)
    run.wait_for_step(3)
    pid = run.send(1, signal.SIGKILL)
    code, out, err = run.end(0)
    step = run.says(1)["step"]
    assert code == 1 and out == "aborting\n"
    assert re.match(
        rf"selfsup: rank 1 \(host .*, pid {pid}\) is gone: last seen in phase '\w+' of step {step}, \d+ s ago; go on with",
        err,
    )


FAILS = """
if rank == 1:
    train(3)
    raise UserError("data.path: gone")
train(10000)
"""


def test_anothers_user_error_is_ours(launch: Callable) -> None:
    run = launch(2, FAILS, timeout_s=600, interval_s=0.1)
    assert run.end(1)[:2] == (2, "user error: data.path: gone\n")
    assert run.says(1)["user_error"] is True
    code, _, err = run.end(0)
    expected = f"rank 1 (host {Process.current().host}, pid {run.processes[1].pid}) ended: data.path: gone"
    assert (code, err) == (2, f"selfsup: {expected}\n")
    assert run.says(0)["message"] == expected and run.says(0)["user_error"] is True


EXPLAIN = """
def broken(error):
    watch.explain(error)
    raise error

if rank == 1:
    ENDS
train(4)
until("broken")
try:
    raise RuntimeError("connection closed by peer")
except RuntimeError as error:
    watch.explain(error)
    raise
"""


@pytest.mark.parametrize(
    ("ends", "code", "expected"),
    [
        ("train(4); os.kill(os.getpid(), 9)", 1, r"lost: rank 1 \(host .*, pid \d+\) is gone: last seen in phase"),
        ("train(4); raise UserError('lower it')", 2, r"user error: rank 1 \(host .*, pid \d+\) ended: lower it"),
        ("train(4); raise KeyError('x')", 1, r"lost: rank 1 \(host .*, pid \d+\) ended: KeyError: 'x'"),
        (
            "train(4); broken(RuntimeError('shapes'))",
            1,
            r"lost: rank 1 \(host .*, pid \d+\) ended: RuntimeError: shapes",
        ),
        ("train(4); time.sleep(1000)", 1, ""),
    ],
    ids=["killed", "user error", "bug", "bug that looks like a collective's", "neither"],
)
def test_a_collectives_error_is_explained(launch: Callable, ends: str, code: int, expected: str) -> None:
    run = launch(2, EXPLAIN.replace("ENDS", ends), timeout_s=600)
    if "sleep" not in ends:
        run.processes[1].wait(timeout=60)
    (run.folder / "broken").touch()
    began = time.monotonic()
    found, out, err = run.end(0)
    assert found == code and re.match(expected, out) and time.monotonic() - began < 20
    if not expected:
        assert out == "" and "connection closed by peer" in err  # the original error, with its traceback
        assert run.says(0)["error"] == "unexplained"
    else:
        assert err == ""


def test_two_explanations(tmp_path: Path) -> None:
    """What says most comes first; a failure that its rank could not explain says least."""
    here = Process.current()
    gone = replace(here, started=(here.started or 0) - 1)
    since = time.time_ns()

    def verdict(*beats: Beat, silent_s: float | None = None) -> str:
        for beat in beats:
            beat.write(tmp_path, first=True)
        peers = ranks.Peers.of(tmp_path, range(1, 4), 0, since - 10**9)
        peers.look((time.time_ns(), time.monotonic()))
        found = peers.ended(silent_s)
        return "" if found is None else f"{type(found[1]).__name__} {found[0].rank}"

    well, lost = Beat(1, here), Beat(2, gone)
    assert verdict(well, Beat(2, here, state="done"), Beat(3, gone, state="done")) == ""
    unexplained = ranks.failure(Beat(3, gone), RuntimeError("closed"), explained=False)
    assert verdict(unexplained) == "RankLost 3" and verdict(silent_s=60) == ""
    assert verdict(ranks.failure(well, KeyError(1)), Beat(2, here)) == "RankLost 1"
    assert verdict(lost) == "RankLost 2"
    assert verdict(ranks.failure(Beat(3, gone), UserError("mine"))) == "UserError 3"
    far = replace(here, boot="another")
    assert verdict(well, Beat(2, far), Beat(3, here), silent_s=60) == ""
    os.utime(ranks.file_of(tmp_path, 2), ns=(since - 100 * 10**9,) * 2)
    assert verdict(silent_s=60) == ""  # of an earlier start, for all we know
    peers = ranks.Peers.of(tmp_path, [2], 0, since - 200 * 10**9)
    peers.look((time.time_ns(), time.monotonic()))
    found = peers.ended(60)
    assert found is not None and "is silent: last heard of in phase 'start' of step 0, 100 s ago" in str(found[1])


# ---------------------------------------------------------------------------------------------------------------- parts


def test_a_rank_file_is_one_page_and_belongs_to_the_latest_start(tmp_path: Path) -> None:
    old = Beat(3, Process.current(), step=7, phase="data", message="é\n" * 9000, state="failed", stuck_s=1.5)
    ranks.file_of(tmp_path, 3).write_bytes(b"x" * 9000)
    assert old.write(tmp_path, first=True) is not None
    raw = ranks.file_of(tmp_path, 3).read_bytes()
    assert len(raw) == SIZE and raw.endswith(b"\n")
    again = Beat.decode(raw)
    assert again is not None and replace(again, message="") == replace(old, message="")
    assert len(again.message) > 400 and old.message.startswith(again.message)

    new = Beat(3, replace(old.process, pid=1, started=5))
    assert new.write(tmp_path, first=True) is not None
    assert old.write(tmp_path) is None  # one that should have ended by now
    assert Beat.decode(ranks.file_of(tmp_path, 3).read_bytes()) == new


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b'{"rank": 0}', b"[" * SIZE, b'{"pid": 1e999}'])
def test_what_no_rank_wrote_is_nothing(tmp_path: Path, raw: bytes) -> None:
    assert Beat.decode(raw) is None
    valid = json.loads(Beat(0, Process.current()).encode())
    for key in ("rank", "step", "stuck_s"):
        assert Beat.decode(json.dumps({**valid, key: "x"}).encode()) is None
        assert Beat.decode(json.dumps({**valid, key: None}).encode()) is None
    ranks.file_of(tmp_path, 1).write_bytes(raw)
    peer = Peer(1)
    peer.look(tmp_path, 0, time.time_ns())
    assert peer.beat is None


def test_who_is_suspected() -> None:
    here = Process.current()

    def found(own: tuple[str, int], *others: tuple[str, int] | None) -> list[int]:
        peers = [
            Peer(rank, None if o is None else Beat(rank, here, phase=o[0], step=o[1]), time.monotonic(), True)
            for rank, o in enumerate(others, start=1)
        ]
        return list(hang_report.suspects(Beat(0, here, phase=own[0], step=own[1]), peers, 5))

    assert found(("gradients", 3), ("forward", 3)) == [1]
    assert found(("data", 3), ("gradients", 3), ("agree", 3)) == [0]
    assert found(("gradients", 3), ("gradients", 2), ("gradients", 3)) == [1]
    assert found(("gradients", 3), ("gradients", 3)) == []
    assert found(("forward", 3), ("forward", 3)) == [0, 1]  # collectives inside, as synchronised statistics have
    assert found(("forward", 3), None) == [1]
    assert found(("gradients", 3)) == [0]
