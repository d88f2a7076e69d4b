"""The table of faults: what is done to a run, what happens then, how many cases were tried and how many passed.

Printed after the tests. A test belongs to the row that `pytest.mark.faults("name")` names; what it counted travels in its
reports' user properties, so that the table is whole under pytest-xdist too.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

ROWS = {
    "commit": (
        "`kill -9` before and after every write, fsync, rename and removal of a save, and half way through a write",
        "`--resume` goes on: same log, same weights",
    ),
    "random": ("`kill -9` at random times, several times in a run", "the same"),
    "damage": (
        "a file of the newest checkpoint truncated, one bit flipped, or deleted",
        "passed over with a warning, resumed from the one before: same log, same weights",
    ),
    "signals": (
        "USR1, USR2, TERM, INT to all processes of a run with loader workers",
        "one checkpoint, exit 75; resumed: same log, same weights",
    ),
    "signals_in_save": (
        "further signals during the save; three INTs",
        "harmless, exit 75; exit 130 at once; resumed: same log, same weights",
    ),
    "rank_killed": (
        "`kill -9` of one of two ranks",
        "the other names it and exits 1 within seconds; resumed: same log, same weights",
    ),
    "rank_hangs": (
        "SIGSTOP of one of two ranks; one that hangs in a step",
        "reported within `hang_timeout`: rank, host, pid, process state, phase, stack; exit 1; resumed: the same",
    ),
    "nan": (
        "NaN on one of two ranks",
        "refused on both, counted, batch kept; all ranks' weights equal, whichever rank had it",
    ),
    "spike": (
        "loss x 1000 in one step, `spike.factor=10`",
        "back to the last checkpoint, that batch left out: weights of a run that refused that step",
    ),
    "memory": (
        "`torch.OutOfMemoryError` in a step",
        "exit 2 with the sizes and what to lower; resumed: same log, same weights",
    ),
    "worker": ("`kill -9` of a loader worker", "goes on by itself: same log, same weights"),
    "images": (
        "5 % of the images empty, truncated, HTML, a bomb, CMYK, 16 bit",
        "replaced or converted, listed in `bad_files.jsonl`; same log, same weights for any number of workers",
    ),
    "full": (
        "disk full during a save (a small tmpfs, RLIMIT_FSIZE); an I/O error in any of its operations",
        "exit 2 naming what is needed, earlier checkpoints valid, log whole; resumed with room: the same",
    ),
    "folder": (
        "run folder removed; made read-only",
        "exit 2 saying so, nothing left behind; writable again and resumed: same log, same weights",
    ),
    "twice": (
        "two launches on one run folder",
        "the second exits 2 at once, naming the first, which is not disturbed: same log, same weights",
    ),
    "clock": ("the clock jumps back, during a run and between two", "nothing: same log, same weights"),
}
"""Name of a row -> (fault, what happens)."""


class Cases:
    """Counts the cases of a test that has several: `with cases("name"): ...`. One that fails does not end the test."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.count += 1
        try:
            yield
        except Exception:
            self.failures.append(f"case {name}:\n{traceback.format_exc()}")


_CASES = pytest.StashKey[Cases]()


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Cases:
    """See `Cases`."""
    found = request.node.stash[_CASES] = Cases()
    return found


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    """Fail a test some of whose cases failed, and write down what was counted."""
    marker = pyfuncitem.get_closest_marker("faults")
    if marker is None:
        return (yield)
    row = marker.args[0]
    assert row in ROWS, row
    found, passed, count = None, False, 1
    try:
        result = yield
        passed = True
        return result
    finally:
        if (found := pyfuncitem.stash.get(_CASES, None)) is not None:
            count = max(1, found.count)
        failed = len(found.failures) if found else 0
        good = count - failed if passed else count - max(1, failed)
        pyfuncitem.user_properties.append(("fault", [row, count, good]))
        if passed and failed:
            assert found is not None
            pytest.fail(f"{failed} of {count} cases failed\n\n" + "\n".join(found.failures), pytrace=False)


@dataclass
class _Count:
    cases: int = 0
    passed: int = 0


def counts(reports: list[Any]) -> dict[str, _Count]:
    """Row -> how many cases were tried and passed, of the reports of a session."""
    found: dict[str, _Count] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == "fault" and getattr(report, "when", None) == "call":
                row = found.setdefault(value[0], _Count())
                row.cases += value[1]
                row.passed += value[2]
    return {row: found[row] for row in ROWS if row in found}


def markdown(found: dict[str, _Count]) -> list[str]:
    """The table's lines."""
    lines = ["| fault | what happens | cases | passed |", "|---|---|---:|---:|"]
    lines += [f"| {ROWS[r][0]} | {ROWS[r][1]} | {c.cases} | {c.passed} |" for r, c in found.items()]
    total = _Count(sum(c.cases for c in found.values()), sum(c.passed for c in found.values()))
    return [*lines, f"| all | | {total.cases} | {total.passed} |"]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table if any of its tests ran."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    found = counts(reports)
    if not found:
        return
    terminalreporter.section("faults")
    for line in markdown(found):
        terminalreporter.write_line(line)
