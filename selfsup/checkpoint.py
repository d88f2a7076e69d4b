"""Checkpoints that survive what happens to them: written aside, verified, renamed, and only then pointed at.

A checkpoint is a folder of safetensors and JSON:

    RUN/checkpoints/step_00000250/
        model.safetensors        the method: student, teacher, centre, every buffer
        optimizer.safetensors    'parameter name|key' -> tensor
        rank_00000.safetensors   what belongs to one rank: its random number generators and unsynchronised buffers
        trainer.json             step, samples, fingerprint of the data, versions, threads
        MANIFEST.json            format, sizes and sha256 of the other files; written last
    RUN/checkpoints/latest       the name of the newest complete one

Commit order: every file is written under a temporary name in the same directory and synced; the folder is synced; it is
renamed; the parent is synced; `latest` is replaced in the same way; only then are old ones pruned.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfsup import dist
from selfsup.errors import UserError

FORMAT = 1
_NAME = re.compile(r"^step_(\d{8,})$")
_TEMPORARY = ".tmp-"


class InvalidCheckpoint(Exception):
    """A checkpoint that is incomplete or damaged; the message says how."""


@dataclass(frozen=True)
class State:
    """Everything a resume needs. Tensors and plain JSON values only."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rank: Mapping[str, Tensor]
    trainer: Mapping[str, Any]


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old or the new text and nothing else."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    # clones: safetensors refuses tensors that share memory, and a caller's views may
    save_file({k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}, path)
    fsync(path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def save(root: Path, step: int, state: State, keep_last: int) -> Path:
    """Write RUN/checkpoints/step_N; every rank calls it, with the same step. Returns the folder.

    Raises UserError when the disk is full or not writable: earlier checkpoints are untouched then.
    """
    final = folder_of(root, step)
    temporary = root / f"{_TEMPORARY}step_{step:08d}"
    error: BaseException | None = None
    try:
        if dist.is_main():
            root.mkdir(parents=True, exist_ok=True)
            clean(root)
            temporary.mkdir()
    except OSError as cause:
        error = _unwritable(root, final, state, cause)
    dist.raise_together(error, f"saving {final.name}")  # also the barrier after which the others may write
    try:
        _save_tensors(state.rank, temporary / f"rank_{dist.rank():05d}.safetensors")
        if dist.is_main():
            _save_tensors(state.model, temporary / "model.safetensors")
            _save_tensors(state.optimizer, temporary / "optimizer.safetensors")
            (temporary / "trainer.json").write_text(json.dumps(dict(state.trainer), indent=1, sort_keys=True))
            fsync(temporary / "trainer.json")
    except (OSError, SafetensorError) as cause:
        error = _unwritable(root, final, state, cause)
    dist.raise_together(error, f"saving {final.name}")
    try:
        if dist.is_main():
            _commit(root, temporary, final, keep_last)
    except OSError as cause:
        error = _unwritable(root, final, state, cause)
    dist.raise_together(error, f"saving {final.name}")
    return final


def _unwritable(root: Path, final: Path, state: State, cause: BaseException) -> UserError:
    needed = sum(t.nbytes for part in (state.model, state.optimizer, state.rank) for t in part.values())
    there = next(p for p in (root, *root.absolute().parents) if p.exists())
    return UserError(
        f"checkpoint {final}: cannot be written: {cause}; it needs {needed / 1e6:.0f} MB and "
        f"{shutil.disk_usage(there).free / 1e6:.0f} MB are free; earlier checkpoints are untouched"
    )


def _commit(root: Path, temporary: Path, final: Path, keep_last: int) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(temporary.iterdir())}
    manifest = {"format": FORMAT, "world_size": dist.world(), "torch": torch.__version__, "files": files}
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    fsync(temporary / "MANIFEST.json")
    fsync(temporary)
    if final.exists():  # a run that fell back past a damaged one writes it anew
        os.rename(final, root / f"{_TEMPORARY}damaged-{final.name}")
    os.rename(temporary, final)
    fsync(root)
    write_atomically(root / "latest", final.name + "\n")
    clean(root)
    prune(root, step_of(final), keep_last)


def folder_of(root: Path, step: int) -> Path:
    """RUN/checkpoints/step_N."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    return int(folder.name.removeprefix("step_"))


def clean(root: Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under RUN/checkpoints, oldest first, valid or not."""
    if not root.is_dir():
        return []
    return sorted((int(m.group(1)), p) for p in root.iterdir() if (m := _NAME.match(p.name)) and p.is_dir())


def prune(root: Path, newest: int, keep_last: int) -> None:
    """Delete all but the last `keep_last` checkpoints up to step `newest`, which was just written.

    Later ones are damaged (the run fell back past them): they are not counted, so that they never push out a valid one.
    A folder without its manifest is what an interrupted deletion left.
    """
    earlier = [path for step, path in steps(root) if step <= newest]
    complete = [path for path in earlier if (path / "MANIFEST.json").is_file()]
    for path in {*earlier} - {*complete[-keep_last:]}:
        shutil.rmtree(path)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after checking sizes and digests of all files; raises InvalidCheckpoint saying what is wrong."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        files = dict(manifest["files"])
        form = int(manifest["format"])
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
        if not {"model.safetensors", "optimizer.safetensors", "trainer.json"} <= expected.keys():
            raise KeyError("it does not list the files of a checkpoint")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"{folder}: no readable MANIFEST.json ({error})") from None
    if form > FORMAT:
        raise InvalidCheckpoint(f"{folder}: format {form} is newer than this version reads ({FORMAT})")
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if Path(name).name != name or not path.is_file():
                raise InvalidCheckpoint(f"{path}: missing")
            if path.stat().st_size != size:
                raise InvalidCheckpoint(f"{path}: {path.stat().st_size} bytes, the manifest says {size}")
            if sha256(path) != digest:
                raise InvalidCheckpoint(f"{path}: content differs from the manifest's sha256")
        except (OSError, ValueError) as error:  # ValueError: a NUL in a name
            raise InvalidCheckpoint(f"{path}: cannot be read: {error}") from None
    return dict(manifest)


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """(newest checkpoint that verifies, or None; what was wrong with each newer one)."""
    problems: list[str] = []
    for _, path in reversed(steps(root)):
        try:
            verify(path)
            return path, problems
        except InvalidCheckpoint as error:
            problems.append(str(error))
    return None, problems


def load(folder: Path, rank: int) -> State:
    """Read a checkpoint that was verified. A rank that has no file of its own gets an empty `rank` part."""
    own = folder / f"rank_{rank:05d}.safetensors"
    return State(
        model=_load_tensors(folder / "model.safetensors"),
        optimizer=_load_tensors(folder / "optimizer.safetensors"),
        rank=_load_tensors(own) if own.is_file() else {},
        trainer=json.loads((folder / "trainer.json").read_text()),
    )


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """torch's generators. Nothing of ours draws from them; a user's data set or method may."""
    state = {"rng.torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Undo `rng_state`."""
    if "rng.torch" in state:
        torch.set_rng_state(state["rng.torch"])
    if "rng.cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["rng.cuda"], device)
