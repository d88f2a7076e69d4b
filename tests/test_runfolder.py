"""A run folder: who may write into it, what a resume may change, and a config.yaml that is a recipe."""

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from selfsup import methods, runfolder, runtime
from selfsup.config import Config, load
from selfsup.errors import UserError
from selfsup.guard.processes import Process


def resolved(*overrides: str) -> Config:
    return methods.complete(runtime.resolve(load(None, ["device=cpu", "precision=fp32", "steps=100", *overrides])))


# ----------------------------------------------------------------------------------------------------------------- claim


def test_makes_the_folder(tmp_path: Path) -> None:
    for _ in range(2):  # an empty one, or one whose run never began, is fine
        with runfolder.claim(tmp_path / "a" / "b", resume=False):
            pass
    assert [p for p in (tmp_path / "a" / "b").iterdir() if not p.name.startswith(".lease")] == []


def test_refuses_a_folder_with_a_run(tmp_path: Path) -> None:
    runfolder.write_config(tmp_path, resolved())
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=rf"{tmp_path} already holds a run; add --resume"):
        runfolder.claim(tmp_path, resume=False)
    assert sorted(tmp_path.iterdir()) == before
    with runfolder.claim(tmp_path, resume=True):
        pass


def test_refuses_a_folder_in_use(tmp_path: Path) -> None:
    """Whether it is asked to resume or not, it says who is there, and the other one keeps it."""
    with runfolder.claim(tmp_path, resume=False) as held:
        runfolder.write_config(tmp_path, resolved())
        for resume in (False, True):
            with pytest.raises(UserError, match=rf"{tmp_path}.* in use by .*{os.getpid()}"):
                runfolder.claim(tmp_path, resume)
        held.check()


def test_cleans_what_a_kill_left(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".tmp-step_00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".tmp-step_00000005" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-config.yaml-123").write_text("half")
    (tmp_path / "mine.tmp").write_text("x")
    with runfolder.claim(tmp_path, resume=True):
        pass
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith(".lease")} == {"checkpoints", "mine.tmp"}
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_refuses_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(UserError, match="is a file"):
        runfolder.claim(path, resume=False)
    with pytest.raises(UserError, match="below: cannot be written"):
        runfolder.claim(path / "below", resume=False)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that may not even be looked into. (Root may do everything: the system calls say what a user would see.)"""
    real = os.stat

    def stat(path, *args, **kwargs):
        if "secret" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(UserError, match=r"secret.*Permission denied"):
        runfolder.claim(tmp_path / "secret" / "run", resume=False)
    with pytest.raises(UserError, match=r"secret.*Permission denied"):
        runfolder.stored_config(tmp_path / "secret" / "run")


def test_not_writable() -> None:
    """/proc takes no folders, whoever asks."""
    with pytest.raises(UserError, match=r"/proc/selfsup_run: cannot be written"):
        runfolder.claim(Path("/proc/selfsup_run"), resume=False)


# ---------------------------------------------------------------------------------------------------------- config.yaml


def test_config_is_a_recipe(tmp_path: Path) -> None:
    config = resolved("method.out_dim=99", "backbone.depth=2", "data=X", "data.val=Y")
    runfolder.write_config(tmp_path, config)
    assert runfolder.stored_config(tmp_path) == config
    again = load(str(tmp_path / "config.yaml"))
    assert again == config and methods.complete(runtime.resolve(again)) == config
    assert runfolder.check_resume(methods.complete(again), config) == []
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_stored_config_that_cannot_be_read(tmp_path: Path) -> None:
    assert runfolder.stored_config(tmp_path) is None
    path = tmp_path / "config.yaml"
    for content in (b"a: [\n", b"- list\n", b"steps: many\n", b"stepz: 3\n", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            runfolder.stored_config(tmp_path)


# ----------------------------------------------------------------------------------------------------- what may change


@pytest.mark.parametrize(
    "change",
    [
        "workers=7",
        "checkpoint.every=3",
        "checkpoint.keep_last=9",
        "eval.every=5",
        "eval.train=T",
        "eval.k=[1]",
        "stop_at=50",
    ],
)
def test_free_changes(change: str) -> None:
    assert runfolder.check_resume(resolved(change), resolved()) == []


@pytest.mark.parametrize(
    "change, key",
    [
        ("seed=1", "seed"),
        ("global_batch=32", "global_batch"),
        ("optimizer.lr=0.1", "optimizer.lr"),
        ("data=elsewhere", "data.path"),
        ("backbone=resnet18", "backbone.name"),
        ("backbone.depth=3", "backbone.depth"),
        ("method.out_dim=3", "method.out_dim"),
        ("precision=bf16", "precision"),
        ("threads=63", "threads"),
        ("deterministic=false", "deterministic"),
        ("views.local.count=2", "views.local.count"),
        ("views.global.blur=[0.5, 0.5]", "views.global.blur"),
        ("steps=99", "steps"),
        ("epochs=3", "epochs"),
    ],
)
def test_refused_changes(change: str, key: str) -> None:
    with pytest.raises(UserError) as caught:
        runfolder.check_resume(resolved(change) if "epochs" not in change else grown(change), resolved())
    assert key in str(caught.value) and len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    "change, key",
    [
        ("spike.max_rollbacks=5", "spike.max_rollbacks"),
        ("accumulate=2", "accumulate"),
        ("grad_checkpointing=true", "grad_checkpointing"),
        ("max_nonfinite=50", "max_nonfinite"),
        ("data.max_bad_fraction=0.5", "data.max_bad_fraction"),
    ],
)
def test_what_messages_advise_is_announced(change: str, key: str) -> None:
    """Out of memory: 'try accumulate=2'. A resume that refused it would leave nothing but a new run."""
    (note,) = runfolder.check_resume(resolved(change), resolved())
    assert note.startswith(f"{key} changes from ")


def grown(change: str) -> Config:
    return methods.complete(runtime.resolve(load(None, ["device=cpu", "precision=fp32", change])))


def test_a_longer_run_is_announced() -> None:
    notes = runfolder.check_resume(resolved("steps=200"), resolved())
    assert len(notes) == 1 and "steps" in notes[0] and "100" in notes[0] and "200" in notes[0]
    epochs = [grown("epochs=3"), grown("epochs=2")]
    assert len(runfolder.check_resume(*epochs)) == 1


def test_auto_means_what_the_run_used() -> None:
    """A resume that says nothing takes over precision, device, determinism and threads of the run."""
    stored = resolved("precision=bf16", "threads=3", "deterministic=false")
    asked = load(None, ["steps=100"])
    adopted = runfolder.adopt(asked, stored)
    assert (adopted.precision, adopted.device, adopted.threads, adopted.deterministic) == ("bf16", "cpu", 3, False)
    assert runfolder.check_resume(methods.complete(runtime.resolve(adopted)), stored) == []
    said = runfolder.adopt(load(None, ["steps=100", "threads=2", "precision=fp32"]), stored)
    assert (said.threads, said.precision) == (2, "fp32")


def test_a_run_that_ended_while_its_lease_was_watched(tmp_path: Path) -> None:
    """A fresh start waits for another host's lease; when it gets the folder there is a run in it: it must stay."""
    elsewhere = {**asdict(Process.current()), "boot": "another", "token": "x"}
    (tmp_path / "lease.json").write_text(json.dumps(elsewhere))

    def end() -> None:
        runfolder.write_config(tmp_path, resolved())
        (tmp_path / "lease.json").unlink()

    timer = threading.Timer(1.0, end)
    timer.start()
    with pytest.raises(UserError, match="already holds a run"):
        runfolder.claim(tmp_path, resume=False)
    timer.join()
    assert not (tmp_path / "lease.json").exists()
    runfolder.claim(tmp_path, resume=True).release()


def test_a_name_that_could_not_be_resumed(tmp_path: Path) -> None:
    """safetensors opens no file whose path is not UTF-8: said before the first step and not at the resume."""
    with pytest.raises(UserError, match="not UTF-8"):
        runfolder.claim(tmp_path / "a\udcff", resume=False)
    assert list(tmp_path.iterdir()) == []
