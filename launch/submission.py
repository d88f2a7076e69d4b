"""RUN/job/submission.json: what was submitted, where it runs, and under which number."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from selfsup import config, durable
from selfsup.config import Section
from selfsup.errors import UserError

from .cluster import Cluster

FILE = "job/submission.json"
CONFIG = "job/config.yaml"
"""The complete configuration as it was submitted; RUN/config.yaml is training's own, resolved on its machine."""


class Then(Section):
    """An evaluation that follows the training."""

    task: str
    overrides: tuple[str, ...] = ()
    job: str | None = None


class Submission(Section):
    """One `selfsup submit`: a job, an array of them for a sweep, or one run of a sweep."""

    format: Literal[1] = 1
    kind: Literal["slurm", "local", "debug"]
    job: str | None = None
    """Slurm's number, of a run of a sweep ARRAY_INDEX; "local-..." without Slurm; None until it is known."""
    slurm_conf: str | None = None
    """SLURM_CONF where it was submitted."""
    cluster: Cluster
    cluster_name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    runs: tuple[str, ...] = (".",)
    """Folders of the runs, relative to this one."""
    sweep: dict[str, list[Any]] = Field(default_factory=dict)
    """Values by key that the runs differ in."""
    index: int | None = None
    """Of a run within its sweep."""
    part_of: str | None = None
    """The folder of its sweep, relative to the run."""
    code: str = "code"
    """The snapshot of the code, relative to the run."""
    logs: str = "logs"
    then: tuple[Then, ...] = ()
    table: str | None = None
    """The job that writes the table of a sweep."""
    submitted: str
    """UTC, as in 2026-01-31T12:00:00+00:00."""
    selfsup: str
    """Version of the snapshot,"""
    code_sha256: str
    """and its digest."""
    cwd: str
    """Working directory of its jobs: what relative paths in the configuration mean."""


def path(run: Path) -> Path:
    """Where a run's submission is told."""
    return run / FILE


def log(run: Path, told: Submission, job: str, rank: int | None = 0) -> Path:
    """What a rank of this job prints; None: what its script does."""
    return run / told.logs / ("_".join([job, *([] if rank is None else [str(rank)]), "log.out"]))


def read(run: Path) -> Submission | None:
    """None for a run that was never submitted. Raises UserError for a file that nobody of ours wrote."""
    file = path(run)
    try:
        values = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{file}: cannot be read: {why}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected an object, seen {type(values).__name__}")
    return config.validate(Submission, values, where=str(file))


def write(run: Path, submission: Submission) -> None:
    """As a whole, or not at all. Raises UserError if the folder cannot be written."""
    text = json.dumps(submission.model_dump(mode="json"), indent=1) + "\n"
    try:
        path(run).parent.mkdir(parents=True, exist_ok=True)
        durable.write_atomically(path(run), text)
    except OSError as error:
        raise UserError(f"{path(run)}: cannot be written: {error.strerror or error}") from None
