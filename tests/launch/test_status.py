"""How runs stand: by a real Slurm, by their folders alone, and for people."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from selfsup.errors import UserError
from selfsup.guard import ranks
from selfsup.guard.processes import Process
from selfsup.guard.ranks import Beat
from selfsup.launch import figures, state, status
from selfsup.launch import slurm as asking
from selfsup.launch.slurm import UNKNOWN, JobInfo
from selfsup.launch.status import RunStatus, describe
from tests.launch.written_runs import (
    QUIET,
    SLEEP,
    Supervisor,
    ended,
    forgetful,
    happened,
    here,
    no_slurm,
    submitted,
    trained,
)
from tests.slurm.cluster import Slurm

__all__ = ["forgetful", "here", "no_slurm"]


def one(run: Path) -> RunStatus:
    (found,) = describe([run])
    return found


# -------------------------------------------------------------------------------------------------- on a real Slurm


@pytest.mark.parametrize("sacct", [True, False])
def test_states(here: Slurm, tmp_path: Path, sacct: bool):
    """While Slurm knows the jobs, and after it forgot them: then sacct, or the run's own words."""
    here.reconfigure(sacct=sacct, MinJobAge=2)
    fail, succeed = "#!/bin/sh\nexit 1\n", "#!/bin/sh\nexit 0\n"
    jobs = {name: here.submit(*QUIET, script=SLEEP) for name in ("running", "requeued", "crashed", "cancelled")}
    jobs["queued"] = here.submit(*QUIET, f"--dependency=afterok:{jobs['running']}", script=SLEEP)
    jobs["never began"] = here.submit(*QUIET, f"--dependency=afterok:{jobs['running']}", script=SLEEP)
    jobs |= {name: here.submit(*QUIET, script=fail) for name in ("failed", "stopped at")}
    jobs |= {name: here.submit(*QUIET, script=succeed) for name in ("completed", "short", "told")}
    runs = {name: submitted(tmp_path / name, job) for name, job in jobs.items()}
    for name, run in runs.items():
        steps = 100 if name == "completed" else 40
        trained(run, steps)
        if name not in ("queued", "never began"):
            happened(run, jobs[name], "start", host="n1")
    happened(runs["crashed"], jobs["crashed"], "requeue", reason="crash")
    happened(runs["stopped at"], jobs["stopped at"], "end", "stop", reason="stop_at", code=75)
    ended(runs["told"], jobs["told"], 0)
    for name in ("running", "requeued", "crashed", "cancelled"):
        here.wait(jobs[name], "RUNNING")
    for name in ("requeued", "crashed"):
        here.command("scontrol", "requeuehold", jobs[name])
        here.wait(jobs[name], "PENDING", restarts=1)
    here.cancel(jobs["cancelled"])
    here.cancel(jobs["never began"])
    expected = {
        "running": "running",
        "requeued": "preempted",
        "crashed": "queued",
        "cancelled": "cancelled",
        "queued": "queued",
        "never began": "cancelled",
        "failed": "failed",
        "stopped at": "completed",
        "completed": "completed",
        "short": "failed",
        "told": "completed",
    }

    def seen() -> dict[str, str]:
        return {Path(found.run).name: found.state for found in describe([tmp_path])}

    here.poll(lambda: seen() == expected, 60, lambda: f"{seen()}, not {expected}")
    found = {Path(each.run).name: each for each in describe([tmp_path])}
    assert (found["requeued"].restarts, found["running"].restarts) == (1, 0)
    assert (found["running"].host, found["queued"].host) == ("n1", None)
    assert found["running"].eta_s is not None and found["failed"].eta_s is None
    assert found["queued"].remarks == ("waits: Dependency",)
    assert found["completed"].over and not found["requeued"].over

    over = [job for name, job in jobs.items() if expected[name] in state.FINAL]
    here.poll(lambda: not any(map(here.job, over)), 120, "they are not forgotten")
    if not sacct:  # a job that was cancelled and is forgotten: its script has said so
        happened(runs["cancelled"], jobs["cancelled"], "stop", reason="cancelled")
    assert seen() == expected
    if not sacct:
        assert describe([runs["cancelled"]])[0].host == "n1"


def test_killed_and_forgotten(here: Slurm, tmp_path: Path):
    """A job that Slurm knows nothing of, and that left no word, does not run: whatever its files say."""
    run = happened(trained(submitted(tmp_path / "run", "999999"), 40), "999999", "start")
    assert one(run).state == "failed"
    assert one(submitted(tmp_path / "other", "999999")).state == "cancelled", "it never began"
    elsewhere = submitted(tmp_path / "elsewhere", "999999", slurm_conf="/another/slurm.conf")
    assert one(elsewhere).state == "queued", "this Slurm is not the one to ask"


def test_a_resumed_run_has_the_newest_job(here: Slurm, tmp_path: Path):
    """What happened to an earlier submission says nothing about this one."""
    job = here.submit(*QUIET, "--begin=now+1hour", script=SLEEP)
    run = trained(submitted(tmp_path / "run", job), 40)
    happened(run, "999", "start", "end", "stop", restart=3, reason="cancelled", code=75)
    ended(run, "999", 75, restart=3)
    found = one(run)
    assert (found.state, found.restarts, found.step) == ("queued", 0, 40)
    assert found.remarks[0].startswith("waits: BeginTime, until 20")


def test_many_runs_are_a_few_calls(here: Slurm, tmp_path: Path):
    """A sweep, with the evaluations of each run; those are told of once."""
    array = here.submit(*QUIET, "--array=0-99%1", "--exclusive", "--nodes=2", script=SLEEP)
    after = here.submit(*QUIET, "--array=0-99", f"--dependency=aftercorr:{array}", script=SLEEP)
    table = here.submit(*QUIET, f"--dependency=afterany:{after}", script=SLEEP)
    names = [f"seed={index}" for index in range(100)]
    sweep = submitted(tmp_path / "sweep", array, runs=names, sweep={"seed": [*range(100)]}, table=table)
    for index, name in enumerate(names):
        then = [{"task": "knn", "job": f"{after}_{index}"}]
        submitted(sweep / name, f"{array}_{index}", index=index, part_of="..", then=then)
    here.wait(f"{array}_0", "RUNNING")
    found = describe([sweep])
    assert [each.state for each in found] == ["running", *["queued"] * 99]
    assert asking._scheduler.calls == 1
    assert [each.run for each in found] == [str(sweep / name) for name in names]
    assert found[3].remarks[-1] == f"knn (job {after}_3) waits: Dependency"
    assert [f"table (job {table})" in " ".join(each.remarks) for each in found] == [True, *[False] * 99]


def test_evaluations_that_failed_are_told(here: Slurm, tmp_path: Path):
    train = here.submit(*QUIET, script="#!/bin/sh\nexit 0\n")
    bad = here.submit(*QUIET, f"--dependency=afterok:{train}", script="#!/bin/sh\nexit 1\n")
    good = here.submit(*QUIET, f"--dependency=afterok:{train}", script="#!/bin/sh\nexit 0\n")
    then = [{"task": "knn", "job": bad}, {"task": "linear", "job": good}, {"task": "fewshot", "job": None}]
    run = trained(submitted(tmp_path / "run", train, then=then), 100)
    here.wait(bad, "FAILED")
    here.wait(good, "COMPLETED")
    found = one(run)
    assert found.state == "completed" and found.remarks == (
        f"knn (job {bad}) failed; its log: {run}/logs/{bad}_0_log.out",
    )
    assert status.table([found]).splitlines()[-1] == f"{run}: {found.remarks[0]}"


# ------------------------------------------------------------------------------------------- by the folder alone

HOLD = """
import sys, time
from pathlib import Path
from selfsup.guard.lease import Lease

with Lease.acquire(Path(sys.argv[1]), say=lambda text: None):
    print("held", flush=True)
    time.sleep(600)
"""


class Holder:
    """A process that holds the lease of a run; `kill` ends it without a word."""

    def __init__(self, run: Path, job: str | None = None) -> None:
        env = {**os.environ, **({"SELFSUP_JOB": job, "SELFSUP_RESTART": "0"} if job else {})}
        command = [sys.executable, "-c", HOLD, str(run)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout is not None and self.process.stdout.readline() == "held\n"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Holder":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def test_without_slurm(no_slurm: None, tmp_path: Path):
    """On a machine that cannot ask: a heartbeat, and what was written down."""
    run = submitted(tmp_path / "run", "12")
    assert one(run).state == "queued"
    happened(trained(run, 40), "12", "start", host="n7")
    with Holder(run, "12") as holder:
        found = one(run)
        assert (found.state, found.host, found.eta_s) == ("running", "n7", 120.0)
        holder.kill()
        assert one(run).state == "failed"
    happened(run, "12", "end", code=75)
    assert one(run).state == "preempted"
    happened(run, "12", "requeue", reason="preempted")
    assert (one(run).state, one(run).eta_s) == ("preempted", None)
    happened(run, "12", "start", restart=1)
    assert (one(run).state, one(run).restarts) == ("failed", 1)
    ended(run, "12", 0, restart=0)
    assert one(run).state == "failed", "that is how the start before it ended"
    ended(run, "12", 0, restart=1)
    assert one(run).state == "completed"
    happened(run, "12", "start", restart=2)
    happened(run, "12", "cancel", restart=2)
    assert one(run).state == "cancelled"


def test_a_heartbeat_has_a_deadline(no_slurm: None, tmp_path: Path):
    """The lease of another host, whose process nobody here can look at."""
    run = happened(trained(submitted(tmp_path / "run", "12"), 40), "12", "start", host="n7")
    lease = {"token": "x", "host": "n7", "boot": "b", "pid_namespace": "p", "pid": 5, "started": 7}
    (run / "lease.json").write_text(json.dumps({**lease, "job": "12", "restart": 0}))
    assert one(run).state == "running"
    long_ago = time.time() - 3600
    os.utime(run / "lease.json", (long_ago, long_ago))
    assert one(run).state == "failed"


def test_goes_on_without_a_job(here: Slurm, tmp_path: Path):
    """`selfsup train --resume` in the folder of a job that failed."""
    job = here.submit(*QUIET, script="#!/bin/sh\nexit 1\n")
    run = happened(trained(submitted(tmp_path / "run", job), 40), job, "start")
    here.wait(job, "FAILED")
    assert one(run).state == "failed"
    with Holder(run, job):
        assert one(run).state == "failed", "an orphan of the job: Slurm knows better"
    with Holder(run):
        assert one(run).state == "running"
    assert one(run).state == "failed"


def test_a_submission_without_a_number(no_slurm: None, tmp_path: Path):
    """sbatch has yet to answer, or was killed before it did."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    assert one(submitted(tmp_path / "run", None, submitted=now)).state == "queued"
    for when in ("2026-01-31T12:00:00+00:00", "nonsense", "2026-01-31T12:00:00"):
        assert one(submitted(tmp_path / "run", None, submitted=when)).state == "failed"


def test_supervised_on_this_machine(no_slurm: None, tmp_path: Path):
    """What its supervisor would start, or start again, goes on; when it is killed nothing does."""
    run = submitted(tmp_path / "run", "local-1", kind="local", then=[{"task": "knn"}])
    with Supervisor(run):
        assert one(run).state == "queued"
        happened(trained(run, 40), "local-1", "start")
        assert one(run).state == "running"
        happened(run, "local-1", "end", "requeue", reason="time limit", code=75)
        assert one(run).state == "preempted"
        happened(run, "local-1", "start", restart=1)
        assert (one(run).state, one(run).restarts) == ("running", 1)
    assert one(run).state == "failed"
    with Holder(run, "local-1"):
        assert one(run).state == "running", "its ranks outlive it"
    ended(run, "local-1", 0, restart=1)
    happened(run, "local-1-knn", "start", "end", task="knn", code=1)
    log = f"{run}/logs/local-1-knn_0_log.out"
    assert (one(run).state, one(run).remarks) == ("completed", (f"knn (job local-1-knn) failed; its log: {log}",))


def test_evaluations_beside_the_training(here: Slurm, tmp_path: Path):
    """Those of `eval.as_jobs` that wait or failed, until they have a result."""
    job, waiting = (here.submit(*QUIET, "--hold", script=SLEEP) for _ in range(2))
    failed = here.submit(*QUIET, script="#!/bin/sh\nexit 1\n")
    run = trained(submitted(tmp_path / "run", job), 40)
    for step, number in ((10, failed), (20, waiting), (30, waiting)):
        folder = run / "eval" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "job.json").write_text(json.dumps({"job": number, "step": step, "task": "knn"}))
    result(run / "eval" / "step_00000030" / "knn.json", None, top1=0.5)
    here.wait(failed, "FAILED")
    assert one(run).remarks == (
        "waits: JobHeldUser",
        f"knn of step_00000010 (job {failed}) failed; its log: {run}/logs/{failed}_0_log.out",
        f"knn of step_00000020 (job {waiting}) waits: JobHeldUser",
    )
    assert one(run).metrics["knn_top1"] == 0.5 and one(run).metrics["knn_step"] == 30


def test_plain_runs(no_slurm: None, tmp_path: Path):
    run = trained(tmp_path / "run", 40)

    def rank_0(state: str) -> None:
        (run / "ranks").mkdir(exist_ok=True)
        Beat(0, Process.current(), step=40, state=state).write(run / "ranks", first=True)

    with Holder(run) as holder:
        rank_0("running")
        found = one(run)
        assert found.state == "running" and found.host == Process.current().host and found.restarts == 0
        holder.kill()
        assert one(run).state == "failed"
    for ending, expected in (("done", "preempted"), ("failed", "failed")):
        rank_0(ending)
        assert one(run).state == expected
    assert one(trained(run, 100)).state == "completed"
    (run / "ranks" / "rank_00000.json").write_bytes(b"\x00" * ranks.SIZE)
    assert one(trained(run, 99)).state == "failed"


# ------------------------------------------------------------------------------------------------ folders and files


def test_folders(no_slurm: None, tmp_path: Path):
    """A run, a sweep, a folder with both and other things in it; each run once."""
    runs = tmp_path / "runs"
    runs.mkdir()
    assert describe([runs]) == [], "an empty `runs` is no mistake"
    trained(runs / "b", 10)
    trained(runs / "a", 20)
    (runs / "notes").mkdir()
    (runs / "file").write_text("")
    sweep = submitted(runs / "sweep", "12", runs=["seed=1", "seed=0"], sweep={"seed": [1, 0]})
    for index, name in enumerate(("seed=1", "seed=0")):
        submitted(sweep / name, f"12_{index}", index=index, part_of="..")
    expected = [str(runs / name) for name in ("a", "b", "sweep/seed=1", "sweep/seed=0")]
    assert [found.run for found in describe([runs, runs / "a", sweep])] == expected
    for wrong in (tmp_path / "none", runs / "file", runs / "notes"):
        with pytest.raises(UserError, match="run folder"):
            describe([wrong])


DAMAGE: dict[str, bytes] = {
    "metrics.jsonl": b'{"step": 3}\n[]\n{"step": "x"}\n{"step": 4, "loss": "nan", "time": "y", "eval": 3}\n{"step": 5',
    "config.yaml": b"\xff\xfe\x00",
    "lease.json": b"[]",
    "ranks/rank_00000.json": b"{}",
    "job/outcome.json": b"[1, 2]",
    "job/history.jsonl": b'{"event": "start", "job": "12", "task": "train", "time": "z", "restart": [], "host": {}}\n{"ev',
    "eval/knn.json": b'{"metrics": [], "target": 3}',
    "eval/linear.json": b'{"metrics": {"top1": "nan"}, "target": {"step": "x"}}',
    "checkpoints/step_00000005/trainer.json": b'{"steps": "many"}',
}


@pytest.mark.parametrize("kind", ["every", *DAMAGE])
def test_damaged_files(no_slurm: None, tmp_path: Path, kind: str):
    run = submitted(trained(tmp_path / "run", 10), "12")
    for name, raw in DAMAGE.items():
        if kind in ("every", name):
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(raw)
            os.utime(run / name, (0, 0))
            (run / name).with_name(f"{name.split('/')[-1]}.d").mkdir()
    found = one(run)
    assert found.state in ("queued", "failed") and found.restarts == 0
    assert found.step == (4 if kind in ("every", "metrics.jsonl") else 10)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False)).keys() == {
        "run", "state", "step", "steps", "restarts", "metrics", "host", "eta_s"
    }  # fmt: skip
    assert str(run) in status.table([found])


def test_a_damaged_submission_among_many(no_slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trained(tmp_path / "a", 100)
    (submitted(trained(tmp_path / "b", 40), "12") / "job" / "submission.json").write_text("{")
    trained(tmp_path / "c", 40)
    assert [found.state for found in describe([tmp_path])] == ["completed", "failed", "failed"]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "b/job/submission.json: cannot be read" in told[0]


# ------------------------------------------------------------------------------------------------------------ figures


def test_steps(tmp_path: Path):
    """Of the configuration; by epochs, of the newest checkpoint that tells; before training, of what was submitted."""
    run = tmp_path / "run"
    (run / "job").mkdir(parents=True)
    assert figures.total_steps(run) is None
    (run / "job" / "config.yaml").write_text("steps: 70\n")
    assert figures.total_steps(run) == 70
    trained(run, 10, steps=None)
    for step, text in ((10, '{"steps": 50}'), (20, '{"steps": 60}'), (30, "{")):
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(text)
    assert figures.total_steps(run) == 60
    trained(run, 10, steps=80)
    assert figures.total_steps(run) == 80


def test_stopped_early(no_slurm: None, tmp_path: Path):
    """Finished before its last step, if the newest checkpoint is of the newest step and says so."""
    run = trained(tmp_path / "run", 40)
    assert not figures.read(run).finished

    def saved(step: int, trainer: object) -> None:
        folder = run / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trainer.json").write_text(json.dumps(trainer))

    for told in ({"stopped": False}, {"stopped": "yes"}, {}, None, "stopped", [True]):
        saved(40, {"early_stop": told})
        assert not figures.read(run).finished, told
    saved(40, {"early_stop": {"stopped": True}})
    assert figures.read(run).finished and one(run).state == "completed"
    assert one(run).remarks == ("stopped early at step 40: its evaluations got no better",)
    trained(run, 41)  # somebody went on with more patience
    assert not figures.read(run).finished and one(run).state == "failed"


def test_time_left(tmp_path: Path):
    """By the pieces since the last start: neither a pause between two starts nor a long evaluation counts."""
    run = trained(tmp_path / "run", 40)
    assert figures.read(run).eta_s == 120
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[20:]:
        if "time" in line:
            line["time"] = 50_000 + line["step"] * 3
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert figures.read(run, since=50_000).eta_s == 180
    assert figures.read(run, since=50_110).eta_s == 120, "one stamp alone: by images a second"
    assert figures.read(trained(run, 40, steps=None)).eta_s is None
    assert figures.read(trained(run, 0)).eta_s is None
    assert figures.read(trained(run, 100)).eta_s == 0


def result(file: Path, step: int | None, **metrics: float) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"task": "x", "target": {"step": step} if step else {}, "metrics": metrics}))


def test_the_newest_figure_wins(tmp_path: Path):
    run = trained(tmp_path / "run", 40, eval={"knn_top1": 0.25, "knn_top1_k200": 0.5})
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 41, "loss": 1.5, "samples": 328}) + "\n")
    metrics = figures.read(run).metrics
    assert metrics == {"loss": 1.5, "img_per_s": 4.0, "knn_top1": 0.25, "knn_step": 40}
    result(run / "eval" / "step_00000030" / "knn.json", None, top1=0.1)
    assert figures.read(run).metrics["knn_top1"] == 0.25
    result(run / "eval" / "step_00000041" / "knn.json", None, top1=0.3)
    assert figures.read(run).metrics["knn_top1"] == 0.3
    result(run / "eval" / "knn.json", 20, top1=0.2)
    assert figures.read(run).metrics["knn_step"] == 41
    result(run / "eval" / "knn.json", None, top1=0.4, top5=0.9)
    result(run / "eval" / "knn_random.json", None, top1=0.01)
    result(run / "eval" / "linear.json", 40, top5=0.8, top1=0.6)
    result(run / "eval" / "segment.json", 40, miou=0.5)
    metrics = figures.read(run).metrics
    assert {k: v for k, v in metrics.items() if k not in ("loss", "img_per_s")} == {
        "knn_top1": 0.4, "knn_step": 41, "linear_top1": 0.6, "segment_miou": 0.5
    }  # fmt: skip


def test_what_tells_classes_comes_before_the_knn(tmp_path: Path):
    run = trained(tmp_path / "run", 40, eval={"top1": 0.75, "ece": 0.1, "knn_top1": 0.25})
    metrics = figures.read(run).metrics
    assert metrics["top1"] == 0.75 and metrics["top1_step"] == 40 and "ece" not in metrics
    shown = status.table(
        [row("a", step=50, metrics=metrics), row("b", metrics={"classify_top1": 0.5, "classify_step": 40})]
    )
    assert "75.0 % at 40 " in shown and "50.0 % " in shown and "k-NN" not in shown


def test_a_long_log_is_read_from_its_end(tmp_path: Path):
    """And one that a crash left with megabytes of zeros has the step of its last line."""
    run = trained(tmp_path / "run", 30, eval={"knn_top1": 0.5})
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": n, "loss": 1.0, "x": "y" * 200}) + "\n" for n in range(31, 5000))
    found = figures.read(run)
    assert found.step == 4999 and found.metrics["knn_step"] == 30
    with open(run / "metrics.jsonl", "ab") as raw:
        raw.write(bytes(1 << 18))
    assert figures.read(run).step == 4999


# ------------------------------------------------------------------------------------------------------- for people


def row(run: str, **values: Any) -> RunStatus:
    told: dict[str, Any] = {"state": "running", "step": 40, "steps": 100, "restarts": 2, "host": "n1", "eta_s": 3723.0}
    told |= {"metrics": {"img_per_s": 812.4, "knn_top1": 0.7134, "knn_step": 30}}
    return RunStatus(run=run, **{**told, **values})


def test_table():
    text = status.table(
        [row("runs/größer 走る"), row("b", state="failed", eta_s=None, metrics={}, steps=None, host=None)]
    )
    assert text.splitlines() == [
        "run               state      step      ETA  img/s              top-1  restarts  host",
        "runs/größer 走る  running  40/100  1:02:03    812  71.3 % k-NN at 30         2  n1",
        "b                 failed       40                                            2",
    ]
    assert "\x1b" not in status.table([row("a\x1b[31m\nb")]) and len(status.table([row("a\nb")]).splitlines()) == 2
    assert status.table([]) == "no runs here"


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch):
    """Names are cut at their beginning, so that each run keeps to its line."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "90")
    lines = status.table([row("/a/very/long/path/that/goes/on/" * 3 + "走る/seed=1"), row("b")]).splitlines()
    assert all(len(line) <= 90 for line in lines) and "…" in lines[1] and "走る/seed=1 " in lines[1]
    monkeypatch.setenv("COLUMNS", "65")
    lines = status.table([row("/a/very/long/path/to/seed=1"), row("b")]).splitlines()
    assert lines[0] == "run             state      step      ETA              top-1  host"
    assert all(len(line) <= 65 for line in lines)


def test_remarks_are_told_once():
    """Also of a sweep, whose jobs have a number each."""
    runs = [
        row(f"seed={n}", remarks=(f"knn (job 20_{n}) waits: Dependency", "waits: Priority")[: 1 + n]) for n in (0, 1)
    ]
    assert status.table([*runs, row("b", remarks=("waits: Priority",))]).splitlines()[-3:] == [
        "",
        "seed=0 and 1 more: knn (job 20) waits: Dependency",
        "seed=1 and 1 more: waits: Priority",
    ]
    failed = [row(f"s={n}", remarks=(f"knn (job 20_{n}) failed; its log: logs/20_{n}_0_log.out",)) for n in (0, 1)]
    assert status.table(failed).splitlines()[-1] == "s=0 and 1 more: knn (job 20) failed"
    assert status.table(runs[:1]).splitlines()[-1] == "seed=0: knn (job 20_0) waits: Dependency"


def test_that_slurm_does_not_answer_is_told(no_slurm: None, tmp_path: Path):
    """Where it makes a difference."""
    run = submitted(trained(tmp_path / "a", 40), "12")
    assert "Slurm does not answer" in status.table(describe([run]))
    done = submitted(trained(tmp_path / "b", 100), "13")
    assert "Slurm does not answer" not in status.table(describe([done]))


# ---------------------------------------------------------------------------------------------------- state, in words


def story(*events: dict[str, Any], outcome: dict[str, Any] | None = None) -> state.Story:
    return state.tell([{"job": "1", "task": "train", "restart": 0, **event} for event in events], "1", "train", outcome)


START, CRASH = {"event": "start"}, {"event": "requeue", "reason": "crash"}
SAVED = {"event": "end", "code": 75}


@pytest.mark.parametrize(
    ("info", "events", "finished", "expected"),
    [
        (JobInfo("PENDING"), [], False, "queued"),
        (JobInfo("PENDING", restarts=1), [START, SAVED], False, "preempted"),
        (JobInfo("PENDING", restarts=1), [START, CRASH], False, "queued"),
        (JobInfo("PENDING", restarts=2), [START, CRASH, {**START, "restart": 1}], False, "preempted"),
        (JobInfo("REQUEUE_HOLD", restarts=1), [START], False, "preempted"),
        (JobInfo("CONFIGURING"), [], False, "queued"),
        (JobInfo("RUNNING"), [START], True, "running"),
        (JobInfo("RUNNING"), [START, {"event": "cancel"}], False, "running"),
        (JobInfo("SUSPENDED"), [START], False, "preempted"),
        (JobInfo("PREEMPTED"), [START, SAVED], False, "preempted"),
        (JobInfo("COMPLETING", restarts=1), [START], False, "preempted"),
        (JobInfo("COMPLETING", restarts=0, reason="TimeLimit"), [START, SAVED], False, "preempted"),
        (JobInfo("COMPLETING", restarts=0), [START, {"event": "cancel"}, SAVED], False, "cancelled"),
        (JobInfo("COMPLETING", restarts=0), [START], False, "cancelled"),
        (JobInfo("COMPLETING", restarts=0), [START, {"event": "end", "code": 0}], True, "completed"),
        (JobInfo("COMPLETING", restarts=0, exit=(1, 0)), [START], False, "failed"),
        (JobInfo("COMPLETING", restarts=0, exit=(0, 15)), [START], False, "cancelled"),
        (JobInfo("COMPLETING", restarts=0, exit=(75, 0)), [START, SAVED], False, "cancelled"),
        (JobInfo("COMPLETED"), [START, {"event": "end", "code": 0}], False, "completed"),
        (JobInfo("COMPLETED"), [START], False, "failed"),
        (JobInfo("COMPLETED"), [START], True, "completed"),
        (JobInfo("CANCELLED"), [START], True, "cancelled"),
        (JobInfo("CANCELLED"), [START, {"event": "end", "code": 0}], True, "completed"),
        (JobInfo("FAILED"), [START, SAVED, {"event": "stop", "reason": "stop_at"}], False, "completed"),
        (JobInfo("FAILED"), [START, {"event": "stop", "reason": "crashes used up"}], False, "failed"),
        (JobInfo("FAILED"), [START, {"event": "cancel"}, {"event": "cancel refused"}], False, "failed"),
        *((JobInfo(word), [START], False, "failed") for word in sorted(asking.FAILED)),
    ],
)  # fmt: skip
def test_what_slurm_says(info: JobInfo, events: list[dict[str, Any]], finished: bool, expected: str):
    assert state.of_slurm(info, story(*events), finished) == expected


@pytest.mark.parametrize(
    ("events", "alive", "gone", "expected"),
    [
        ([], False, True, "cancelled"),
        ([START], False, True, "failed"),
        ([START, CRASH], False, True, "cancelled"),
        ([START, CRASH], False, False, "queued"),
        ([START, SAVED], True, False, "running"),
        ([START, SAVED], False, True, "failed"),
        ([START, CRASH, {"event": "stop", "reason": "not requeued"}], False, True, "failed"),
        ([START, SAVED, {"event": "stop", "reason": "stop_at"}], False, True, "completed"),
    ],
)
def test_what_the_folder_says(events: list[dict[str, Any]], alive: bool, gone: bool, expected: str):
    assert state.of_folder(story(*events), False, alive, gone) == expected


def test_every_start_begins_anew():
    cancelled = story(START, {"event": "cancel"}, {**START, "restart": 1})
    assert cancelled.over() is None and cancelled.restart == 1
    late = story(START, {**START, "restart": 1}, {"event": "end", "restart": 1, "code": 0}, {"event": "end", "code": 2})
    assert late.over() == "completed", "the last words of a start on a node that was lost"
    other = state.tell([{"event": "stop", "job": "2", "task": "train"}], "1", "train", {"job": "2", "code": 0})
    assert other.over() is None and other.last == "" and UNKNOWN.state == ""
