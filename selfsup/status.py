"""Whether the checkpoints of a run are whole."""

from dataclasses import dataclass
from pathlib import Path

from selfsup import checkpoint
from selfsup.checkpoint import InvalidCheckpoint
from selfsup.errors import UserError


@dataclass(frozen=True)
class Checked:
    """One checkpoint after all its digests were computed."""

    folder: Path
    nbytes: int
    problem: str | None
    """What is wrong with it; None: it is whole."""


def _root(run: Path) -> Path:
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    return run / "checkpoints"


def verify(run: Path) -> list[Checked]:
    """Every checkpoint of a run, oldest first. Raises UserError if `run` is no run folder."""
    found = []
    for _, folder in checkpoint.steps(_root(run)):
        nbytes, problem = 0, None
        try:
            nbytes = sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
            checkpoint.verify(folder)
        except (InvalidCheckpoint, OSError) as error:
            problem = str(error)
        if folder.is_dir():  # else the run that goes on has pruned it meanwhile
            found.append(Checked(folder, nbytes, problem))
    return found
