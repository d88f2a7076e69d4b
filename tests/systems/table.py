"""The table of systems: each row of README's "What works", and what became of the tests that run it (`pytest -m systems`).

A test names its row by `pytest.mark.systems("first cell of the row")`. What happened travels in its reports' user properties,
so that the table is whole under pytest-xdist too. A row that says "open" and one without a test are printed as such.
"""

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def rows() -> dict[str, str]:
    """First cell -> second cell of README's table, without its headings."""
    text = README.read_text().split("\n## What works\n")[1].split("\n## ")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    found = {first.strip(): second.strip() for first, second in cells if second.strip()}
    found.pop("System")
    return found


def is_open(state: str) -> bool:
    """Whether a second cell says that the row is not built."""
    return re.match(r"open\b", state) is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Write a test's rows into its reports."""
    for mark in item.iter_markers("systems"):
        item.user_properties.append(("system", mark.args[0]))


def outcomes(stats: dict[str, list[Any]]) -> dict[str, dict[str, int]]:
    """Row -> passed, failed, skipped -> number of tests."""
    found: dict[str, dict[str, int]] = {}
    for kind in ("passed", "failed", "error", "skipped"):
        for report in stats.get(kind, []):
            if kind == "passed" and getattr(report, "when", None) != "call":
                continue
            for name, row in getattr(report, "user_properties", ()):
                if name == "system":
                    counts = found.setdefault(row, {})
                    key = "failed" if kind == "error" else kind
                    counts[key] = counts.get(key, 0) + 1
    return found


def lines(found: dict[str, dict[str, int]]) -> list[str]:
    """The table in Markdown, README's order; at its end how many rows are open and how many were not run."""
    table, known = ["| system | tests | usable by |", "|---|---|---|"], rows()
    for row, state in known.items():
        said = ", ".join(f"{count} {kind}" for kind, count in found.get(row, {}).items())
        table.append(f"| {row} | {said or ('open' if is_open(state) else 'not run')} | {state} |")
    unbuilt = sum(is_open(state) for state in known.values())
    missing = sum(row not in found and not is_open(state) for row, state in known.items())
    return [*table, f"{len(known)} systems: {len(known) - unbuilt - missing} run, {missing} not run, {unbuilt} open"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table if these tests were asked for."""
    if "systems" not in (config.option.markexpr or ""):
        return
    terminalreporter.section("systems")
    for line in lines(outcomes(terminalreporter.stats)):
        terminalreporter.write_line(line)
