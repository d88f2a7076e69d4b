"""Training on a real Slurm of two nodes: what clusters do to a job, and the same run bit for bit in the end."""

import contextlib
import json
import os
import re
import shutil
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfsup.launch import snapshot, submission
from tests.faults.lab import log
from tests.slurm.cluster import NODES, Slurm
from tests.slurm.runs import RANKS, STEPS, Run, Runs

BROKEN = """
from selfsup.methods.dino import DINO

class Broken(DINO):
    def forward(self, views, s):
        raise OSError("broken")
"""


@pytest.fixture(scope="session")
def _runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def runs(_runs: Runs, slurm: Slurm) -> Iterator[Runs]:
    """Submits to the cluster of this test."""
    _runs.slurm = slurm
    yield _runs
    _runs.slurm = None


def preempt(run: Run) -> None:
    """A job of higher priority takes both nodes until this one has given way and waits."""
    before = len(run.reasons())
    high = run.slurm.preempt()
    run.until(lambda: len(run.reasons()) > before, 60, "it does not give way")
    run.slurm.wait(high, "RUNNING", timeout=90)
    assert run.status()["state"] == "preempted"
    run.slurm.cancel(high)


@pytest.mark.systems(
    "SLURM through submitit: `submit` with evaluations and sweeps, preemption, requeue, `status`, `logs`, `cancel`; "
    "the same on one machine"
)
def test_submit_and_finish(runs: Runs):
    """Four ranks on two nodes: placed, logged, evaluated afterwards; as one process computes it, but for rounding."""
    run = runs.submit("first", "--then", "knn,linear")
    assert stat.S_IMODE(run.out.stat().st_mode) == 0o700
    run.ends("completed")
    told = submission.read(run.out)
    assert told is not None and [then.task for then in told.then] == ["knn", "linear"]
    for then in told.then:
        assert then.job is not None
        run.slurm.wait(then.job, "COMPLETED", timeout=90)
    status = run.status()
    assert status.keys() == {"run", "state", "step", "steps", "restarts", "metrics", "host", "eta_s"}
    assert (status["state"], status["step"], status["steps"], status["restarts"]) == ("completed", STEPS, STEPS, 0)
    knn = json.loads((run.out / "eval/knn.json").read_text())
    assert status["metrics"]["knn_top1"] == knn["metrics"]["top1"] and (run.out / "eval/linear.json").exists()
    first = run.log_of(0)
    for rank in range(4):
        assert re.search(rf"rank {rank}: {NODES[rank // 2]} cpu", first), first
    assert "done: " in runs.run("logs", str(run.out)).stdout or f"step {STEPS}/{STEPS}" in first

    alone = runs.undisturbed(ranks=())
    both = zip(log(run.out), log(alone), strict=True)
    assert max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in both if a["step"] <= 50) < 1e-3


def test_preemption(runs: Runs):
    """Twice: told by the signal of --signal, and by a bare SIGTERM."""
    run = runs.submit("preempted twice", "--then", "knn")
    run.starts(1)
    preempt(run)
    run.slurm.reconfigure(user_signal=False)
    run.starts(2)
    preempt(run)
    job = run.ends("completed")
    assert run.reasons() == ["preempted", "preempted"] and job["Restarts"] == "2"
    assert run.status()["restarts"] == 2
    saved = [event["step"] for event in run.events("end")]
    assert saved == [*(event["step"] for event in run.events("start")[1:]), STEPS], "no step was done twice"
    run.same_as(runs.undisturbed())
    told = submission.read(run.out)
    assert told is not None and told.then[0].job is not None
    run.slurm.wait(told.then[0].job, "COMPLETED", timeout=90)
    assert run.status()["metrics"]["knn_top1"] > 0


def test_requeue_by_someone_and_a_killed_rank(runs: Runs):
    """`scontrol requeue`; then kill -9 of one rank, which ends the others, and is a crash."""
    run = runs.submit("requeued")
    run.starts(1)
    run.slurm.command("scontrol", "requeue", run.job)
    run.starts(2)
    assert run.reasons() == [], "Slurm did it"
    run.checkpointed(more_than=run.events("start")[-1]["step"])
    os.kill(run.rank_pid(3), signal.SIGKILL)
    run.starts(3)
    assert run.reasons() == ["crash"]
    assert run.ends("completed")["Restarts"] == "2"
    run.same_as(runs.undisturbed())


@pytest.mark.parametrize("node", NODES)
def test_node_failure(runs: Runs, node: str):
    """kill -9 of a slurmd. To Slurm the node is lost, and its ranks live on: they must not disturb the next start."""
    runs.slurm.reconfigure(SlurmdTimeout=10)
    run = runs.submit(f"node {node} lost")
    run.starts(1)
    step, rank = run.checkpointed(), run.rank_pid(0)
    os.kill(rank, signal.SIGSTOP)  # until Slurm has noticed: it might be done by then
    run.slurm.kill_slurmd(node)
    run.until(lambda: int(run.slurm.job(run.job).get("Restarts", 0)) > 0, 120, "it is not requeued")
    with contextlib.suppress(ProcessLookupError):
        os.kill(rank, signal.SIGCONT)
    run.slurm.start_slurmd(node)
    run.starts(2)
    assert run.events("start")[-1]["step"] >= step
    run.ends("completed")
    assert run.status()["restarts"] >= 1
    run.same_as(runs.undisturbed())


def test_time_limit(runs: Runs):
    """A job of three minutes, told 30 s before the limit (Slurm may be a minute early), goes on in the next one."""
    late = 'setup=["[ -n \\"${SLURM_RESTART_COUNT-}\\" ] || sleep 60"]'
    run = runs.submit("limited", "time=3", "signal_before_s=30", late)
    run.starts(1, timeout=180)
    rank = run.rank_pid(0)
    os.kill(rank, signal.SIGSTOP)  # it might be done by then; Slurm continues whom it signals
    try:
        run.until(lambda: run.reasons(), 150, "it is not requeued")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGCONT)
    run.ends("completed")
    assert run.reasons() == ["time limit"]
    run.same_as(runs.undisturbed())


def test_cancelled(runs: Runs):
    """By scancel, and by `selfsup cancel`: saved, never requeued; `submit --resume` goes on with it."""
    run = runs.submit("cancelled", "--then", "knn")
    run.starts(1)
    run.slurm.cancel(run.job)
    run.ends("cancelled")
    assert run.reasons() == [] and run.events("stop")[-1]["reason"] == "cancelled"
    told = submission.read(run.out)
    assert told is not None and told.then[0].job is not None
    run.until(lambda: run.slurm.job(told.then[0].job)["JobState"] == "CANCELLED", 60, "its evaluation waits for ever")
    first = run.job
    saved = run.events("end")[-1]["step"]

    runs.submit("cancelled", "--resume")
    assert run.job != first
    run.starts(2)
    assert run.events("start")[-1]["step"] == saved
    assert str(run.out) in runs.run("cancel", str(run.out)).stdout
    run.ends("cancelled")
    runs.run("cancel", str(run.out))

    runs.submit("cancelled", "--resume")
    run.ends("completed")
    run.same_as(runs.undisturbed())


def test_a_user_error_is_not_tried_again(runs: Runs):
    """And a crash that nothing can mend is tried a bounded number of times."""
    shutil.copytree(runs.images, runs.folder / "leer", ignore=shutil.ignore_patterns("*.png"))
    run = runs.submit("wrong", f"data={runs.folder / 'leer'}", "--then", "knn")
    assert run.ends("failed")["Restarts"] == "0"
    assert run.events("stop")[-1]["reason"] == "user error"
    shown = runs.run("logs", str(run.out)).stdout
    assert "no image" in shown.lower() or "leer" in shown, shown

    (runs.folder / "kaputt.py").write_text(BROKEN)
    run = runs.submit(
        "crashing", "method=kaputt:Broken", *_method_options(runs.recipe), "requeue.crashes=2", "requeue.delay_s=0",
        ranks=("nodes=2",), env={"PYTHONPATH": str(runs.folder)},
    )  # fmt: skip
    job = run.ends("failed")
    assert job["Restarts"] == "2" and run.reasons() == ["crash", "crash"]
    assert run.events("stop")[-1]["reason"] == "crashes used up"
    assert run.log_of(0).count("broken") >= 3


def _method_options(recipe: Path) -> list[str]:
    from selfsup import config

    return [
        f"method.{key}={value}" for key, value in config.read_recipe(str(recipe))["method"].items() if key != "name"
    ]


def test_two_jobs_on_one_run_folder(runs: Runs):
    """The second is refused, at submission and, where someone gets around that, when it starts."""
    run = runs.submit("two jobs")
    refused = runs.run(
        "submit", str(runs.recipe), "--cluster", str(runs.cluster), "--out", str(run.out), "--resume", status=2
    )
    assert run.job in refused.stderr and "Traceback" not in refused.stderr
    run.starts(1)
    script = (run.out / "logs" / f"{run.job}_submission.sh").read_text()
    os.kill(run.rank_pid(0), signal.SIGSTOP)  # on a busy machine it would be done before the other one looks
    try:
        second = run.slurm.submit(script=script)
        run.until(lambda: run.slurm.job(second)["JobState"] == "FAILED", 120, "the second job is not refused")
    finally:
        os.kill(run.rank_pid(0), signal.SIGCONT)
    assert "in use by" in (run.out / "logs" / f"{second}_0_log.out").read_text()
    run.ends("completed")
    run.same_as(runs.undisturbed())


def test_sweep(runs: Runs):
    """An array with a run folder each, their evaluations, and a table at the end."""
    out = runs.folder / "sweep"
    runs.run(
        "submit", str(runs.recipe), "--cluster", str(runs.cluster), "--out", str(out), "--sweep", "lr=1e-3,5e-4",
        "--sweep", "seed=0,1", "steps=40", "--then", "knn",
    )  # fmt: skip
    told = submission.read(out)
    assert told is not None and told.table is not None and len(told.runs) == 4
    runs.slurm.wait(told.table, "COMPLETED", timeout=300)
    rows = json.loads((out / "sweep.json").read_text())
    assert len(rows) == 4 and all(row["state"] == "completed" for row in rows)
    found = json.loads(runs.run("status", str(out), "--json").stdout)
    assert [each["state"] for each in found] == ["completed"] * 4 and all(each["step"] == 40 for each in found)
    assert all("knn_top1" in each["metrics"] for each in found)
    first, other = (json.loads((out / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in told.runs[:2])
    assert first["loss"] != other["loss"]
    text = (out / "sweep.txt").read_text()
    assert "seed" in text and "0.0005" in text
    assert not list(out.glob("*/code")), "the snapshot is shared"


def test_without_sacct_and_after_slurm_forgot(runs: Runs):
    """squeue, scontrol, and then the run's own words: nothing waits for ever, nothing ended shows as running."""
    runs.slurm.reconfigure(sacct=False, MinJobAge=2)
    run = runs.submit("no sacct", "steps=400")
    assert run.status()["state"] in ("queued", "running")
    run.until(lambda: run.status()["state"] == "completed", 120, "never completed")
    run.until(lambda: not run.slurm.job(run.job), 120, "Slurm does not forget it")
    assert run.status()["state"] == "completed"
    other = runs.submit("no sacct, cancelled")
    other.starts(1)
    other.slurm.cancel(other.job)
    other.until(lambda: not other.slurm.job(other.job), 120, "Slurm does not forget it")
    assert other.status()["state"] == "cancelled"


def test_what_was_submitted_runs(runs: Runs, tmp_path: Path):
    """Code that is edited later does not change a run, nor one submitted from inside another job."""
    clone = tmp_path / "clone"
    snapshot.take(clone, None)
    code = clone / "code"
    inside = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "7", "SLURM_PROCID": "3", "RANK": "3", "WORLD_SIZE": "7"}
    inside |= {"SLURM_RESTART_COUNT": "5", "SLURM_CPUS_PER_TASK": "9", "SLURM_ARRAY_TASK_ID": "4"}
    run = runs.submit("edited", code=code, env=inside)
    (code / "selfsup" / "train.py").write_text("raise SystemExit('edited')\n")
    run.starts(1)
    run.slurm.command("scontrol", "requeue", run.job)
    run.ends("completed")
    run.same_as(runs.undisturbed())


def test_dry_run_is_what_is_submitted(runs: Runs):
    """And sbatch takes it."""
    out = runs.folder / "dry"
    given = ["submit", str(runs.recipe), "--cluster", str(runs.cluster), "--out", str(out), *RANKS, "--then", "knn"]
    shown = runs.run(*given, "sbatch.begin=now+1hour", "--dry-run")
    assert not out.exists()
    status, _, err = runs.slurm.try_command("sbatch", "--test-only", stdin=shown.stdout)
    assert status == 0, err
    runs.run(*given, "sbatch.begin=now+1hour")
    run = Run(runs, out)
    assert (out / "logs" / f"{run.job}_submission.sh").read_text() == shown.stdout
    assert run.status()["state"] == "queued"


def test_evaluations_beside_the_training(runs: Runs):
    """eval.as_jobs: a job for each, and its figure in the status."""
    run = runs.submit("beside", "eval.every=100", "eval.as_jobs=true")
    run.ends("completed")
    files = [run.out / "eval" / f"step_{step:08d}" / "knn.json" for step in (100, 200, 300)]
    run.until(lambda: all(file.exists() for file in files), 120, "not all were evaluated")
    assert run.status()["metrics"]["knn_top1"] == json.loads(files[-1].read_text())["metrics"]["top1"]
    run.same_as(runs.undisturbed())
