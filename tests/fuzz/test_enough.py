"""How many cases there are without SELFSUP_FUZZ."""

import importlib
from pathlib import Path

from tests.fuzz.cases import DECLARED


def test_at_least_two_thousand() -> None:
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.fuzz.{path.stem}")
    assert sum(DECLARED.values()) >= 2_000
    modules = {name.partition(".")[0] for name in DECLARED}
    assert modules == {"test_config", "test_data", "test_images", "test_checkpoints", "test_cli"}
