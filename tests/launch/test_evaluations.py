"""Evaluations as jobs beside the training: the same figures as in it, once each, and no trouble for the training."""

import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selfsup import config as configuration
from selfsup import durable
from selfsup.backbones.export import export_timm
from selfsup.config import Config, dump
from selfsup.errors import UserError
from selfsup.eval.datasets import open_pair
from selfsup.eval.periodic import knn_callable
from selfsup.eval.settings import KnnSettings, resolve
from selfsup.eval.targets import Target
from selfsup.launch import snapshot, submission
from selfsup.launch.cluster import load
from selfsup.launch.evaluations import EvaluationJobs, as_jobs, settings
from selfsup.launch.submission import Submission
from selfsup.train import train
from tests.methods.tiny import cli, tiny_config, write_images
from tests.slurm.cluster import Slurm

ON_SLURM = ("partition=low", "time=20", "gpus_per_node=0", "cpus_per_task=1")


def submitted(run: Path, config: Config, kind: str = "local", **more: Any) -> None:
    """What `selfsup submit` leaves in a run folder, as far as evaluations read it."""
    (run / "job").mkdir(parents=True)
    cluster = load("slurm", ON_SLURM) if kind == "slurm" else load("local")
    values: dict[str, Any] = {"kind": kind, "cluster": cluster, "cluster_name": kind, "recipe": "recipe.yaml"}
    values |= {"submitted": "2026-01-31T12:00:00+00:00", "selfsup": "0", "code_sha256": "", "cwd": os.getcwd(), **more}
    submission.write(run, Submission(**values))
    (run / submission.CONFIG).write_text(dump(config))


def wait_for(found: Callable[[], Any], what: Callable[[], str], timeout: float = 120) -> Any:
    end = time.monotonic() + timeout
    while not (value := found()):
        assert time.monotonic() < end, what()
        time.sleep(0.05)
    return value


def result(run: Path, step: int) -> dict[str, Any]:
    """RUN/eval/step_N/knn.json once it is there."""
    file = run / "eval" / f"step_{step:08d}" / "knn.json"

    def logs() -> str:
        return "\n".join(f"--- {p}\n{p.read_text()[-3000:]}" for p in run.rglob("*.out"))

    wait_for(file.exists, logs)
    return json.loads(file.read_text())


def in_log(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval"] for line in lines if "eval" in line}


def plain(run: Path, kind: str = "local", export: Callable[[Any, Path], object] | None = None) -> EvaluationJobs:
    """The callable of a run whose configuration is the default, with evaluations that do nothing."""
    if not run.exists():
        cluster = load(kind, ["python=/bin/true", *(ON_SLURM if kind == "slurm" else ())])
        submitted(run, Config(), kind, cluster=cluster)
    return as_jobs(run, export or export_number)


def export_number(backbone: Any, folder: Path) -> None:
    """The backbone is a number in these."""
    folder.mkdir()
    (folder / "number").write_text(str(backbone))


# ---------------------------------------------------------------------------------------------------------- the figures


@pytest.mark.slow
def test_the_same_figures_as_during_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several k, from the snapshot of the code, in paths that are no easy ones; the training does not wait."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    where = tmp_path / "Läufe: 走る #1"
    images = write_images(where / "Bilder 'A'", 60, classes=3)
    labelled = write_images(where / "mehr: Bilder", 40, classes=3, seed=1)
    paths = {"data.path": images, "eval.train": images, "eval.val": labelled}
    config = tiny_config(
        "dino", *(f"{key}={json.dumps(str(path))}" for key, path in paths.items()),
        "eval.every=5", "eval.as_jobs=true", "eval.k=[5,1,3,20]", "eval.temperature=0.5", "eval.max_train=41", "seed=7",
    )  # fmt: skip
    run = where / "run"
    submitted(run, config)
    snapshot.take(run, config)
    beside, within = as_jobs(run, export_timm), knn_callable(config, run)

    def both(backbone: Any, step: int) -> dict[str, float]:
        assert beside(backbone, step) == {}
        return within(backbone, step)

    train(config, out=run, evaluate=both, quiet=True)
    beside.close()
    logged, hashes = in_log(run), set()
    assert list(logged) == [5, 10]
    for step, figures in logged.items():
        told = json.loads((run / "eval" / f"step_{step:08d}" / "job.json").read_text())
        assert told == {"job": told["job"], "step": step, "task": "knn"} and told["job"].startswith("local-")
        found = result(run, step)
        assert found["metrics"]["top1"] == figures["knn_top1"]
        names = {5: "knn_top1", 1: "knn_top1_k1", 3: "knn_top1_k3", 20: "knn_top1_k20"}
        assert {names[row["k"]]: row["top1"] for row in found["settings"]} == figures
        assert found["protocol"]["train_images"] == 41 and found["protocol"]["temperature"] == 0.5
        hashes.add(found["target"]["checkpoint_hash"])
        assert (run / "logs" / f"knn_step_{step:08d}.out").read_text()
    assert len(hashes) == 2
    assert len({tuple(figures.values()) for figures in logged.values()} | {(1.0,) * 4}) > 1  # figures that could differ
    assert not [p for p in run.rglob("*") if durable.TEMPORARY in p.name]


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize(
    "given",
    [
        [],
        ["data.val={val}"],
        ["eval.train={val}", "eval.max_train=7"],
        ["eval.train={other}", "eval.val={val}", "eval.max_train=null", "data.max_pixels=100000"],
        ["eval.train={other}", "data.val={val}", "data.value_range=[0,200]"],
        ["data=demo"],
    ],
    ids=lambda words: " ".join(words) or "split",
)
def test_the_same_images(tmp_path: Path, given: list[str], seed: int) -> None:
    """Whatever names them, cut and chosen alike."""
    folders = {
        name: write_images(tmp_path / name, 30, classes=3, seed=n) for n, name in enumerate(("a", "val", "other"))
    }
    words = [word.format(**folders) for word in given]
    config = tiny_config("dino", f"data={folders['a']}", f"seed={seed}", *words)
    values = {"k": [20], "max_train": config.eval.max_train, "seed": config.seed}  # as selfsup.eval.periodic has them
    during = configuration.validate(KnnSettings, values, where="eval")
    after = resolve("knn", settings(config, "knn"))
    cpu = torch.device("cpu")
    pairs = [
        open_pair(Target("", "run", None, "", cpu, None, config), during, channels=3),
        open_pair(Target("", "backbone", None, "", cpu), after, channels=3),
    ]
    assert pairs[0].protocol == pairs[1].protocol
    for key in ("value_range", "max_pixels"):
        assert getattr(pairs[0].train.source.config, key) == getattr(pairs[1].train.source.config, key)
    assert after.size == config.views.global_.size and after.workers == config.workers
    assert (
        isinstance(after, KnnSettings) and after.k == config.eval.k and after.temperature == (config.eval.temperature,)
    )


# ---------------------------------------------------------------------------------------------------------- submission


def test_a_step_is_submitted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By rank 0; not again by a later start that repeats the step; again when this one was rolled back."""
    run = tmp_path / "run"
    job, number = run / "eval/step_00000500/job.json", run / "eval/step_00000500/backbone/number"
    monkeypatch.setenv("RANK", "1")
    evaluate = plain(run)
    assert evaluate("1", 500) == {} and not (run / "eval").exists()

    monkeypatch.setenv("RANK", "0")
    first = plain(run)
    assert first("2", 500) == {}
    assert number.read_text() == "2"  # at once: the weights go on
    first.close()
    told = job.read_text()
    assert json.loads(told) | {"job": ""} == {"job": "", "step": 500, "task": "knn"}
    assert [p.name for p in job.parent.iterdir() if p.name.startswith(".")] == []

    later = plain(run)
    later("3", 500)
    later.close()
    assert (job.read_text(), number.read_text()) == (told, "2")

    first("4", 500)
    first.close()
    assert number.read_text() == "4" and json.loads(job.read_text())["job"] != json.loads(told)["job"]


def test_what_a_killed_start_left_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the export, or between the export and the submission."""
    folder = tmp_path / "run/eval/step_00000005"
    evaluate = plain(tmp_path / "run")
    for name in (".tmp-backbone", "backbone"):
        (folder / name).mkdir(parents=True)
        (folder / name / "half").write_text("x")
    evaluate("9", 5)
    evaluate.close()
    assert sorted(p.name for p in folder.iterdir() if p.name != "knn.json") == ["backbone", "job.json"]
    assert [p.name for p in (folder / "backbone").iterdir()] == ["number"]


def test_the_environment_of_an_evaluation_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no rank of the training, does not belong to its job, and outlives its session."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "SELFSUP_JOB": "1", "KEPT": "k"}.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    evaluate = plain(run)
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nenv > '{run}/found'; echo $$ $(cut -d' ' -f6 /proc/$$/stat) > '{run}/session'\n")
    script.chmod(0o700)
    cluster = load("local").model_copy(update={"python": str(script)})
    evaluate = EvaluationJobs(run, evaluate._told.model_copy(update={"cluster": cluster}), [], export_number, "knn")
    evaluate("1", 5)
    evaluate.close()
    session = wait_for(
        lambda: (run / "session").exists() and (run / "session").read_text().split(), lambda: "no session"
    )
    assert session[0] == session[1]
    found = dict(line.split("=", 1) for line in (run / "found").read_text().splitlines() if "=" in line)
    assert found["KEPT"] == "k" and found["PYTHONPATH"].split(":")[0] == str(run / "code")
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "SELFSUP_JOB"} & found.keys()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_no_sbatch_is_a_line_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    evaluate = plain(tmp_path / "run", "slurm")
    assert evaluate("1", 5) == {}
    evaluate.close()
    err = capfd.readouterr().err
    assert err.startswith("selfsup: step 5: its knn evaluation cannot be submitted: sbatch is not found")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run/eval/step_00000005/job.json").exists()


@pytest.mark.parametrize("error", [UserError("no\nroom"), OSError(28, "No space left on device")], ids=repr)
def test_an_export_that_fails_is_a_line_and_no_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fails(backbone: nn.Module, folder: Path) -> None:
        raise error

    evaluate = plain(tmp_path / "run", export=fails)
    assert evaluate("1", 5) == {}
    evaluate.close()
    err = capfd.readouterr().err
    assert "step 5: no knn evaluation: its backbone cannot be written" in err and len(err.splitlines()) == 1
    assert list((tmp_path / "run/eval/step_00000005").iterdir()) == []


def test_a_run_that_was_not_submitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.as_jobs=true: .* was not submitted"):
        as_jobs(tmp_path, export_timm)
    submitted(tmp_path / "run", Config())
    (tmp_path / "run" / submission.CONFIG).unlink()
    with pytest.raises(UserError, match=r"config\.yaml: cannot be read"):
        as_jobs(tmp_path / "run", export_timm)


# -------------------------------------------------------------------------------------------------------- a real Slurm


def test_evaluations_as_jobs_of_slurm(slurm: Slurm, tmp_path: Path) -> None:
    """Of two ranks that end by _exit, while sbatch still takes its time: the last step's evaluation is submitted, too."""
    images = write_images(tmp_path / "images", 40, classes=4)
    config = tiny_config("dino", f"data={images}", "eval.every=5", "eval.as_jobs=true", "eval.k=[3]", "device=cpu")
    run = tmp_path / "ein Lauf"
    submitted(run, config, "slurm")
    snapshot.take(run, config)
    (tmp_path / "recipe.yaml").write_text(dump(config))
    slow = tmp_path / "bin" / "sbatch"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nsleep 1.5\nexec {shutil.which("sbatch")} "$@"\n')
    slow.chmod(stat.S_IRWXU)
    env = slurm.env(PATH=f"{slow.parent}:{os.environ['PATH']}")
    done = cli("train", str(tmp_path / "recipe.yaml"), "--out", str(run), processes=2, env=env)
    assert done.returncode == 0, done.stderr
    told = [json.loads((run / "eval" / f"step_{step:08d}" / "job.json").read_text()) for step in (5, 10)]
    assert [(each["step"], each["task"]) for each in told] == [(5, "knn"), (10, "knn")]
    assert told[0]["job"] != told[1]["job"] and in_log(run) == {}
    for each in told:
        ended = slurm.wait(each["job"], "COMPLETED", timeout=120)
        assert (ended["NumNodes"], ended["NumTasks"]) == ("1", "1")
        assert "top1" in result(run, each["step"])["metrics"]
        assert list((run / "logs").glob(f"{each['job']}_*.out"))
    backbone = run / "eval" / "step_00000010" / "backbone" / "model.safetensors"
    assert backbone.read_bytes() == (run / "backbone" / "model.safetensors").read_bytes()
