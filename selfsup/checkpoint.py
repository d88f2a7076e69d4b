"""Checkpoints that survive what happens to them: written aside, synced, renamed, and only then pointed at.

A checkpoint is a folder of safetensors and JSON:

    RUN/checkpoints/step_00000250/
        model.safetensors        the method: student, teacher, centre, every buffer
        optimizer.safetensors    'parameter name|key' -> tensor
        rank_00000.safetensors   what belongs to one rank: its random number generators
        trainer.json             step, samples, fingerprint of the data, versions, threads
        MANIFEST.json            format, figures of an evaluation, sizes and sha256 of the other files; written last
    RUN/checkpoints/latest       the name of the newest complete one

Commit order: every file is written into a temporary folder beside its final place and synced; the folder is synced; it
is renamed; the parent is synced; `latest` is replaced in the same way; the new one is read back; only then are old ones
pruned. `checkpoint_writer` does it, in a thread.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from selfsup import durable, tensorfile
from selfsup.durable import TEMPORARY
from selfsup.errors import UserError
from selfsup.wording import one_line

FORMAT = 1
_NAME = re.compile(r"step_(0[0-9]{7}|[1-9][0-9]{7,17})")  # as folder_of writes them, and nothing else


class InvalidCheckpoint(Exception):
    """A checkpoint that is incomplete or damaged; the message says how."""


class NewerFormat(InvalidCheckpoint):
    """A checkpoint that a later version wrote: not damaged, but not for this one."""


@dataclass(frozen=True)
class State:
    """Everything a resume needs. Tensors and plain JSON values only."""

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rank: Mapping[str, Tensor]
    trainer: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for part in (self.model, self.optimizer, self.rank) for t in part.values())


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the last ones, those of round steps, and those with the best figure."""

    keep_last: int = 2
    keep_every: int | None = None
    keep_best: int = 0
    best: tuple[str, ...] = ("top1", "knn_top1")
    """Figures to choose by: the first that any checkpoint has."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_of(root: Path, step: int) -> Path:
    """RUN/checkpoints/step_N."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder, from its name."""
    return int(folder.name.removeprefix("step_"))


def rank_file(rank: int) -> str:
    """The name of a rank's own file."""
    return f"rank_{rank:05d}.safetensors"


def steps(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint under RUN/checkpoints, oldest first, valid or not."""
    if not root.is_dir():
        return []
    return sorted((int(m.group(1)), p) for p in root.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir())


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after checking sizes and digests of all files; raises InvalidCheckpoint saying what is wrong."""
    return _check(folder, digests=True)


def _check(folder: Path, digests: bool) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        files = dict(manifest["files"])
        form = int(manifest["format"])
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
        if not {"model.safetensors", "optimizer.safetensors", "trainer.json"} <= expected.keys():
            raise KeyError("it does not list the files of a checkpoint")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InvalidCheckpoint(f"{folder}: no readable MANIFEST.json ({one_line(error)})") from None
    if form > FORMAT:
        raise NewerFormat(f"{folder}: format {form} is newer than this version reads ({FORMAT})")
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if Path(name).name != name or not path.is_file():
                raise InvalidCheckpoint(f"{folder}/{one_line(name)}: missing")
            if path.stat().st_size != size:
                raise InvalidCheckpoint(f"{path}: {path.stat().st_size} bytes, the manifest says {size}")
            if digests and sha256(path) != digest:
                raise InvalidCheckpoint(f"{path}: content differs from the manifest's sha256")
        except (OSError, ValueError) as error:  # ValueError: a NUL in a name
            raise InvalidCheckpoint(f"{folder}/{one_line(name)}: cannot be read: {one_line(error)}") from None
    return dict(manifest)


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """(newest checkpoint that verifies, or None; what was wrong with each newer one).

    Raises UserError for one in a newer format: going back past it would throw away what a later version did.
    """
    problems: list[str] = []
    for _, path in reversed(steps(root)):
        try:
            verify(path)
            return path, problems
        except NewerFormat as error:
            raise UserError(
                f"{error}; update selfsup, or remove that checkpoint to go on from an earlier one"
            ) from None
        except InvalidCheckpoint as error:
            problems.append(str(error))
    return None, problems


def load(folder: Path, rank: int) -> State:
    """Read a checkpoint that was verified. A rank that has no file of its own gets an empty `rank` part.

    Raises UserError for files that are what the manifest says, but not what a run writes.
    """
    own = folder / rank_file(rank)
    try:
        return State(
            model=tensorfile.read(folder / "model.safetensors"),
            optimizer=tensorfile.read(folder / "optimizer.safetensors"),
            rank=tensorfile.read(own) if own.is_file() else {},
            trainer=dict(json.loads((folder / "trainer.json").read_text())),
        )
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}: cannot be read: {one_line(error)}; remove it to go back") from None


def clean(root: Path) -> None:
    """Remove what an interrupted save left behind."""
    for path in sorted(root.glob(f"{TEMPORARY}*")):
        durable.remove(path)


def prune(root: Path, newest: int, retention: Retention, trusted: set[int]) -> None:
    """Delete whole checkpoints before step `newest`, which was just written and read back, that nothing asks to keep.

    Later ones are damaged (the run fell back past them). Damaged ones are neither counted nor deleted: counted, they
    would push out a whole one; and something may be left in them that somebody wants.
    trusted: steps whose digests need not be computed; those that are found right are added.
    """
    candidates = [(step, path) for step, path in steps(root) if step <= newest]
    if len(candidates) <= retention.keep_last:
        return
    whole = {step: manifest for step, path in candidates if (manifest := _whole(step, path, trusted))}
    keep = {newest, *sorted(whole)[-retention.keep_last :]}
    if retention.keep_every:
        keep |= {step for step in whole if step % retention.keep_every == 0}
    if retention.keep_best:
        figures = {step: manifest.get("figures") or {} for step, manifest in whole.items()}
        best = next((name for name in retention.best if any(name in f for f in figures.values())), "")
        ranked = sorted((f[best], step) for step, f in figures.items() if best in f)
        keep |= {step for _, step in ranked[-retention.keep_best :]}
    for step in sorted(whole.keys() - keep):
        path = folder_of(root, step)
        gone = root / f"{TEMPORARY}pruned-{path.name}"
        durable.rename(path, gone)  # so that no half of it is ever taken for a checkpoint
        durable.remove(gone)


def _whole(step: int, folder: Path, trusted: set[int]) -> dict[str, Any] | None:
    """The manifest of a checkpoint that is not damaged. Of a trusted one only names and sizes are looked at."""
    try:
        manifest = _check(folder, digests=step not in trusted)
    except InvalidCheckpoint:
        return None
    trusted.add(step)
    return manifest


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
