"""Run folders as submission and training leave them, without training: what is watched is their files and Slurm's jobs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selfsup.launch import history, slurm, submission
from selfsup.launch.cluster import Cluster
from selfsup.launch.submission import Submission
from tests.slurm.cluster import Slurm

SLEEP = "#!/bin/sh\nsleep 600\n"
QUIET = ("--output=/dev/null",)


def submitted(run: Path, job: str | None, *, kind: str = "slurm", **values: Any) -> Path:
    """RUN/job/submission.json of a job with this number."""
    told: dict[str, Any] = {"cluster": Cluster(kind=kind, gpus_per_node=0), "cluster_name": kind, "recipe": "demo"}
    told |= {"submitted": "2026-01-31T12:00:00+00:00", "selfsup": "0", "code_sha256": "0", "cwd": "/"}
    run.mkdir(parents=True, exist_ok=True)
    submission.write(run, Submission(kind=kind, job=job, **{**told, **values}))
    return run


def trained(run: Path, step: int, steps: int | None = 100, *, since: float = 1000.0, **last: Any) -> Path:
    """config.yaml, and a metrics.jsonl up to this step: two seconds a step, a time stamp every five."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(f"seed: 0\nsteps: {'null' if steps is None else steps}\n")
    lines: list[dict[str, Any]] = [{"step": n, "samples": 8 * n, "loss": 5.0 - n / 100} for n in range(1, step + 1)]
    for line in lines[4::5]:
        line |= {"img_per_s": 4.0, "time": since + 2 * line["step"]}
    if lines:
        lines[-1] |= last
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def happened(run: Path, job: str, *events: str, restart: int = 0, task: str = "train", **fields: Any) -> Path:
    """Events of its history; the fields belong to the last of them."""
    for event in events:
        more = fields if event == events[-1] else {}
        history.append(run, event, job=job, restart=restart, task=task, **more)
    return run


def ended(run: Path, job: str, code: int, restart: int = 0) -> Path:
    """RUN/job/outcome.json."""
    (run / "job").mkdir(parents=True, exist_ok=True)
    told = {"job": job, "restart": restart, "task": "train", "code": code, "why": "", "step": 0}
    (run / "job" / "outcome.json").write_text(json.dumps(told))
    return run


class Supervisor:
    """A process that is told, in RUN/job/supervisor.json, to supervise a run; it does nothing, and ends when it is asked to."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SUPERVISOR, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "up\n"

    def __enter__(self) -> "Supervisor":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


_SUPERVISOR = """
import json, sys, time
from dataclasses import asdict
from pathlib import Path
from selfsup.guard.processes import Process
from selfsup.launch import local
file = Path(sys.argv[1]) / local.FILE
file.parent.mkdir(parents=True, exist_ok=True)
file.write_text(json.dumps(asdict(Process.current())))
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of the programs that another test found to be broken."""
    monkeypatch.setattr(slurm, "_scheduler", slurm.Scheduler())


@pytest.fixture
def here(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """This process asks the test cluster."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    yield slurm


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of its programs is on the PATH."""
    monkeypatch.setenv("PATH", "/nowhere")
