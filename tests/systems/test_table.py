"""Every row of README's table has a test that runs it, and every mark is a row."""

import ast
from pathlib import Path

import pytest

from tests import test_demos
from tests.methods import test_architectures
from tests.systems import table
from tests.systems.commands import COMMANDS

TESTS = Path(__file__).parents[1]


def marked() -> set[str]:
    """First arguments of `pytest.mark.systems(...)` in all tests: those written out, and those that come from tables."""
    found = {*test_demos.ROWS.values(), test_demos.FAMILY, *test_architectures.ROWS}
    for path in TESTS.rglob("*.py"):
        text = path.read_text()
        if "mark.systems(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.systems":
                found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def test_every_row_is_run() -> None:
    known = table.rows()
    run = marked() | set(COMMANDS)
    assert run - set(known) == set(), "marks that are no row of README's table"
    assert [row for row, state in known.items() if row not in run and not table.is_open(state)] == []


def test_the_table_says_what_happened() -> None:
    class Report:
        when = "call"

        def __init__(self, row: str) -> None:
            self.user_properties = [("system", row)]

    first, second, third = list(table.rows())[:3]
    stats = {"passed": [Report(first), Report(first)], "failed": [Report(second)]}
    text = table.lines(table.outcomes(stats))
    assert text[2].startswith(f"| {first} | 2 passed |") and text[3].startswith(f"| {second} | 1 failed |")
    assert "not run" in next(line for line in text if line.startswith(f"| {third} |"))
    assert ": 2 run" in text[-1]


@pytest.mark.parametrize(("state", "expected"), [("open", True), ("open (not in timm)", True), ("works", False)])
def test_open_rows(state: str, expected: bool) -> None:
    assert table.is_open(state) is expected
