"""Checkpoints: whatever is interrupted or damaged, the newest whole one is found, and nothing but tensors is read."""

import json
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import DataObject, booleans, data, integers, sampled_from
from torch import Tensor

from selfsup import checkpoint, durable
from selfsup.checkpoint import InvalidCheckpoint, Retention, State, load, newest_valid, verify
from selfsup.checkpoint_writer import Writer, save
from selfsup.errors import DiskError, UserError


def state(step: int) -> State:
    """Every type that is in use; values depend on the step."""
    weight = torch.arange(12.0).reshape(3, 4) + step
    return State(
        model={"student.w": weight, "teacher.w": weight.T, "half": weight[0].bfloat16(), "count": torch.tensor(step)},
        optimizer={"student.w|exp_avg": weight * 2, "student.w|step": torch.tensor(float(step))},
        rank={"rng.torch": torch.get_rng_state()},
        trainer={"step": step, "note": "ü", "nested": {"list": [1, 2.5, None]}},
    )


def same(a: State, b: State) -> bool:
    pairs = [(a.model, b.model), (a.optimizer, b.optimizer), (a.rank, b.rank)]
    return a.trainer == b.trainer and all(
        x.keys() == y.keys() and all(torch.equal(v, y[k]) and v.dtype == y[k].dtype for k, v in x.items())
        for x, y in pairs
    )


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def newest(root: Path) -> str | None:
    folder, _ = newest_valid(root)
    return folder.name if folder else None


# ------------------------------------------------------------------------------------------------------- what is written


def test_round_trip(tmp_path: Path) -> None:
    """Bits, types, shapes, JSON values; transposed and shared tensors too; nothing is pickled."""
    before = state(250)
    folder = save(tmp_path / "checkpoints", 250, before, Retention(2))
    assert folder.name == "step_00000250"
    assert names(folder) == [
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rank_00000.safetensors",
        "trainer.json",
    ]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == folder.name
    assert names(tmp_path / "checkpoints") == ["latest", folder.name]
    assert same(load(folder, 0), before)
    assert load(folder, 7).rank == {}
    for path in folder.iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        else:
            length = int.from_bytes(content[:8], "little")
            json.loads(content[8 : 8 + length])  # safetensors: a JSON header, then bytes


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, state(3), Retention(2))
    manifest = verify(folder)
    assert manifest["format"] == 1 and manifest["world_size"] == 1 and manifest["torch"] == torch.__version__
    assert set(manifest["files"]) == set(names(folder)) - {"MANIFEST.json"}
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (folder / name).stat().st_size
        assert entry["sha256"] == checkpoint.sha256(folder / name)


def test_same_state_same_bytes(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", 3, state(3)), save(tmp_path / "b", 3, state(3))
    assert all((a / n).read_bytes() == (b / n).read_bytes() for n in names(a))


def test_order_of_the_log_is_not_the_order_of_names(tmp_path: Path) -> None:
    """Steps are numbers: 100,000,000 comes after 99,999,999."""
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, state(1), Retention(5))
    assert newest(tmp_path) == "step_100000000"
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [99_999_999, 100_000_000]


# ----------------------------------------------------------------------------------------------------------- interrupted


class Killed(BaseException):
    """Stands for a kill: nothing may catch it and tidy up."""


CALLS = ("make_folder", "write", "fsync", "rename", "remove")


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException | None) -> list[str]:
    """Raise in place of the `at`-th call that changes the disk; returns the calls seen, in order."""
    seen: list[str] = []

    def wrap(name: str, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            if len(seen) == at + 1 and error is not None:
                raise error
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(durable, name, wrap(name, getattr(durable, name)))
    return seen


def count_calls(tmp_path: Path, previous: int = 2) -> list[str]:
    root = tmp_path / "count"
    for step in range(1, previous + 1):
        save(root, step, state(step), Retention(2))
    with pytest.MonkeyPatch.context() as patch:
        seen = interrupt(patch, -1, None)
        save(root, previous + 1, state(previous + 1), Retention(2))
    return seen


def test_kill_between_any_two_writes(tmp_path: Path) -> None:
    """For every call that changes the disk: the newest valid checkpoint is the old one, whole, or the new one, whole.

    Afterwards a save works, nothing temporary is left, and no valid checkpoint but the expected ones was lost.
    """
    calls = count_calls(tmp_path)
    assert calls.count("fsync") >= 7 and calls.count("write") >= 6 and set(CALLS) == set(calls)
    committed = calls.index("rename")
    for at in range(len(calls)):
        root = tmp_path / f"at{at}"
        for step in (1, 2):
            save(root, step, state(step), Retention(2))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            interrupt(patch, at, Killed())
            save(root, 3, state(3), Retention(2))
        folder, problems = newest_valid(root)
        expected = 2 if at <= committed else 3
        assert folder is not None and folder.name == f"step_{expected:08d}", (at, calls[at])
        assert same(load(folder, 0), state(expected)), (at, calls[at])
        assert problems == []
        assert (root / "latest").read_text().strip() in names(root), (at, calls[at])
        save(root, 4, state(4), Retention(2))
        assert newest(root) == "step_00000004"
        assert [n for n in names(root) if n.startswith(".")] == [], (at, calls[at])
        whole = [p.name for _, p in checkpoint.steps(root) if newest_valid_of(p)]
        assert whole == [f"step_{expected:08d}", "step_00000004"], (at, calls[at])


def newest_valid_of(folder: Path) -> bool:
    try:
        verify(folder)
        return True
    except InvalidCheckpoint:
        return False


def test_full_disk_at_any_write(tmp_path: Path) -> None:
    """An OSError at any point is told as the user's matter, the file named, and earlier checkpoints stay whole."""
    calls = count_calls(tmp_path)
    for at in range(len(calls)):
        root = tmp_path / f"at{at}"
        for step in (1, 2):
            save(root, step, state(step), Retention(2))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(DiskError, match=r"step_00000003.*No space left"):
            interrupt(patch, at, OSError(28, "No space left on device"))
            save(root, 3, state(3), Retention(2))
        folder, _ = newest_valid(root)
        assert folder is not None and load(folder, 0).trainer["step"] in (2, 3)
        assert same(load(folder, 0), state(load(folder, 0).trainer["step"]))


def test_files_are_synced_before_the_rename(tmp_path: Path) -> None:
    """Every file of the checkpoint, then its folder, then the rename, then the parent."""
    events: list[tuple[str, str]] = []
    real_fsync, real_rename = os.fsync, os.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda fd: (events.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), real_fsync(fd))[1]
        )
        patch.setattr(os, "replace", lambda a, b: (events.append(("rename", str(b))), real_rename(a, b))[1])
        folder = save(tmp_path, 1, state(1), Retention(2))
    renamed = events.index(("rename", str(folder)))
    synced = [Path(path) for kind, path in events[:renamed] if kind == "fsync"]
    assert {p.name for p in synced} >= set(names(folder))
    assert synced[-1].is_relative_to(tmp_path) and folder.name in synced[-1].name
    assert ("fsync", str(tmp_path)) in events[renamed:]


def test_stale_temporaries_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step_00000009").mkdir()
    (tmp_path / ".tmp-step_00000009" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-latest-123").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, 1, state(1), Retention(2))
    assert names(tmp_path) == ["latest", "notes.txt", "step_00000001"]


# --------------------------------------------------------------------------------------------------------------- damaged


FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "rank_00000.safetensors", "trainer.json"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink, lambda p: p.write_bytes(b"")])
def test_damaged_file_is_passed_over(tmp_path: Path, name: str, damage: Any) -> None:
    """Truncated, a bit flipped, gone, or empty: the one before it is found, and the fault is named."""
    for step in (1, 2):
        save(tmp_path, step, state(step), Retention(2))
    damage(tmp_path / "step_00000002" / name)
    folder, problems = newest_valid(tmp_path)
    if name == "MANIFEST.json" and folder is not None and folder.name == "step_00000002":
        assert same(load(folder, 0), state(2))  # a bit that means nothing, as one of torch's version
        return
    assert folder is not None and folder.name == "step_00000001"
    assert len(problems) == 1 and "step_00000002" in problems[0]
    assert name in problems[0] or name == "MANIFEST.json"  # a bit of a name makes another file missing


def test_any_flipped_bit_of_the_manifest(tmp_path: Path) -> None:
    """It is never an error of another kind, and never makes damaged files valid."""
    folder = save(tmp_path, 1, state(1), Retention(2))
    manifest = folder / "MANIFEST.json"
    good = manifest.read_bytes()
    failed = 0
    for position in range(len(good)):
        for bit in (0, 2, 7):
            content = bytearray(good)
            content[position] ^= 1 << bit
            manifest.write_bytes(content)
            try:
                verify(folder)
                assert same(load(folder, 0), state(1))
            except InvalidCheckpoint as error:
                assert str(folder) in str(error)
                failed += 1
    assert failed > len(good)  # sizes, digests and structure: most of it


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"format": 1, "files": []}', '{"format": 1, "files": {"a": 3}}',
                                     '{"format": "x", "files": {}}', '{"format": 99, "files": {}}',
                                     '{"format": 1, "files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}',
                                     '{"format": 1, "files": {}}'])  # fmt: skip
def test_strange_manifests(tmp_path: Path, content: str) -> None:
    """Whatever is in it, it is an invalid checkpoint and not a traceback. An empty list of files vouches for nothing."""
    for step in (1, 2):
        save(tmp_path, step, state(step), Retention(2))
    (tmp_path / "step_00000002" / "MANIFEST.json").write_text(content)
    assert newest(tmp_path) == "step_00000001"


def test_unreadable_bytes_are_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose bytes cannot be read (EIO on a bad disk) is passed over like one with wrong bytes."""
    for step in (1, 2):
        save(tmp_path, step, state(step), Retention(2))
    real = checkpoint.sha256

    def broken(path: Path) -> str:
        if path.parent.name == "step_00000002" and path.name == "model.safetensors":
            raise OSError(5, "Input/output error")
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256", broken)
    assert newest(tmp_path) == "step_00000001"


def test_nothing_there(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "none") == (None, [])
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_two").mkdir()
    (tmp_path / "latest").write_text("step_00000001\n")
    folder, problems = newest_valid(tmp_path)
    assert folder is None and len(problems) == 1


# --------------------------------------------------------------------------------------------------------------- pruning


def test_keeps_the_last_ones(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, state(step), Retention(2))
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [4, 5]


@pytest.mark.parametrize("keep_last", [1, 2])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_prune_counts_valid_ones_only(tmp_path: Path, keep_last: int, damage: Any) -> None:
    """A run fell back past a damaged checkpoint of a later step: the one it just wrote must not be pruned for it."""
    for step in (250, 500):
        save(tmp_path, step, state(step), Retention(5))
    damage(tmp_path / "step_00000500" / "model.safetensors")
    assert newest(tmp_path) == "step_00000250"
    written = save(tmp_path, 300, state(300), Retention(keep_last))
    assert newest(tmp_path) == "step_00000300"
    assert same(load(written, 0), state(300))
    save(tmp_path, 350, state(350), Retention(keep_last))
    assert newest(tmp_path) == "step_00000350"
    valid = [p.name for _, p in checkpoint.steps(tmp_path) if newest_valid_of(p)]
    assert len(valid) == keep_last


def test_a_damaged_one_is_written_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, state(step), Retention(2))
    truncate(tmp_path / "step_00000002" / "model.safetensors")
    save(tmp_path, 2, state(2), Retention(2))
    assert newest(tmp_path) == "step_00000002"


def test_damaged_ones_are_left_alone(tmp_path: Path) -> None:
    """Neither counted nor deleted: something in them may still be wanted, and they must not push out a whole one."""
    for step in (1, 2):
        save(tmp_path, step, state(step), Retention(2))
    (tmp_path / "step_00000001" / "MANIFEST.json").unlink()
    for step in (3, 4, 5):
        save(tmp_path, step, state(step), Retention(2))
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [1, 4, 5]


@pytest.mark.systems("Background checkpoints, retention, lease, hang report, spike rollback, replay of refused steps")
def test_keeps_round_steps_and_the_best(tmp_path: Path) -> None:
    figures = {2: 0.3, 3: 0.9, 5: 0.8, 7: 0.9, 8: 0.1}
    for step in range(1, 12):
        found = {"knn_top1": figures[step]} if step in figures else {}
        save(tmp_path, step, state(step), Retention(keep_last=1, keep_every=4, keep_best=2), found)
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [3, 4, 7, 8, 11]
    assert verify(tmp_path / "step_00000007")["figures"] == {"knn_top1": 0.9}


def test_the_best_are_those_of_the_classifier(tmp_path: Path) -> None:
    """Where there is one; k-NN is measured beside it."""
    for step, (top1, knn) in enumerate([(0.9, 0.1), (0.5, 0.9), (0.4, 0.8)], start=1):
        save(tmp_path, step, state(step), Retention(keep_last=1, keep_best=1), {"knn_top1": knn, "top1": top1})
    assert [s for s, _ in checkpoint.steps(tmp_path)] == [1, 3]


# -------------------------------------------------------------------------------------------------------- in the background


def hold(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writing waits until the event is set."""
    gate, real = threading.Event(), durable.write
    monkeypatch.setattr(durable, "write", lambda *args: (gate.wait(30), real(*args))[1])
    return gate


def test_a_step_waits_for_the_copy_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save` returns while nothing is written yet; what training changes afterwards is not in the checkpoint."""
    gate = hold(monkeypatch)
    writer = Writer(tmp_path, Retention(2))
    before, training = state(1), state(1)
    writer.save(1, training)
    assert newest(tmp_path) is None
    for tensors in (training.model, training.optimizer, training.rank):
        for tensor in tensors.values():
            tensor.zero_()
    training.trainer["nested"]["list"].clear()  # type: ignore[index]
    gate.set()
    writer.wait()
    assert newest(tmp_path) == "step_00000001" and same(load(tmp_path / "step_00000001", 0), before)


def test_the_next_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share their memory on the host: a second one must not change what the first is writing."""
    gate = hold(monkeypatch)
    writer = Writer(tmp_path, Retention(5))
    writer.save(1, state(1))
    threading.Timer(0.2, gate.set).start()
    for step in (2, 3):
        writer.save(step, state(step))
    writer.wait()
    for step in (1, 2, 3):
        assert same(load(tmp_path / f"step_{step:08d}", 0), state(step))


def test_a_failure_is_told_at_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path, Retention(2))
    writer.save(1, state(1))
    writer.wait()
    assert writer.failed() is None
    with monkeypatch.context() as patch:
        interrupt(patch, 3, OSError(28, "No space left on device"))
        writer.save(2, state(2))
        with pytest.raises(UserError, match="No space left"):
            writer.wait()
    assert "it needs 0.0 MB" in str(writer.failed())
    with pytest.raises(UserError, match="No space left"):  # and nothing more is begun
        writer.save(3, state(3))
    assert newest(tmp_path) == "step_00000001"


def test_no_commit_without_permission(tmp_path: Path) -> None:
    """A run folder that was taken over: what is there stays as it is."""
    save(tmp_path, 1, state(1))

    def refuse() -> None:
        raise UserError("taken over")

    writer = Writer(tmp_path, Retention(1))
    writer.save(2, state(2), may_commit=refuse)
    with pytest.raises(UserError, match="taken over"):
        writer.wait()
    assert newest(tmp_path) == "step_00000001"


def test_a_removed_run_folder_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is gone"):
        save(tmp_path / "run" / "checkpoints", 1, state(1))
    assert not (tmp_path / "run").exists()


@settings(max_examples=60, deadline=None)
@given(data())
def test_retention_never_deletes_the_last_valid_one(case: DataObject) -> None:
    """Whatever is kept, damaged, and saved in whatever order: what was just written is there, whole, afterwards."""
    retention = Retention(
        keep_last=case.draw(integers(1, 3)),
        keep_every=case.draw(sampled_from([None, 2])),
        keep_best=case.draw(integers(0, 2)),
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for _ in range(case.draw(integers(1, 6))):
            folders = [path for _, path in checkpoint.steps(root)]
            if folders and case.draw(booleans()):
                damage = case.draw(sampled_from([truncate, flip, Path.unlink]))
                target = case.draw(sampled_from(folders)) / case.draw(sampled_from(FILES))
                if target.is_file() and target.stat().st_size:
                    damage(target)
            valid = newest(root)
            step = (checkpoint.step_of(root / valid) if valid else 0) + case.draw(
                integers(1, 3)
            )  # as a resumed run does
            figures = {"knn_top1": case.draw(sampled_from([0.1, 0.2]))} if case.draw(booleans()) else {}
            before = {s for s, path in checkpoint.steps(root) if newest_valid_of(path) and s < step}
            save(root, step, state(step), retention, figures)
            after = {s for s, path in checkpoint.steps(root) if newest_valid_of(path)}
            assert step in after
            assert len(after & (before | {step})) >= min(retention.keep_last, len(before) + 1)


# ------------------------------------------------------------------------------------------------------- generators, text


def test_rng_state_round_trip() -> None:
    device = torch.device("cpu")
    torch.manual_seed(3)
    torch.rand(5)
    held: dict[str, Tensor] = checkpoint.rng_state(device)
    expected = torch.rand(5)
    torch.manual_seed(99)
    checkpoint.set_rng_state(held, device)
    assert torch.equal(torch.rand(5), expected)
    checkpoint.set_rng_state({}, device)  # a rank that had no file


def test_write_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader sees the old or the new text; a crash before the replacement leaves the old one."""
    path = tmp_path / "latest"
    durable.write_atomically(path, "old\n")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        interrupt(patch, 1, Killed())
        durable.write_atomically(path, "new\n")
    assert path.read_text() == "old\n"
    durable.write_atomically(path, "new\n")
    assert path.read_text() == "new\n"
