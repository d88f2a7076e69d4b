"""One rank of a job, in a process of its own: what it heeds, what it leaves behind, however it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfsup.config import dump
from selfsup.errors import UserError
from selfsup.launch import history, job, submission
from selfsup.launch.cluster import Cluster
from selfsup.launch.submission import Submission
from tests.methods.tiny import tiny_config

PLACE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "SELFSUP_JOB": "local-1",
    "SELFSUP_RESTART": "1",
}

# Trains as it is told to, and prints the class of what came out of it.
RANK = """
import os, signal, sys
from pathlib import Path
from selfsup.errors import DiskError, EarlyStop, RankLost, UserError
from selfsup.launch import job
run, how = Path(sys.argv[1]), sys.argv[2]
ENDS = {
    "early": EarlyStop("stopped at step 3 of 10 (SIGTERM); go on"),
    "user": UserError("data: no such folder"),
    "disk": DiskError("metrics.jsonl: cannot be written"),
    "lost": RankLost("rank 1 is gone"),
    "crash": RuntimeError("boom"),
    "exit": SystemExit(5),
    "interrupt": KeyboardInterrupt(),
}

class SignalAtImport:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGTERM)

def train(config, out):
    from selfsup.signals import StopSignals
    print("steps", config.steps, "in", out.name, os.environ.get("MASTER_PORT"), flush=True)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not blocked & {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT}
    with StopSignals() as signals:
        print("received", signals.received, flush=True)
    if how in ENDS:
        raise ENDS[how]

def evaluate(task, out, overrides):
    train(type("Config", (), {"steps": [task, *overrides]}), out)

if how == "signal":
    assert "torch" not in sys.modules
    sys.meta_path.insert(0, SignalAtImport())
for how in how.split(","):
    try:
        if len(sys.argv) > 3:
            job.run_evaluation(run, sys.argv[3], sys.argv[4:], evaluate)
        else:
            job.run_training(run, train)
    except BaseException as error:
        print("raised", type(error).__name__, error, flush=True)
    outcome = run / "job/outcome.json"
    print("outcome", outcome.read_text() if outcome.exists() else "null", flush=True)
"""


def told(**fields: Any) -> Submission:
    """As `selfsup submit` writes it."""
    values: dict[str, Any] = {
        "kind": "local",
        "job": "local-1",
        "cluster": Cluster(kind="local"),
        "cluster_name": "local",
        "recipe": "r",
        "submitted": "2026-01-31T12:00:00+00:00",
        "selfsup": "0",
        "code_sha256": "0",
        "cwd": "/",
    }
    return Submission(**{**values, **fields})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A submitted run with a checkpoint of step 3."""
    out = tmp_path / "mein Lauf"
    submission.write(out, told())
    (out / submission.CONFIG).write_text(dump(tiny_config("dino", "data=/nowhere")))
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "latest").write_text("step_00000003\n")
    return out


def rank(run: Path, how: str, *evaluation: str, env: dict[str, str] | None = None) -> list[str]:
    """The lines it prints."""
    return [line for line in _rank(run, how, *evaluation, env=env) if line and not line.startswith("outcome")]


def _rank(run: Path, how: str, *evaluation: str, env: dict[str, str] | None = None) -> list[str]:
    command = [sys.executable, "-c", RANK, str(run), how, *evaluation]
    done = subprocess.run(
        command, env={**os.environ, **PLACE, **(env or {})}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be written" not in done.stderr
    return done.stdout.splitlines()


def outcome(run: Path) -> dict[str, Any]:
    """outcome.json."""
    return json.loads((run / "job/outcome.json").read_text())


ENDS = {
    "done": (0, "", None),
    "early": (75, "stopped at step 3 of 10 (SIGTERM); go on", "EarlyStop"),
    "user": (2, "data: no such folder", "UserError"),
    "disk": (1, "metrics.jsonl: cannot be written", "_DiskFailed"),
    "lost": (1, "RankLost: rank 1 is gone", "RankLost"),
    "crash": (1, "RuntimeError: boom", "RuntimeError"),
    "exit": (1, "SystemExit: 5", "SystemExit"),
    "interrupt": (1, "KeyboardInterrupt: ", "KeyboardInterrupt"),
}


def test_every_end_is_told(run: Path):
    """In the history and in outcome.json; and raised as it was."""
    lines = [line for line in _rank(run, ",".join(ENDS)) if line]
    events = history.read(run)
    for code, why, raised in ENDS.values():
        assert lines[:2] == ["steps 10 in mein Lauf None", "received None"]
        if raised:
            assert lines.pop(2).split()[:2] == ["raised", raised]
        expected = {"job": "local-1", "restart": 1, "task": "train", "code": code, "why": why, "step": 3}
        assert json.loads(lines[2].removeprefix("outcome ")) == expected
        start, end = events[:2]
        assert (start["event"], start["world"], start["step"]) == ("start", 1, 3)
        assert end == {"event": "end", "time": end["time"], **expected}
        del lines[:3], events[:2]
    assert not lines and not events


def test_a_stop_that_the_configuration_asks_for(run: Path):
    """To start again would change nothing; a signal before that is another matter."""
    for stop_at, start in ((3, "stop_at: stopped"), (4, "stopped at")):
        (run / submission.CONFIG).write_text(dump(tiny_config("dino", "data=/nowhere", f"stop_at={stop_at}")))
        assert "raised" in rank(run, "early")[-1]
        assert outcome(run)["code"] == 75 and outcome(run)["why"].startswith(start)


def test_signals_during_imports_are_heeded(run: Path):
    """While torch is imported: neither deadly nor lost."""
    lines = rank(run, "signal")
    assert lines[1] in ("received 12", "received 15") and outcome(run)["code"] == 0


def test_only_rank_0_writes(run: Path):
    """One that fails alone, here before it meets the others, leaves the files alone."""
    (run / submission.CONFIG).write_text("no: [")
    (line,) = rank(run, "done", env={"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    assert "raised UserError" in line and "config.yaml" in line
    assert history.read(run) == [] and not (run / "job/outcome.json").exists()
    rank(run, "done")
    assert outcome(run)["code"] == 2 and [e["event"] for e in history.read(run)] == ["end"]


def test_an_earlier_start_does_not_overwrite_a_later_one(run: Path):
    """It was on a node that the scheduler had given up, and ends when it finds out."""
    rank(run, "done", env={"SELFSUP_RESTART": "2"})
    rank(run, "crash")
    assert (outcome(run)["restart"], outcome(run)["code"]) == (2, 0)
    rank(run, "early", env={"SELFSUP_JOB": "local-2", "SELFSUP_RESTART": "0"})
    assert (outcome(run)["job"], outcome(run)["code"]) == ("local-2", 75)


def test_what_cannot_be_written_is_said(run: Path):
    """And does not end a training."""
    (run / history.FILE).mkdir()
    command = [sys.executable, "-c", RANK, str(run), "done"]
    done = subprocess.run(command, env={**os.environ, **PLACE}, capture_output=True, text=True, timeout=120)
    assert "raised" not in done.stdout and done.stderr.count("history.jsonl: cannot be written") == 2, done.stderr
    assert outcome(run)["code"] == 0


def test_an_evaluation(run: Path):
    lines = rank(run, "done,user", "knn", "k=5", "data=a b")
    assert lines[0] == "steps ['knn', 'k=5', 'data=a b'] in mein Lauf None"
    assert [(e["event"], e["task"], e.get("code")) for e in history.read(run)] == [
        ("start", "knn", None),
        ("end", "knn", 0),
        ("start", "knn", None),
        ("end", "knn", 2),
    ]
    assert lines[-1] == "raised UserError data: no such folder" and not (run / "job/outcome.json").exists()
    (line,) = rank(run, "done", "knn", env={"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    assert "raised UserError an evaluation is one task, not 2" in line


def test_no_job_at_all(run: Path):
    env = dict.fromkeys(PLACE, "")
    done = subprocess.run(
        [sys.executable, "-m", "selfsup.cli", "job", "train", str(run)],
        env={k: v for k, v in os.environ.items() if k not in env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "not in a job" in done.stderr and len(done.stderr.strip().splitlines()) <= 2


def test_member(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The run of an array's job; a run's own folder is that, whatever array its process is part of."""
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    sweep = tmp_path / "sweep"
    submission.write(sweep, told(runs=("a", "b")))
    assert job.member(run) == run
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID is not set"):
        job.member(sweep)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert (job.member(sweep), job.member(run)) == (sweep / "b", run)
    for wrong in ("2", "x", "-1", ""):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", wrong)
        with pytest.raises(UserError, match="SLURM_ARRAY_TASK_ID="):
            job.member(sweep)
    with pytest.raises(UserError, match=r"submission\.json: not there"):
        job.member(tmp_path)
