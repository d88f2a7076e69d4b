"""What a run folder tells beside its log, for those who look at runs: its configuration as it is, and what was noted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfsup.columns import Curves
from selfsup.config import parse_yaml
from selfsup.diagnosis import Diagnosis, diagnose
from selfsup.errors import UserError
from selfsup.judges import Finding
from selfsup.remedies import advice, method_of


def stored_config(folder: Path) -> dict[str, Any]:
    """config.yaml as it is; {} if it cannot be read: the curves say enough."""
    try:
        return parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    except (OSError, ValueError, UserError):
        return {}


def judged(curves: Curves, config: Mapping[str, Any]) -> Diagnosis:
    """`diagnose`, with the refused steps in a row that end the run as its configuration says."""
    row = config.get("max_nonfinite")
    return diagnose(curves, row if isinstance(row, int) else 10)


def advised(finding: Finding, config: Mapping[str, Any], folder: Path) -> str:
    """What to change, in the keys of the run's method, with the run's folder in its commands."""
    return advice(finding.kind, method_of(config)).replace("RUN", str(folder))


def remarks_on(folder: Path, curves: Curves) -> list[str]:
    """What is worth a line, and no more, beside the diagnosis of a run."""
    found = []
    if curves.broken:
        found.append(f"{curves.broken} broken line(s) in metrics.jsonl were passed over")
    left_out = int((curves.columns["left_out"] > 0).sum())
    if left_out:
        found.append(f"{left_out} step(s) left out after a spike of the loss")
    try:
        with open(folder / "bad_files.jsonl", "rb") as file:
            bad = sum(1 for _ in file)
        if bad:
            found.append(f"{bad} image(s) could not be read and were replaced; see {folder / 'bad_files.jsonl'}")
    except OSError:
        pass
    return found
