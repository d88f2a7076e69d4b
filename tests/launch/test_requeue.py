"""What follows the end of a job: every decision, and what Slurm makes of it."""

import ast
import itertools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from selfsup.launch import history, requeue
from selfsup.launch.requeue import Decision, Policy, decide
from tests.slurm.cluster import Slurm

FILE = Path(requeue.__file__ or "")
POLICY = Policy(timeouts=None, crashes=3, delay_s=30.0, max_delay_s=100.0, signal_before_s=300.0)
NOW = 1_700_000_000.0


def at(seconds: float) -> str:
    """As Slurm writes a time so many seconds from now."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(NOW + seconds))


RUNNING = {
    "JobState": "RUNNING",
    "Reason": "None",
    "Restarts": "0",
    "PreemptTime": "None",
    "StartTime": at(-3600),
    "EndTime": at(36000),
}
ENDING = {**RUNNING, "JobState": "COMPLETING"}


def event(kind: str, **fields: Any) -> dict[str, Any]:
    """One of the history."""
    return {"event": kind, "time": NOW - 100, "job": "12", "restart": 0, "task": "train", **fields}


def outcome(code: int, why: str = "", **fields: Any) -> dict[str, Any]:
    """What rank 0 wrote."""
    return {"job": "12", "restart": 0, "task": "train", "code": code, "why": why, "step": 40, **fields}


def decided(code: int, **given: Any) -> Decision:
    """Of a job that began at step 10 and has a checkpoint of step 40."""
    values: dict[str, Any] = {
        "job": "12",
        "restart": 0,
        "task": "train",
        "outcome": None,
        "seen": RUNNING,
        "events": [event("start", step=10, time=NOW - 3600)],
        "policy": POLICY,
        "step": 40,
        "now": NOW,
    }
    return decide(code, **{**values, **given})


@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [
        (0, {}, "done"),
        (0, {"seen": None}, "done"),
        (0, {"seen": ENDING}, "done"),
        (2, {}, "user error"),
        (75, {"outcome": outcome(75, "stop_at=40")}, "stop_at"),
        (75, {"seen": {**ENDING, "Restarts": "1"}}, "already requeued"),
        (137, {"seen": {**RUNNING, "JobState": "PENDING", "Restarts": "1"}}, "already requeued"),
        (75, {"seen": ENDING}, "cancelled"),
        (143, {"seen": {**ENDING, "PreemptTime": "None"}}, "cancelled"),
        (75, {"events": [event("start", step=10), event("cancel", time=NOW - 5)]}, "cancelled"),
        (75, {"seen": None, "events": [event("cancel")]}, "cancelled"),
        (75, {"seen": {**ENDING, "PreemptTime": at(-7200)}}, "cancelled"),
    ],
)
def test_not_requeued(code: int, given: dict[str, Any], expected: str):
    assert decided(code, **given) == Decision(False, expected, 0.0, 0, code)


@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [
        (75, {}, "stopped"),
        (75, {"seen": None}, "stopped"),
        (75, {"seen": {**RUNNING, "PreemptTime": at(-20)}}, "preempted"),
        (143, {"seen": {**RUNNING, "PreemptTime": at(-20)}}, "preempted"),
        (12, {"seen": {**RUNNING, "PreemptTime": at(-20)}}, "preempted"),
        (75, {"seen": {**ENDING, "PreemptTime": at(-20)}}, "preempted"),
        (137, {"seen": {**ENDING, "PreemptTime": at(-20)}}, "preempted"),
        (75, {"seen": {**RUNNING, "JobState": "SIGNALING"}}, "stopped"),
        (75, {"seen": {**RUNNING, "PreemptTime": at(-7200)}}, "stopped"),
        (75, {"seen": {**RUNNING, "EndTime": at(380)}}, "time limit"),
        (140, {"seen": {**RUNNING, "EndTime": at(380)}}, "time limit"),
        (75, {"seen": {**RUNNING, "EndTime": at(400)}}, "stopped"),
        (75, {"seen": {**RUNNING, "EndTime": "Unknown"}}, "stopped"),
        (137, {"seen": {**ENDING, "Reason": "TimeLimit"}}, "time limit"),
        (75, {"seen": {**ENDING, "Reason": "TimeLimit"}}, "time limit"),
        (75, {"events": [event("start", step=10), event("cancel"), event("cancel refused")]}, "stopped"),
    ],
)
def test_requeued_at_once(code: int, given: dict[str, Any], expected: str):
    assert decided(code, **given) == Decision(True, expected, 0.0, 0, code)


@pytest.mark.parametrize("code", [1, 9, 137, 139, 143, 140, 15, 255])
def test_a_crash_waits(code: int):
    """Also a death by a signal that nobody of Slurm's sent; and near the time limit, one that no signal caused."""
    seen = {**RUNNING, "EndTime": at(200)} if code not in (143, 140, 15) else RUNNING
    assert decided(code, seen=seen) == Decision(True, "crash", 30.0, 1, code)


def test_rank_0_knows_best():
    """If the outcome is of this start, and an orderly one."""
    assert decided(137, outcome=outcome(0)) == Decision(False, "done", 0.0, 0, 0)
    assert decided(1, outcome=outcome(2)).reason == "user error"
    assert decided(143, outcome=outcome(75)) == Decision(True, "stopped", 0.0, 0, 75)
    assert decided(137, outcome=outcome(1)) == Decision(True, "crash", 30.0, 1, 137)
    for other in ({"job": "11"}, {"restart": 1}, {"task": "knn"}):
        assert decided(137, outcome=outcome(0, **other)).reason == "crash"
    assert decided(137, outcome={"code": 0}).reason == "crash"


def test_crashes_are_counted_until_there_is_progress():
    events = [event("start", step=10)]
    delays = []
    for number in range(1, 4):
        found = decided(137, events=events)
        assert (found.requeue, found.crashes) == (True, number)
        delays.append(found.delay_s)
        events += [event("requeue", reason="crash", step=40, crashes=number), event("start", step=40)]
        events += [event("requeue", reason="preempted", step=40, crashes=0)]  # no progress
    assert delays == [30.0, 60.0, 100.0]
    assert decided(137, events=events) == Decision(False, "crashes used up", 0.0, 4, 137)
    assert decided(137, events=events, step=41) == Decision(True, "crash", 30.0, 1, 137)
    assert decided(137, events=events, step=39).reason == "crashes used up", "a rollback is no progress"
    assert decided(137, events=events, job="13").crashes == 1, "submitted again"
    assert decided(137, events=events, task="knn").crashes == 1
    assert decided(75, events=events, seen={**RUNNING, "PreemptTime": at(-20)}).requeue, "preemption is not bounded"
    assert decided(137, events=[], step=None, policy=POLICY._replace(crashes=0)).reason == "crashes used up"
    many = [event("requeue", reason="crash", step=40, crashes=5000)]
    assert decided(137, events=many, policy=POLICY._replace(crashes=9999)).delay_s == 100.0


def test_a_stop_before_the_first_step_is_bounded():
    """Ranks that wait for one that has crashed are told to stop: were it a stop like others, it would go on for ever."""
    events = [event("start", step=40)]
    for number in range(1, 4):
        assert decided(75, events=events) == Decision(True, "stopped", (30.0, 60.0, 100.0)[number - 1], number, 75)
        events.append(event("requeue", reason="stopped", step=40, crashes=number))
    assert decided(75, events=events).reason == "crashes used up"
    assert decided(75, events=[], step=None).crashes == 1, "rendezvous was never over"


def test_time_limits_are_counted_if_bounded():
    near = {**RUNNING, "EndTime": at(100)}
    events = [event("start", step=10)]
    bounded = POLICY._replace(timeouts=2)
    for _ in range(2):
        assert decided(75, seen=near, events=events, policy=bounded).reason == "time limit"
        events += [event("requeue", reason="time limit", crashes=0), event("requeue", reason="preempted", crashes=0)]
    assert decided(75, seen=near, events=events, policy=bounded) == Decision(False, "time limits used up", 0.0, 0, 75)
    assert decided(75, seen=near, events=events * 50).requeue
    assert decided(75, seen=near, events=events, policy=bounded, job="13").requeue


@pytest.mark.parametrize("seen", [{**RUNNING, "EndTime": at(100)}, {**ENDING, "Reason": "TimeLimit"}])
@pytest.mark.parametrize("task", ["train", "knn"])
def test_time_limits_without_progress_are_bounded(seen: dict[str, str], task: str):
    """Even if they are not counted: an evaluation whose time is too short would come back for ever."""
    events = [event("start", step=40, task=task)]
    for number in range(1, 4):
        assert decided(143, seen=seen, events=events, task=task) == Decision(True, "time limit", 0.0, number, 143)
        events.append(event("requeue", reason="time limit", step=40, crashes=number, task=task))
    assert decided(143, seen=seen, events=events, task=task) == Decision(False, "no progress", 0.0, 4, 143)
    if task == "train":
        assert decided(143, seen=seen, events=events, step=41).requeue


def test_a_cancelled_job_that_somebody_brings_back():
    """`scontrol requeue` of a cancelled job: the new start is not cancelled, until it is asked for again."""
    before = [event("start", step=0, time=1), event("cancel", time=2), event("stop", reason="cancelled", time=3)]
    assert decided(75, events=before, seen=None).reason == "cancelled"
    again = [*before, event("start", restart=1, step=10, time=4)]
    assert decided(75, events=again, restart=1).reason == "stopped"
    assert decided(75, events=[*again, event("cancel", time=5)], restart=1).reason == "cancelled"
    assert decided(75, events=[*again, event("cancel", time=3)], restart=1).reason == "cancelled", (
        "a clock that is late"
    )


def test_a_sweep_that_is_cancelled():
    """The number of the array means each of its runs."""
    events = [event("start", job="12_3", step=1), event("cancel", job="12")]
    assert decided(75, events=events, job="12_3").reason == "cancelled"
    assert decided(75, events=[event("cancel", job="12_2")], job="12_3").reason == "stopped"


def test_nothing_makes_it_fail():
    """Whatever files and Slurm hold, there is a decision."""
    odd: list[Any] = [None, "", "x", "N/A", -1, [1], {}]
    for value, code in itertools.product(odd, (0, 2, 75, 137, -9)):
        seen = dict.fromkeys(RUNNING, value)
        events = [{"event": kind, "step": value, "crashes": value} for kind in ("start", "requeue", "cancel")]
        own = [event(kind, step=value, crashes=value, reason=value) for kind in ("start", "requeue")]
        for each in (seen, None):
            found = decided(code, seen=each, events=[*events, *own], outcome={"code": value}, step=None)
            assert found.requeue in (True, False) and found.reason


def test_any_python_on_the_host():
    """Syntax of 3.6, and the standard library alone."""
    for path in (FILE, FILE.with_name("history.py")):
        tree = ast.parse(path.read_text(), feature_version=(3, 6))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert names <= set(sys.stdlib_module_names) | {"history"}


def test_newest_step(tmp_path: Path):
    assert requeue.newest_step(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    latest = tmp_path / "checkpoints" / "latest"
    for text, step in (("step_00000250\n", 250), ("step_123456789", 123456789), ("../x", None), ("\xff", None)):
        latest.write_text(text, encoding="latin-1")
        assert requeue.newest_step(tmp_path) == step


def program(run: Path, *options: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The program as a script runs it, in a process that has nothing but these variables."""
    command = [sys.executable, str(FILE), str(run), "--task=train", *options]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_without_slurm(tmp_path: Path):
    """It says so and what to do; the code of the training stays."""
    done = program(tmp_path, "--code=75", env={"PATH": "/nowhere"})
    assert done.returncode == 75 and "no SLURM_JOB_ID" in done.stdout
    done = program(tmp_path, "--code=75", "--delay=0", env={"PATH": "/nowhere", "SLURM_JOB_ID": "12"})
    assert done.returncode == 75 and not done.stderr
    assert "scontrol cannot be run" in done.stdout and f"--out {tmp_path} --resume" in done.stdout
    kinds = [(e["event"], e["reason"]) for e in history.read(tmp_path)]
    assert kinds == [("requeue", "stopped"), ("stop", "not requeued")]
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "13", "PATH": "/nowhere"}
    done = program(tmp_path, "--code=1", env=array)
    assert done.returncode == 1 and "cannot tell the run of job 12_1" in done.stdout


def test_what_is_done_needs_no_slurm(tmp_path: Path):
    done = program(tmp_path, "--code=0", env={"PATH": "/nowhere", "SLURM_JOB_ID": "12"})
    assert (done.returncode, done.stdout) == (0, "selfsup: job 12 (restart 0) ended with code 0: done\n")
    assert history.read(tmp_path) == []


def test_a_full_disk(tmp_path: Path):
    """The log is on it too: the decision is carried out, and its code stays. But crashes that cannot be counted are few."""
    (tmp_path / "job").mkdir()
    (tmp_path / history.FILE).mkdir()  # so that no line goes there
    for restart, asked in (("", True), ("2", True), ("3", False)):
        env = {"PATH": "/nowhere", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": restart}
        done = program(tmp_path, "--code=1", env=env)
        assert done.returncode == 1 and not done.stderr and "cannot be written" in done.stdout
        assert ("starts again" in done.stdout) == asked == ("not requeued: " in done.stdout)
        assert ("crashes used up" in done.stdout) != asked
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(FILE), str(tmp_path / "other"), "--task=train", "--code=75"]
        ended = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (75, "")
    assert [e["event"] for e in history.read(tmp_path / "other")] == ["requeue", "stop"], "Slurm was asked"


# -------------------------------------------------------------------------------------------------- on a real Slurm


def script(body: str, run: Path, *options: str) -> str:
    """A batch script whose 'tasks' are these lines, which set `code`."""
    program = shlex.join([sys.executable, str(FILE), str(run), "--task=train", *options])
    return f"#!/bin/bash\ntrap : TERM\n{body}\nexec {program} --code=$code\n"


SLEEP = "sleep 600 & wait; code=75"


def test_one_run_of_an_array(slurm: Slurm, tmp_path: Path):
    """A crash starts that run again and no other: the number of one of them is that of the whole array."""
    runs = ["a b", "ü"]
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "submission.json").write_text(json.dumps({"runs": runs}))
    body = '[ "$SLURM_ARRAY_TASK_ID/$SLURM_RESTART_COUNT" = 1/ ] && code=137 || code=0'
    job = slurm.submit(
        "--array=0-1", f"--output={tmp_path}/%a.out", "--open-mode=append", script=script(body, tmp_path, "--delay=3")
    )
    slurm.wait(f"{job}_1", "COMPLETED", restarts=1, timeout=90)
    assert slurm.wait(f"{job}_0", "COMPLETED")["Restarts"] == "0"
    assert history.read(tmp_path / runs[0]) == []
    (event,) = history.read(tmp_path / runs[1])
    assert (event["job"], event["reason"], event["crashes"], event["delay_s"]) == (f"{job}_1", "crash", 1, 3.0)
    told = (tmp_path / "1.out").read_text()
    assert f"job {job}_1 (restart 0) ended with code 137 (crash 1 of 3): starts again in 3 s" in told
    assert "(restart 1) ended with code 0: done" in told


def test_the_pause_after_a_crash(slurm: Slurm, tmp_path: Path):
    job = slurm.submit(f"--output={tmp_path}/out", script=script("code=1", tmp_path, "--delay=400"))
    slurm.poll(lambda: slurm.job(job)["Reason"] == "BeginTime" and slurm.job(job)["Restarts"] == "1", 60, "not delayed")
    slurm.poll(lambda: "starts again" in (tmp_path / "out").read_text(), 10, "not said")

    def later() -> bool:
        start = time.mktime(time.strptime(slurm.job(job)["StartTime"], "%Y-%m-%dT%H:%M:%S"))
        return 200 < start - time.time() <= 400

    slurm.poll(later, 30, lambda: f"not in 400 s: {slurm.job(job)}")


def test_cancelled(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also between the decision and the requeue, which brings the job back."""
    job = slurm.submit(f"--output={tmp_path}/out", script=script(f"echo up; {SLEEP}", tmp_path))
    slurm.poll(lambda: (tmp_path / "out").exists() and (tmp_path / "out").read_text(), 60, "it does not start")
    slurm.command("scancel", "--full", job)
    slurm.poll(lambda: history.read(tmp_path), 30, "nothing was decided")
    assert slurm.job(job)["JobState"] in ("CANCELLED", "COMPLETING") and slurm.job(job)["Restarts"] == "0"
    assert [(e["event"], e["reason"], e["code"]) for e in history.read(tmp_path)] == [("stop", "cancelled", 75)]

    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    slurm.wait(job, "CANCELLED")
    history.append(tmp_path, "cancel", job=job, restart=0, task="train")
    requeue._carry_out(tmp_path, Decision(True, "preempted", 0.0, 0, 75), job, 0, "train")
    assert slurm.wait(job, "CANCELLED")["Restarts"] == "1"
    assert history.read(tmp_path)[-1]["reason"] == "cancelled"


def test_preempted_then_stopped_while_slurm_is_down(slurm: Slurm, tmp_path: Path):
    """Where Slurm itself would not requeue, and gives no time of grace.

    The time of an earlier preemption, should Slurm still show it, does not make a preemption of the next stop; that is
    decided while Slurm is down.
    """
    slurm.reconfigure(user_signal=False, PreemptMode="CANCEL", GraceTime=0)
    down = tmp_path / "down"
    tasks = f"""export SLURM_TIME_FORMAT=%A  # as people set it who like to read times
    if [ "$SLURM_RESTART_COUNT" = 1 ]; then
        until [ -e {down} ]; do echo up; sleep 0.5; done; code=75  # srun itself would wait for Slurm
    else
        srun -N2 -n2 sh -c 'trap "exit 75" TERM; echo up; sleep 600 & wait'; code=$?
    fi"""
    out = tmp_path / "out"
    slurm.submit("--nodes=2", f"--output={out}", "--open-mode=append", script=script(tasks, tmp_path, "--delay=0"))

    def printed(text: str, times: int = 1) -> None:
        slurm.poll(lambda: out.exists() and out.read_text().count(text) >= times, 90, f"does not print {text}")

    printed("up\n", 2)
    high = slurm.preempt()
    slurm.wait(high, "RUNNING", timeout=90)
    slurm.cancel(high)
    printed("up\n", 3)
    slurm.stop_slurmctld()
    down.touch()
    printed("Slurm does not answer")
    already = out.read_text().count("up\n")
    slurm.start_slurmctld()
    printed("up\n", already + 2)
    assert [e["reason"] for e in history.read(tmp_path)] == ["preempted", "stopped"]
