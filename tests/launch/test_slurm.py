"""What Slurm is asked about jobs, on a real one: with accounting and without, while they live and after it forgot them."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from selfsup.launch import slurm as asking
from selfsup.launch.slurm import UNKNOWN, Scheduler, first_node
from tests.slurm.cluster import Slurm

SLEEP = "#!/bin/sh\nsleep 600\n"
OPTIONS = ("--output=/dev/null",)


@pytest.fixture
def here(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """This process asks the test cluster."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    return slurm


def states(*jobs: str) -> list[str]:
    """By a scheduler that has not been asked before."""
    found = Scheduler().jobs(jobs)
    return [found[job].state for job in jobs]


@pytest.mark.parametrize("sacct", [True, False])
def test_a_life(here: Slurm, sacct: bool):
    """Waiting, running, requeued, ended in every way; then forgotten by the controller, when only sacct knows."""
    here.reconfigure(sacct=sacct, MinJobAge=2)
    running = here.submit(*OPTIONS, script=SLEEP)
    waiting = here.submit(*OPTIONS, f"--dependency=afterok:{running}", script=SLEEP)
    requeued = here.submit(*OPTIONS, script=SLEEP)
    cancelled = here.submit(*OPTIONS, script=SLEEP)
    for job in (running, requeued, cancelled):
        here.wait(job, "RUNNING")
    assert states(running, waiting, requeued, cancelled) == ["RUNNING", "PENDING", "RUNNING", "RUNNING"]
    info = Scheduler().jobs([running])[running]
    assert (info.restarts, info.host, info.reason) == (0, "n1", None) and info.start is not None
    assert Scheduler().jobs([waiting])[waiting].reason == "Dependency"

    here.command("scontrol", "requeue", requeued)
    here.cancel(cancelled)
    here.wait(requeued, "PENDING", restarts=1)
    info = Scheduler().jobs([requeued, cancelled])[requeued]
    assert (info.state, info.restarts, info.nodes) == ("PENDING", 1, None), "sacct -c has its first end, PENDING on n1"
    here.wait(requeued, "RUNNING", restarts=1)
    assert states(requeued) == ["RUNNING"], "though sacct -c says PENDING"

    failed = here.submit(*OPTIONS, script="#!/bin/sh\nexit 3\n")
    completed = here.submit(*OPTIONS, script="#!/bin/sh\nexit 0\n")
    ended = (failed, completed, cancelled)
    here.poll(lambda: not any(map(here.job, ended)), 120, "they are not forgotten")
    known = ["FAILED", "COMPLETED", "CANCELLED"] if sacct else [""] * 3
    assert states(*ended, running) == [*known, "RUNNING"]
    assert states(completed) == [known[1]], "one alone, for which squeue has another answer"
    if sacct:
        assert Scheduler().jobs([failed])[failed].exit == (3, 0)


@pytest.mark.parametrize("sacct", [True, False])
def test_ending(here: Slurm, sacct: bool):
    """A job whose script outlives scancel for a while: squeue says COMPLETING, and sacct why."""
    here.reconfigure(sacct=sacct, KillWait=60)
    script = "#!/bin/bash\ntrap : TERM\nsrun sleep 600\ntrap '' TERM\nsleep 600\n"
    job, other = (here.submit(*OPTIONS, script=script) for _ in range(2))
    for each in (job, other):
        here.wait(each, "RUNNING")
    here.poll(lambda: here.command("squeue", "--steps", "--noheader", "--format=%i").count(".0") == 2, 30, "no steps")
    here.cancel(job)
    here.command("scontrol", "requeue", other)
    here.wait(job, "COMPLETING")
    assert states(job) == ["CANCELLED" if sacct else "COMPLETING"]
    info = Scheduler().jobs([other])[other]
    assert info.state == "COMPLETING" and info.restarts == 1


def test_arrays_in_one_call(here: Slurm):
    """Hundreds of jobs; one that Slurm does not know among them hides none."""
    array = here.submit(*OPTIONS, "--array=0-199%1", "--nodes=2", "--exclusive", script=SLEEP)
    here.wait(f"{array}_0", "RUNNING")
    jobs = [f"{array}_{index}" for index in range(200)]
    scheduler = Scheduler()
    found = scheduler.jobs([*jobs, array, "999999"])
    assert [found[job].state for job in jobs] == ["RUNNING", *["PENDING"] * 199]
    assert found[array].state == "RUNNING" and found["999999"] == UNKNOWN
    assert found[jobs[0]].nodes == "n[1-2]" and found[jobs[0]].host == "n1"
    assert scheduler.calls <= 3, "squeue, and sacct in both ways for the one that is not known"
    here.cancel(f"{array}_1")
    assert states(jobs[1], jobs[2]) == ["", "PENDING"], "of one that never began Slurm keeps nothing at all"


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Leaves only some programs on the PATH."""

    def leave(*programs: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        for program in programs:
            (tmp_path / "bin" / program).symlink_to(str(shutil.which(program)))
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    return leave


def test_without_squeue(here: Slurm, only):
    running = here.submit(*OPTIONS, script=SLEEP)
    array = here.submit(*OPTIONS, "--array=2,5-6%1", "--exclusive", script=SLEEP)
    here.wait(running, "RUNNING")
    here.wait(f"{array}_2", "RUNNING")
    jobs = [running, f"{array}_2", f"{array}_5", f"{array}_6", "999999"]
    expected = Scheduler().jobs(jobs)
    only("scontrol")
    found = Scheduler().jobs(jobs)
    assert [found[job].state for job in jobs] == ["RUNNING", "RUNNING", "PENDING", "PENDING", ""]
    assert [found[job].restarts for job in jobs] == [0, 0, 0, 0, None]
    assert [found[job].host for job in jobs] == [expected[job].host for job in jobs]
    assert [found[job].reason for job in jobs] == [expected[job].reason for job in jobs]


def test_sacct_alone(here: Slurm, only):
    failed = here.submit(*OPTIONS, script="#!/bin/sh\nexit 4\n")
    here.wait(failed, "FAILED")
    only("sacct")
    scheduler = Scheduler()
    found = scheduler.jobs([failed, "999999"])
    assert found[failed].state == "FAILED" and found[failed].exit == (4, 0) and "999999" not in found


def test_no_slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Scheduler().jobs(["1", "2_3"]) == {}
    assert Scheduler().jobs([]) == {}


def test_a_controller_that_hangs(here: Slurm):
    """Nothing waits for ever, and what failed is not asked at once again."""
    job = here.submit(*OPTIONS, script=SLEEP)
    here.reconfigure(sacct=False)
    pid = here.pid("slurmctld")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    scheduler = Scheduler(timeout_s=0.5)
    try:
        assert scheduler.jobs([job]) == {}
        asked = scheduler.calls
        assert asked == 3, "squeue, and sacct in both ways"
        assert scheduler.jobs([job]) == {} and scheduler.calls == asked
    finally:
        os.kill(pid, signal.SIGCONT)
    assert Scheduler().jobs([job])[job].state in ("PENDING", "RUNNING")


def test_habits_of_the_user_change_nothing(here: Slurm, monkeypatch: pytest.MonkeyPatch):
    job = here.submit(*OPTIONS, script=SLEEP)
    here.wait(job, "RUNNING")
    for name, value in {"SQUEUE_FORMAT": "%j", "SQUEUE_PARTITION": "high", "SQUEUE_STATES": "PD"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert states(job) == ["RUNNING"]


# -------------------------------------------------------------------------------- what a database's sacct writes


def test_records_of_a_database():
    text = "12|CANCELLED by 1000|0:15|n[1-2]|2026-01-01T00:00:00\n13_0|COMPLETED|0:0|n1|2026-01-01T00:00:00\n"
    text += (
        "13_[1-3,7%2]|CANCELLED by 0|0:0|None assigned|Unknown\n12.batch|FAILED|1:0|n1|x\n14|OUT_OF_ME+|0:125|n1|x\n"
    )
    found = asking._parse_sacct(text)
    assert found["12"].state == "CANCELLED" and found["12"].exit == (0, 15) and found["12"].host == "n1"
    assert [found[f"13_{i}"].state for i in (0, 1, 3, 7)] == ["COMPLETED", *["CANCELLED"] * 3]
    assert found["13_7"].nodes is None and found["13_7"].start is None
    assert set(found) == {"12", "13_0", "13_1", "13_2", "13_3", "13_7", "14"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003-007,9],login1", "gpu003"),
        ("a,b", "a"),
        ("rack[1,3]n", "rack1n"),
        ("", ""),
    ],
)
def test_first_node(nodes: str, first: str):
    assert first_node(nodes) == first
