"""What a run folder tells beside its log, for those who look at runs: its configuration as it is, and what was noted."""

from pathlib import Path
from typing import Any

from selfsup.columns import Curves
from selfsup.config import parse_yaml
from selfsup.errors import UserError


def stored_config(folder: Path) -> dict[str, Any]:
    """config.yaml as it is; {} if it cannot be read: the curves say enough."""
    try:
        return parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), "config.yaml")
    except (OSError, ValueError, UserError):
        return {}


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
