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
    final = root / f"step_{step:08d}"
    temporary = root / f"{_TEMPORARY}step_{step:08d}"
    error: BaseException | None = None
    try:
        if dist.is_main():
            root.mkdir(parents=True, exist_ok=True)
            clean(root)
            temporary.mkdir()
        dist.barrier()
        _save_tensors(state.rank, temporary / f"rank_{dist.rank():05d}.safetensors")
        if dist.is_main():
            _save_tensors(state.model, temporary / "model.safetensors")
            _save_tensors(state.optimizer, temporary / "optimizer.safetensors")
            (temporary / "trainer.json").write_text(json.dumps(dict(state.trainer), indent=1, sort_keys=True))
            fsync(temporary / "trainer.json")
    except (OSError, SafetensorError) as cause:
        needed = sum(t.nbytes for part in (state.model, state.optimizer, state.rank) for t in part.values())
        free = shutil.disk_usage(root if root.exists() else root.parent.parent).free
        error = UserError(
            f"checkpoint {final}: cannot be written: {cause}; "
            f"it needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free; earlier checkpoints are untouched"
        )
    dist.raise_together(error, f"saving {final.name}")
    if dist.is_main():
        _commit(root, temporary, final, keep_last)
    dist.barrier()
    return final


def _commit(root: Path, temporary: Path, final: Path, keep_last: int) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(temporary.iterdir())}
    manifest = {"format": FORMAT, "world_size": dist.world(), "torch": torch.__version__, "files": files}
    (temporary / "MANIFEST.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    fsync(temporary / "MANIFEST.json")
    fsync(temporary)
    if final.exists():  # a run that fell back past a damaged one writes it anew
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync(root)
    write_atomically(root / "latest", final.name + "\n")
    prune(root, keep_last)


def clean(root: Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in root.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under RUN/checkpoints, oldest first, valid or not."""
    if not root.is_dir():
        return []
    return sorted((int(m.group(1)), p) for p in root.iterdir() if (m := _NAME.match(p.name)) and p.is_dir())


def prune(root: Path, keep_last: int) -> None:
    """Delete old checkpoints so that `keep_last` stay that have their manifest."""
    complete = [path for _, path in steps(root) if (path / "MANIFEST.json").is_file()]
    for path in complete[:-keep_last]:
        shutil.rmtree(path)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after checking sizes and digests of all files; raises InvalidCheckpoint saying what is wrong."""
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        files = dict(manifest["files"])
        form = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCheckpoint(f"{folder}: no readable MANIFEST.json ({error})") from None
    if form > FORMAT:
        raise InvalidCheckpoint(f"{folder}: format {form} is newer than this version reads ({FORMAT})")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InvalidCheckpoint(f"{path}: missing")
        if path.stat().st_size != expected["bytes"]:
            raise InvalidCheckpoint(f"{path}: {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
        if sha256(path) != expected["sha256"]:
            raise InvalidCheckpoint(f"{path}: content differs from the manifest's sha256")
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
