"""`selfsup cancel` on a real Slurm: what ends, what is written down, and what is said."""

import json
from pathlib import Path

import pytest

from selfsup.errors import UserError
from selfsup.launch import history, status
from selfsup.launch.cancel import cancel
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


def events(run: Path) -> list[str]:
    return [event["event"] for event in history.read(run)]


def state(slurm: Slurm, job: str) -> str:
    return slurm.job(job).get("JobState", "")


def one(run: Path) -> str:
    (found,) = status.describe([run])
    return found.state


@pytest.mark.parametrize("sacct", [True, False])
def test_a_run_and_its_evaluations(here: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], sacct: bool):
    here.reconfigure(sacct=sacct)
    job = here.submit(*QUIET, script=SLEEP)
    knn = here.submit(*QUIET, f"--dependency=afterok:{job}", script=SLEEP)
    other = here.submit(*QUIET, script=SLEEP)
    run = submitted(tmp_path / "run", job, then=[{"task": "knn", "job": knn}, {"task": "linear", "job": None}])
    happened(trained(run, 40), job, "start", restart=2)
    here.wait(job, "RUNNING")
    cancel(run)
    assert capsys.readouterr().out == f"{run}: cancelled training (job {job}), knn (job {knn})\n"
    assert one(run) == "cancelled", "also while Slurm is at it"
    here.wait(job, "CANCELLED")
    assert (state(here, knn), one(run)) == ("CANCELLED", "cancelled")
    here.wait(other, "RUNNING")
    last = history.read(run)[-1]
    assert (last["event"], last["job"], last["restart"], last["task"]) == ("cancel", job, 2, "train")

    cancel(run)
    assert capsys.readouterr().out == f"{run}: nothing to cancel, it is over: cancelled\n"
    assert events(run) == ["start", "cancel"]


def test_it_is_written_down_before_slurm_is_told(here: Slurm, tmp_path: Path):
    """The script of a job that is told to end asks the history whether it may go on."""
    run = tmp_path / "run"
    script = (
        f"#!/bin/bash\ntrap 'cp {run}/job/history.jsonl {run}/seen; exit 1' TERM\ntouch {run}/up\nsleep 600 & wait\n"
    )
    run.mkdir()
    job = here.submit(*QUIET, script=script)
    submitted(run, job)
    here.poll((run / "up").exists, 60, "it does not start")
    cancel(run)
    here.wait(job, "CANCELLED")
    here.poll((run / "seen").exists, 30, "the script was not told")
    assert [json.loads(line)["event"] for line in (run / "seen").read_text().splitlines()] == ["cancel"]


def test_one_run_of_a_sweep_then_all(here: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    array = here.submit(*QUIET, "--array=0-2%2", script=SLEEP)
    knn = here.submit(*QUIET, "--array=0-2", f"--dependency=aftercorr:{array}", script=SLEEP)
    table = here.submit(*QUIET, f"--dependency=afterany:{array}:{knn}", script=SLEEP)
    names = [f"seed={index}" for index in range(3)]
    then = [{"task": "knn", "job": knn}]
    sweep = submitted(tmp_path / "sweep", array, runs=names, sweep={"seed": [0, 1, 2]}, then=then, table=table)
    for index, name in enumerate(names):
        own = [{"task": "knn", "job": f"{knn}_{index}"}]
        submitted(sweep / name, f"{array}_{index}", index=index, part_of="..", then=own)
    for index in range(2):
        here.wait(f"{array}_{index}", "RUNNING")
    cancel(sweep / "seed=1")
    here.poll(lambda: one(sweep / "seed=1") == "cancelled", 60, "it is not cancelled")
    here.wait(f"{array}_2", "RUNNING")
    assert one(sweep / "seed=0") == "running" and state(here, table) == "PENDING"
    assert [events(sweep / name) for name in names] == [[], ["cancel"], []]
    capsys.readouterr()

    cancel(sweep)
    assert f"training (job {array}), knn (job {knn}), table (job {table})" in capsys.readouterr().out
    here.poll(lambda: {found.state for found in status.describe([sweep])} == {"cancelled"}, 60, "not all are cancelled")
    assert state(here, table) == "CANCELLED"
    assert [events(sweep / name) for name in names] == [["cancel"]] * 3
    cancel(sweep)
    assert capsys.readouterr().out == f"{sweep}: nothing to cancel, it is over: 3 cancelled\n"


def test_evaluations_of_a_run_that_is_done(here: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """They end; the run was and is completed."""
    job = here.submit(*QUIET, script="#!/bin/sh\nexit 0\n")
    knn = here.submit(*QUIET, f"--dependency=afterok:{job}", script=SLEEP)
    run = ended(happened(submitted(tmp_path / "run", job, then=[{"task": "knn", "job": knn}]), job, "start"), job, 0)
    here.wait(knn, "RUNNING")
    cancel(run)
    assert capsys.readouterr().out == f"{run}: cancelled knn (job {knn})\n"
    here.wait(knn, "CANCELLED")
    assert one(run) == "completed" and events(run) == ["start"]


def test_refused(here: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was written down is taken back: the job lives, and goes on when it is preempted."""
    job = here.submit(*QUIET, script=SLEEP)
    run = happened(trained(submitted(tmp_path / "run", job), 40), job, "start")
    here.wait(job, "RUNNING")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        with pytest.raises(UserError, match="scancel refuses: scancel is not found"):
            cancel(run)
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(_other_key(here, tmp_path)))
        with pytest.raises(UserError, match="scancel refuses: ") as refused:
            cancel(run)
    assert len(str(refused.value).splitlines()) == 1
    assert events(run) == ["start", *["cancel", "cancel refused"] * 2]
    here.command("scancel", job)
    here.wait(job, "CANCELLED")


def _other_key(slurm: Slurm, folder: Path) -> Path:
    """A configuration with which the controller is not reached."""
    text = slurm.conf.read_text().replace(str(slurm.folder / "munge" / "sock"), str(folder / "no-socket"))
    (folder / "slurm.conf").write_text(text)
    return folder / "slurm.conf"


def test_what_was_not_submitted(no_slurm: None, tmp_path: Path):
    with pytest.raises(UserError, match="was not submitted; a run of `selfsup train` is ended with Ctrl-C"):
        cancel(trained(tmp_path / "plain", 3))
    with pytest.raises(UserError, match="no such folder"):
        cancel(tmp_path / "none")
    with pytest.raises(UserError, match="no number yet"):
        cancel(submitted(tmp_path / "run", None))


def test_over_where_nobody_answers(no_slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = ended(happened(submitted(tmp_path / "run", "12"), "12", "start"), "12", 0)
    cancel(run)
    assert capsys.readouterr().out == f"{run}: nothing to cancel, it is over: completed\n"


def test_a_run_of_a_sweep_that_was_submitted_again(here: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Alone, it is no job of the array any more; the sweep's folder still stands for it."""
    array = here.submit(*QUIET, "--array=0-1", script=SLEEP)
    alone = here.submit(*QUIET, script=SLEEP)
    sweep = submitted(tmp_path / "sweep", array, runs=["seed=0", "seed=1"], sweep={"seed": [0, 1]})
    submitted(sweep / "seed=0", f"{array}_0", index=0, part_of="..")
    submitted(sweep / "seed=1", alone, part_of="..")
    here.wait(alone, "RUNNING")
    cancel(sweep)
    assert capsys.readouterr().out == f"{sweep}: cancelled training (job {array}), training (job {alone})\n"
    here.wait(alone, "CANCELLED")
    here.poll(lambda: {found.state for found in status.describe([sweep])} == {"cancelled"}, 60, "not all are cancelled")


# ------------------------------------------------------------------------------------------------- on this machine


def test_here(no_slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its supervisor is told, once; then it is over."""
    run = submitted(tmp_path / "run", "local-1", kind="local")
    happened(trained(run, 40), "local-1", "start")
    with Supervisor(run) as supervisor:
        cancel(run)
        assert supervisor.process.wait(30) == -15
    cancel(run)
    told = capsys.readouterr().out.splitlines()
    assert told == [f"{run}: cancelled training", f"{run}: nothing to cancel, it is over: cancelled"]
    assert events(run) == ["start", "cancel"] and one(run) == "cancelled"


def test_one_run_of_a_sweep_here(no_slurm: None, tmp_path: Path):
    """The supervisor, which runs the others as well, finds it in the history of that run."""
    sweep = submitted(tmp_path / "sweep", "local-1", kind="local", runs=["a", "b"], sweep={"seed": [0, 1]})
    for index, name in enumerate("ab"):
        submitted(sweep / name, f"local-1_{index}", kind="local", index=index, part_of="..")
    with Supervisor(sweep) as supervisor:
        cancel(sweep / "b")
        assert [found.state for found in status.describe([sweep])] == ["queued", "cancelled"]
        assert [events(sweep / name) for name in "ab"] == [[], ["cancel"]] and supervisor.process.poll() is None


def test_on_another_machine(no_slurm: None, tmp_path: Path):
    run = submitted(tmp_path / "run", "local-1", kind="local")
    process = {"host": "n7", "boot": "b", "pid_namespace": "p", "pid": 5, "started": 7}
    (run / "job" / "supervisor.json").write_text(json.dumps(process))
    with pytest.raises(UserError, match="is run on host n7, by process 5: cancel it there"):
        cancel(run)
    assert events(run) == ["cancel", "cancel refused"] and one(run) == "queued"
