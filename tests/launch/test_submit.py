"""Submission: what is written, what Slurm is told, and that a refusal leaves everything as it was.

On a real Slurm, whose jobs wait for their time to begin: nothing trains here.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from selfsup import config as configuration
from selfsup import methods
from selfsup.cli import EVALUATIONS
from selfsup.config import Config
from selfsup.errors import UserError
from selfsup.eval import settings
from selfsup.guard.lease import Lease
from selfsup.launch import plan, submission
from selfsup.launch.submission import Submission
from selfsup.launch.submit import _alone, submit
from tests.slurm.cluster import Slurm

HERE = ("partition=low", "time=20", "gpus_per_node=0", "cpus_per_task=1", "sbatch.begin=now+1hour")
"""What the test cluster has; nothing begins."""


def complete(config: Config) -> Config:
    return methods.complete(config)


def send(out: Path | None, *overrides: str, recipe: str = "demo", cluster: str = "slurm", **options: Any) -> None:
    """As the command line does."""
    here = HERE if cluster == "slurm" else ()
    known: dict[str, Any] = {"check": complete, "tasks": tuple(EVALUATIONS)}
    known["check_evaluation"] = lambda task, words: settings.resolve(task, words)
    submit(recipe, [*here, *overrides], cluster=cluster, out=out, **{**known, **options})


def refusal(out: Path | None, *overrides: str, **options: Any) -> str:
    """Two lines at most."""
    with pytest.raises(UserError) as caught:
        send(out, *overrides, **options)
    assert 0 < len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def told(run: Path) -> Submission:
    """What was submitted; it must be there."""
    found = submission.read(run)
    assert found is not None
    return found


def files(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Everything in a folder: modes and contents."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run folder that is not there, in a folder that is not there either."""
    return tmp_path / "Läufe von heute" / "走る & $HOME (#1)"


@pytest.fixture
def here(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """This process submits to the test cluster."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    return slurm


# ------------------------------------------------------------------------------------------------- without a Slurm


def test_evaluations_that_follow():
    checked = []

    def found(*words: str) -> list[tuple[str, tuple[str, ...]]]:
        given = plan.evaluations(words, ["knn", "linear"], lambda task, keys: checked.append((task, keys)))
        return [(then.task, then.overrides) for then in given]

    assert found() == []
    assert found("knn,linear") == found("knn", "linear") == [("knn", ()), ("linear", ())]
    assert found("linear", "knn k=10,20 'data=a b'") == [("linear", ()), ("knn", ("k=10,20", "data=a b"))]
    assert checked[-1] == ("knn", ["k=10,20", "data=a b"])


@pytest.mark.parametrize(
    ("then", "expected"),
    [
        (["kn"], "no evaluation 'kn'; did you mean knn?"),
        (["knn,linear k=3"], "no evaluation 'knn,linear'"),
        (["knn,"], "no evaluation ''"),
        ([""], "name evaluations"),
        (["knn", "linear,knn"], "knn is given twice"),
        (["knn 'k=3"], "No closing quotation"),
        (["knn kk=3"], "kk"),
        (["knn k=x"], "k="),
    ],
)
def test_evaluations_that_are_refused(then: list[str], expected: str, out: Path):
    assert expected in refusal(out, then=then)
    assert not out.exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["nodes=3"], "global_batch=32 is not divisible by accumulate=1 x 3 processes (nodes=3 x 1 tasks)"),
        (["nodes=2", "tasks_per_node=4", "accumulate=8"], "use a multiple of 64"),
        (["ndes=2"], "neither a recipe nor a cluster has a key 'ndes'; did you mean nodes?"),
        (["time=5"], "signal_before_s=300 is not within time=5"),
        (["method.out_dimm=3"], "method.out_dimm"),
        (["method=nowhere_at_all:M"], "cannot be imported"),
        (["seed=x"], "seed='x'"),
        (["evaluation.tme=3"], "did you mean evaluation.time?"),
    ],
)
def test_refusals(overrides: list[str], expected: str, out: Path):
    assert expected in refusal(out, *overrides)
    assert expected in refusal(out, *overrides, dry_run=True)
    assert not out.parent.exists()


def test_every_run_of_a_sweep_is_checked(out: Path):
    assert "run global_batch=33: global_batch=33 is not" in refusal(out, "nodes=2", sweep=["global_batch=32,33"])
    assert "run method.out_dim=-1: configuration: method.out_dim=-1" in refusal(out, sweep=["out_dim=16,-1"])
    assert "seed='x'" in refusal(out, sweep=["seed=1,x"])
    assert not out.parent.exists()


def test_folders_that_cannot_be(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")
    assert "cannot be made" in refusal(tmp_path / "file" / "run")
    assert "Slurm takes" in refusal(tmp_path / "a'b")
    assert "Slurm takes '\\n'" in refusal(tmp_path / "a\nb\nc\nd")
    assert refusal(tmp_path / ("x" * 300)).count("x" * 300) == 1
    assert "--resume needs --out" in refusal(None, resume=True)
    (tmp_path / "work" / "link").symlink_to(tmp_path.parent)
    assert refusal(Path("link/../../x%")).startswith(f"run folder {tmp_path.parent.parent.parent / 'x%'}/")
    assert {path.name for path in tmp_path.iterdir()} == {"work", "file"}


def test_without_slurm(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A dry run needs none and writes nothing; a submission says what is missing, and leaves nothing."""
    monkeypatch.setenv("PATH", "/nowhere")
    send(out, dry_run=True, then=["knn"], sweep=["seed=0,1"])
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert "sbatch is not found" in refusal(out)
    assert not out.parent.exists()


def test_default_folder(work: Path, capsys: pytest.CaptureFixture[str]):
    """runs/RECIPE, or the next that is free."""
    (work / "mine.yaml").write_text("steps: 3\n")
    for expected in ("demo", "demo-2", "demo-3"):
        send(None, dry_run=True)
        assert f"run folder: {work / 'runs' / expected}\n" in capsys.readouterr().err
        (work / "runs" / expected).mkdir(parents=True)
    send(None, dry_run=True, recipe="mine.yaml")
    assert f"run folder: {work / 'runs' / 'mine'}\n" in capsys.readouterr().err


def test_data_that_is_not_on_this_machine(out: Path, work: Path, capsys: pytest.CaptureFixture[str]):
    """Is only mentioned: nodes may have other disks."""
    (work / "da ist's").mkdir()
    given = ("data=da ist's", "eval.train=torchvision:CIFAR10:/x", "eval.val=/not/here")
    send(out, *given, then=["knn data=/nor/here", 'linear "data=da ist\'s"'], dry_run=True)
    said = capsys.readouterr().err
    assert "\nknn data=/nor/here: not on this machine" in said and "linear data" not in said
    assert f"eval.val=/not/here: not on this machine; the jobs must find it, from {work}" in said
    assert "data.path" not in said and "eval.train" not in said


def test_dry_run_shows_the_environment(out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    send(out, "nodes=2", "tasks_per_node=2", "env.A=b c", "ports=29500-29600", then=["knn k=10,20"], dry_run=True)
    shown = capsys.readouterr()
    assert "without CUDA_VISIBLE_DEVICES SLURM_JOB_ID\n" in shown.err
    assert "WORLD_SIZE=4 RANK=0..3 LOCAL_WORLD_SIZE=2 LOCAL_RANK=0..1 GROUP_RANK=0..1" in shown.err
    assert "29500-29600" in shown.err and "job eval" in shown.err and "knn k=10,20" in shown.err
    assert "#SBATCH --dependency=afterok:JOB\n" in shown.err and "#SBATCH --kill-on-invalid-dep=yes\n" in shown.err
    assert "export A='b c'\n" in shown.out and "dependency" not in shown.out


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_dry_run_on_this_machine(cluster: str, out: Path, capsys: pytest.CaptureFixture[str]):
    """The commands, one a line."""
    send(out, cluster=cluster, then=["knn"], sweep=["seed=0,1"], dry_run=True)
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split(" -m selfsup.cli ")[1].split(" ")[:2] for line in lines] == [
        ["job", "train"],
        ["job", "eval"],
        ["job", "table"],
    ]
    assert not out.parent.exists() and "run: seed=1\n" in shown.err


def test_a_folder_that_holds_a_run(out: Path):
    """Of `selfsup train`, or of a submission that has not begun; also one that would be a run of a sweep."""
    (out / "seed=1").mkdir(parents=True)
    (out / "seed=1" / "config.yaml").write_text(configuration.dump(configuration.load("demo")))
    before = files(out)
    assert "seed=1 already holds a run; add --resume" in refusal(out, sweep=["seed=0,1"])
    assert "already holds a run" in refusal(out / "seed=1")
    assert "already holds a run" in refusal(out / "seed=1", dry_run=True)
    assert files(out) == before


@pytest.mark.parametrize("name", ["code/thesis.py", "job/config.yaml"])
def test_a_folder_of_something_else(out: Path, name: str):
    """What a submission would replace there is not ours to replace."""
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    before = files(out)
    assert "name another folder" in refusal(out)
    assert "name another folder" in refusal(out, dry_run=True, resume=True, sweep=["seed=0,1"])
    assert files(out) == before


def test_resume_of_another_configuration(out: Path, capsys: pytest.CaptureFixture[str]):
    """What may not change is refused, in the words of training; what may is said."""
    out.mkdir(parents=True)
    trained = methods.complete(configuration.load("demo", ["steps=50"])).model_copy(update={"deterministic": True})
    (out / "config.yaml").write_text(configuration.dump(trained))
    before = files(out)
    assert "seed=1 differs from the run's 0" in refusal(out, "steps=50", "seed=1", resume=True)
    assert "method.out_dim=16 differs" in refusal(out, "steps=50", "method.out_dim=16", resume=True)
    unchecked = {"check": lambda config: None}
    assert "method.out_dim=16 differs" in refusal(out, "steps=50", "method.out_dim=16", resume=True, **unchecked)
    for options in ({}, unchecked):
        send(out, "steps=60", "workers=3", resume=True, dry_run=True, **options)
        assert "steps grows from 50 to 60" in capsys.readouterr().err
    assert files(out) == before


def test_resume_of_a_run_in_use(out: Path):
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(configuration.dump(methods.complete(configuration.load("demo"))))
    with Lease.acquire(out, say=print):
        assert f"is in use by process {os.getpid()}" in refusal(out, resume=True)


def test_two_submissions_at_once(out: Path):
    """The second is refused, and takes nothing of the first one's with it."""
    out.mkdir(parents=True)
    (out / "mark").write_text("")
    with _alone(out):
        assert "somebody is submitting to it" in refusal(out)
    assert (out / "mark").exists()


# -------------------------------------------------------------------------------------------------- on a real Slurm


def test_a_run(here: Slurm, out: Path, work: Path, capsys: pytest.CaptureFixture[str]):
    """What is shown is submitted; the files; the modes; the evaluations that wait for it."""
    given = ("nodes=2", "tasks_per_node=2", "data=Bilder (größer, 走る)", "steps=7", "evaluation.mem=1G")
    options: dict[str, Any] = {"then": ["knn k=10,20", "linear"]}
    send(out, *given, **options, dry_run=True)
    shown = capsys.readouterr().out
    assert not out.parent.exists()
    assert here.try_command("sbatch", "--test-only", stdin=shown)[0] == 0

    umask = os.umask(0o000)
    try:
        send(out, *given, **options)
    finally:
        os.umask(umask)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].startswith("next: selfsup status")
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {path.name for path in out.iterdir()} == {"job", "code", "logs"}
    found = told(out)
    assert found.job is not None and (found.kind, found.cluster_name, found.recipe) == ("slurm", "slurm", "demo")
    assert (found.runs, found.sweep, found.index, found.part_of, found.table) == ((".",), {}, None, None, None)
    assert found.cwd == str(work) and found.slurm_conf == str(here.conf) and len(found.code_sha256) == 64
    assert found.cluster.nodes == 2 and found.overrides == (*HERE, *given)
    assert (out / "logs" / f"{found.job}_submission.sh").read_text() == shown
    config = configuration.load(str(out / "job/config.yaml"))
    assert config == methods.complete(configuration.load("demo", ["data=Bilder (größer, 走る)", "steps=7"]))
    assert (out / "code/selfsup/launch/submit.py").is_file()

    job = here.job(found.job)
    assert (job["JobState"], job["NumNodes"], job["JobName"], job["WorkDir"]) == ("PENDING", "2-2", out.name, str(work))
    assert [then.task for then in found.then] == ["knn", "linear"]
    for then in found.then:
        assert then.job is not None
        waits = here.job(then.job)
        assert waits["Dependency"] == f"afterok:{found.job}(unfulfilled)" and waits["MinMemoryNode"] == "1G"
        assert (waits["NumNodes"], waits["NumTasks"], waits["JobName"]) == ("1-1", "1", f"{out.name} {then.task}")
    assert " knn k=10,20\n" in (out / "logs" / f"{found.then[0].job}_submission.sh").read_text()
    assert f"job {found.job}: training, in {out}\n" in said.out and f"selfsup logs '{out}' --follow" in said.out
    here.cancel(found.job)
    for then in found.then:
        here.wait(str(then.job), "CANCELLED")


def test_a_sweep(here: Slurm, out: Path, capsys: pytest.CaptureFixture[str]):
    options: dict[str, Any] = {"sweep": ["lr=1e-3,5e-4", "seed=0,1"], "then": ["knn"]}
    send(out, "array_parallelism=3", **options, dry_run=True)
    shown = capsys.readouterr().out
    assert here.try_command("sbatch", "--test-only", stdin=shown)[0] == 0
    send(out, "array_parallelism=3", **options)
    found = told(out)
    assert found.sweep == {"optimizer.lr": [0.001, 0.0005], "seed": [0, 1]}
    assert found.runs[1] == "optimizer.lr=0.001,seed=1" and len(found.runs) == 4
    assert {path.name for path in out.iterdir()} == {"job", "code", "logs", *found.runs}
    assert (out / "logs" / f"{found.job}_submission.sh").read_text() == shown
    assert here.job(f"{found.job}")["ArrayTaskThrottle"] == "3"
    evaluation, table = here.job(str(found.then[0].job)), here.job(str(found.table))
    # one a line: where its scheduler has looked at a dependency, Slurm shows a task apart from the others
    tasks = here.command("squeue", "--noheader", "--array", f"--jobs={found.then[0].job}", "--format=%K").split()
    assert sorted(tasks) == ["0", "1", "2", "3"] and evaluation["ArrayTaskThrottle"] == "3"
    assert evaluation["Dependency"] == f"aftercorr:{found.job}_*(unfulfilled)"
    assert table["Dependency"] == f"afterany:{found.job}_*(unfulfilled),afterany:{found.then[0].job}_*(unfulfilled)"
    for index, name in enumerate(found.runs):
        run = out / name
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        its = told(run)
        assert (its.job, its.index, its.part_of) == (f"{found.job}_{index}", index, "..")
        assert (run / its.code).resolve() == out / "code" and (run / its.logs).resolve() == out / "logs"
        assert its.then[0].job == f"{found.then[0].job}_{index}" and its.runs == (".",) and its.sweep == {}
        config = configuration.load(str(run / "job/config.yaml"))
        assert (config.optimizer.lr, config.seed) == ([0.001, 0.0005][index // 2], index % 2)
    assert "holds a sweep of 4 runs" in refusal(out, resume=True)
    assert f"its job {found.job} is PENDING" in refusal(out, "array_parallelism=3", resume=True, **options)
    alone = refusal(out / found.runs[2], "optimizer.lr=5e-4", "seed=0", resume=True)
    assert f"its job {found.job}_2 is PENDING" in alone


def test_a_run_of_a_sweep_that_goes_on_alone(here: Slurm, out: Path):
    """It is a run as any other then; the sweep as a whole waits for it as well."""
    send(out, sweep=["seed=0,1"])
    whole = told(out)
    here.cancel(str(whole.job))
    listed = ("squeue", "--noheader", f"--jobs={whole.job}")
    here.poll(lambda: not here.command(*listed), 30, "it is not cancelled")
    send(out / "seed=1", "seed=1", resume=True)
    alone = told(out / "seed=1")
    assert (alone.index, alone.part_of, alone.code, alone.logs) == (None, None, "code", "logs")
    assert (out / "seed=1/code/selfsup").is_dir() and told(out) == whole
    assert f"its job {alone.job} is PENDING" in refusal(out, resume=True, sweep=["seed=0,1"])


def test_refused_by_slurm(here: Slurm, out: Path, capsys: pytest.CaptureFixture[str]):
    """Nothing of it is left, not even the folders above. Slurm's words are told once."""
    assert "sbatch refuses the job: invalid partition specified" in refusal(out, "partition=nowhere")
    assert "sbatch" not in capsys.readouterr().err
    assert not out.parent.exists()
    assert "sbatch refuses" in refusal(out, "partition=nowhere", sweep=["seed=0,1"])
    assert not out.parent.exists()
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    before = files(out.parent)
    assert "sbatch refuses" in refusal(out, "partition=nowhere", sweep=["seed=0,1"], then=["knn"])
    assert files(out.parent) == before


def test_an_evaluation_that_is_refused(here: Slurm, out: Path, capsys: pytest.CaptureFixture[str]):
    """The training stays, and the other evaluations; it is said."""
    send(out, "evaluation.partition=nowhere", then=["knn"])
    said = capsys.readouterr().err
    assert "the evaluation knn will not follow" in said and "invalid partition" in said
    found = told(out)
    assert [then.job for then in found.then] == [None] and here.job(str(found.job))["JobState"] == "PENDING"


def test_resume(here: Slurm, out: Path, capsys: pytest.CaptureFixture[str]):
    """Not while the job waits; after it a new one takes its place; if Slurm refuses that, all is as it was."""
    send(out, "steps=50", then=["knn"])
    first = told(out)
    trained = methods.complete(configuration.load("demo", ["steps=50"]))
    (out / "config.yaml").write_text(configuration.dump(trained))
    (out / "metrics.jsonl").write_text("{}\n")
    before = files(out)
    assert f"already holds a run (job {first.job}); add --resume" in refusal(out, "steps=50")
    refused = refusal(out, "steps=50", resume=True)
    assert f"its job {first.job} is PENDING" in refused and f"selfsup cancel '{out}'" in refused
    here.cancel(str(first.job))
    here.wait(str(first.job), "CANCELLED")
    assert "seed=1 differs from the run's 0" in refusal(out, "steps=50", "seed=1", resume=True)
    assert "sbatch refuses" in refusal(out, "steps=60", "partition=nowhere", resume=True)
    assert files(out) == before

    out.chmod(0o750)
    (out / "code/selfsup/old.py").write_text("")
    capsys.readouterr()
    send(out, "steps=60", "nodes=2", resume=True)
    said = capsys.readouterr().err
    assert "steps grows from 50 to 60" in said and "2 processes, where there were 1: " in said
    second = told(out)
    assert second.job not in (None, first.job) and second.then == ()
    assert configuration.load(str(out / "job/config.yaml")).steps == 60
    assert not (out / "code/selfsup/old.py").exists() and (out / "metrics.jsonl").exists()
    assert stat.S_IMODE(out.stat().st_mode) == 0o750, "whoever made it chose that"
    assert not [path for path in out.rglob("*") if "tmp" in path.name]


def test_resume_of_what_never_was(here: Slurm, out: Path, capsys: pytest.CaptureFixture[str]):
    send(out, resume=True)
    assert "holds no run; it begins at step 0" in capsys.readouterr().err and told(out).job


def test_slurm_does_not_answer(
    here: Slurm, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Then it is not known whether the job has ended, which is said; and sbatch refuses in its turn."""
    send(out)
    before = json.loads((out / "job/submission.json").read_text())
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nowhere")
        assert "sbatch is not found" in refusal(out, resume=True)
    assert json.loads((out / "job/submission.json").read_text()) == before
    assert "whether job" in capsys.readouterr().err


def test_a_method_of_the_working_directory(here: Slurm, out: Path, work: Path):
    """It is found there to be checked, and copied for the jobs."""
    (work / "method_of_mine.py").write_text("from selfsup.methods.dino import DINO\n\nclass Mine(DINO):\n    pass\n")
    send(out, "method=method_of_mine:Mine")
    assert (out / "code/method_of_mine.py").read_bytes() == (work / "method_of_mine.py").read_bytes()
    assert configuration.load(str(out / "job/config.yaml")).method.name == "method_of_mine:Mine"
