"""A run folder: who may write to it, what is in it, and whether a configuration may resume it."""

import sys
from pathlib import Path
from typing import Any

from selfsup import checkpoint, durable
from selfsup import config as configuration
from selfsup.config import Config
from selfsup.errors import DiskError, UserError
from selfsup.guard.lease import Lease, holder

FREE = (
    *("workers", "checkpoint", "eval", "stop_at", "log_every", "tensorboard", "pictures", "report"),
    *("hang_timeout", "profile"),
)
"""Keys that may change on resume."""

ANNOUNCED = (
    *("spike", "early_stop", "accumulate", "grad_checkpointing", "max_nonfinite", "data.max_bad_fraction"),
    "teacher.path",
)
"""Keys that may change on resume, which is said: the run will not be bit for bit the one it was. They are what the
messages of a run that was out of memory, spiked, or was stopped early or by a limit tell the user to change; and where the
teacher is, of which the checkpoint knows the weights.
"""

RESOLVED = ("precision", "device", "deterministic", "threads")
"""Keys that 'auto' or null takes over from the run."""


def claim(out: Path, resume: bool) -> Lease:
    """Make the folder and hold it alone; refuse one that holds a run unless it is to be resumed.

    Raises UserError, having changed nothing, also when another process trains in it.
    """
    try:
        str(out).encode()
    except UnicodeEncodeError:
        raise UserError(f"--out {out}: not UTF-8, and safetensors could not read it again; name another") from None
    try:
        if not resume:
            _refuse_a_run(out)
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file; name a folder")
        out.mkdir(parents=True, exist_ok=True)
        lease = Lease.acquire(out, say=lambda text: print(text, file=sys.stderr, flush=True))
        try:
            if not resume:
                _refuse_a_run(out, ours=True)  # of a process that had the folder until now
            checkpoint.clean(out)
            checkpoint.clean(out / "checkpoints")
        except BaseException:
            lease.release()
            raise
    except OSError as error:
        raise DiskError(
            f"--out {out}: cannot be written: {error.strerror or error}; name a folder you may write to"
        ) from None
    return lease


def _refuse_a_run(out: Path, ours: bool = False) -> None:
    if not (out / "config.yaml").exists():
        return
    if not ours and (who := holder(out)) is not None:
        raise UserError(f"--out {out} is in use by {who}; wait for it or stop it, or name another folder")
    raise UserError(f"--out {out} already holds a run; add --resume to go on with it, or name another folder")


def stored_config(out: Path) -> Config | None:
    """The configuration of the run in this folder, or None."""
    path = out / "config.yaml"
    try:
        if not path.is_file():
            return None
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DiskError(f"{path}: cannot be read: {error}") from None
    return configuration.validate(Config, configuration.parse_yaml(text, str(path)), where=str(path))


def write_config(out: Path, config: Config) -> None:
    """RUN/config.yaml, itself a recipe; where a start was to stop early is no property of the run."""
    config = config.model_copy(update={"stop_at": None})
    try:
        durable.write_atomically(out / "config.yaml", configuration.dump(config))
    except OSError as error:
        raise DiskError(f"{out / 'config.yaml'}: cannot be written: {error.strerror or error}") from None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out.update(flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def adopt(config: Config, stored: Config) -> Config:
    """`config` with what it leaves to 'auto' taken from the run that is resumed."""
    update: dict[str, Any] = {key: getattr(stored, key) for key in RESOLVED if getattr(config, key) in (None, "auto")}
    if config.data.classes is None:
        update["data"] = config.data.model_copy(update={"classes": stored.data.classes})
    return config.model_copy(update=update)


def check_resume(config: Config, stored: Config) -> list[str]:
    """Announcements of allowed changes; raises UserError for a change that would make it another run."""
    new, old = (
        flat(config.model_dump(mode="json", by_alias=True)),
        flat(stored.model_dump(mode="json", by_alias=True)),
    )
    notes = []
    for key in sorted(new.keys() | old.keys()):
        before, after = old.get(key), new.get(key)
        if before == after or key.split(".")[0] in FREE:
            continue
        if key in ANNOUNCED or key.split(".")[0] in ANNOUNCED:
            notes.append(f"{key} changes from {before} to {after}")
            continue
        grows = key in ("steps", "epochs", "samples") and before is not None and after is not None and after > before
        if not grows:
            raise UserError(
                f"{key}={after!r} differs from the run's {before!r}: a resume keeps everything but "
                f"{', '.join((*FREE, *ANNOUNCED))} and a longer duration; start a new run with --out, or drop the change"
            )
        notes.append(f"{key} grows from {before} to {after}: schedules follow the new length")
    return notes
