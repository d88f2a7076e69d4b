"""What a report tells of one run, read from its folder."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from selfsup import checkpoint
from selfsup.columns import Curves, read_curves
from selfsup.diagnosis import Diagnosis
from selfsup.errors import UserError
from selfsup.runfolder import RESOLVED, flat

from .. import results
from ..runfacts import judged, remarks_on, stored_config

Defaults = Callable[[str], dict[str, Any]]
"""Name of a method -> the configuration with nothing said but that name, its options filled in."""

_MOST_RESULTS = 400
_LARGEST_RESULT = 5_000_000
"""Bytes."""
_NOT_SET = "not set"


@dataclass(frozen=True)
class Difference:
    """A key of a run's configuration that is not as it would be by itself."""

    key: str
    value: Any
    default: Any
    resolved: bool
    """Whether the run found it out when it began ('auto'), and nobody set it."""


@dataclass(frozen=True)
class Story:
    """One run."""

    folder: Path
    name: str
    """As short as it can be, and still unlike those of the other runs in the page."""
    standing: Mapping[str, Any]
    """As `selfsup status --json` has it: state, step, steps, restarts, metrics, host, eta_s."""
    curves: Curves
    diagnosis: Diagnosis
    config: dict[str, Any]
    """config.yaml; {} if it cannot be read."""
    differences: list[Difference]
    results: dict[str, dict[str, Any]]
    """Path in RUN/eval, without the suffix -> result file."""
    environment: dict[str, str]
    remarks: list[str] = field(default_factory=list)

    @cached_property
    def flat(self) -> dict[str, Any]:
        """The configuration by dotted keys."""
        return flat(self.config)

    @property
    def seconds(self) -> float | None:
        """Between the first and the last time stamp of the log."""
        _, times = self.curves.known("time")
        return float(times.max() - times.min()) if len(times) > 1 else None

    def setting(self, key: str, default: Any = None) -> Any:
        """A value by its dotted key."""
        return self.flat.get(key, default)


def read(standing: Mapping[str, Any], name: str, defaults: Defaults) -> Story:
    """Everything about the run `standing["run"]`. What is broken is left out, and said in `remarks`."""
    folder = Path(standing["run"])
    curves = read_curves(folder / "metrics.jsonl")
    config = stored_config(folder)
    found, remarks = _results(folder / "eval")
    remarks = [*standing.get("remarks", ()), *remarks_on(folder, curves), *remarks]
    if not config:
        remarks.append("config.yaml cannot be read: nothing is said of the recipe")
    return Story(
        folder=folder,
        name=name,
        standing=standing,
        curves=curves,
        diagnosis=judged(curves, config),
        config=config,
        differences=differences(config, defaults),
        results=found,
        environment=_environment(folder, config, found),
        remarks=remarks,
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]
    for count in range(1, max(len(p) for p in parts) + 1):
        names = ["/".join(p[-count:]).replace("//", "/") for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def differences(config: Mapping[str, Any], defaults: Defaults) -> list[Difference]:
    """Keys whose values differ from the defaults, of the configuration and of the method, in the order of the schema."""
    if not config:
        return []
    method = config.get("method")
    named = method.get("name") if isinstance(method, dict) else None
    usual = flat(defaults(named if isinstance(named, str) else ""))
    found = []
    for key, value in flat(dict(config)).items():
        default = usual.get(key, _NOT_SET)
        if value == default or key == "method.name" or (value is None and default == _NOT_SET):
            continue
        found.append(Difference(key, value, default, key in RESOLVED and default in (None, "auto")))
    return found


def _results(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Result files in RUN/eval and RUN/eval/step_*, and remarks on those that are none."""
    files = sorted([*folder.glob("*.json"), *folder.glob("step_*/*.json")])
    found: dict[str, dict[str, Any]] = {}
    remarks = []
    for file in files[:_MOST_RESULTS]:
        try:
            if file.stat().st_size > _LARGEST_RESULT:
                raise UserError(f"{file}: larger than {_LARGEST_RESULT // 10**6} MB")
            one = results.read(file)
            if not all(isinstance(one[key], dict) for key in ("target", "metrics", "protocol")):
                raise UserError(f"{file}: not a result file; target, metrics and protocol are no tables")
        except (UserError, OSError, RecursionError) as error:
            remarks.append(f"left out: {error}")
            continue
        found[file.relative_to(folder).with_suffix("").as_posix()] = one
    if len(files) > _MOST_RESULTS:
        remarks.append(f"of {len(files):,} result files the first {_MOST_RESULTS} are shown")
    return found, remarks


def _environment(folder: Path, config: Mapping[str, Any], found: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Device, precision, processes and threads of the training, and versions, as far as anything tells them."""
    out = {key: str(config[key]) for key in ("device", "precision", "deterministic", "parallel") if key in config}
    steps = checkpoint.steps(folder / "checkpoints")
    runtime = _object(steps[-1][1] / "trainer.json").get("runtime") if steps else None
    for key, value in (runtime if isinstance(runtime, dict) else {}).items():
        out["processes" if key == "world_size" else str(key)] = str(value)
    versions = next((v for one in found.values() if isinstance(v := one["protocol"].get("versions"), dict)), {})
    for key, value in versions.items():
        out.setdefault(str(key), str(value))
    return out


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
