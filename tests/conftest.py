"""Settings of every test process: one thread, no network for models, and no silent skips in continuous integration."""

import os
import signal
import sys

# Before torch or huggingface_hub is imported by anyone; child processes inherit them.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
for _name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS"):
    os.environ.pop(_name, None)  # a test started inside a job is not a rank of it

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start is interrupted as on a terminal

import pytest  # noqa: E402

# here, and not in their own folders: a process that collects nothing still prints their summaries,
# and other folders use a cluster too
pytest_plugins = ["tests.faults.table", "tests.fuzz.cases", "tests.slurm.session", "tests.systems.table"]

ALLOWED_SKIPS = ("no CUDA",)
"""Reasons for which a skipped test is no failure in CI: hardware that the machine does not have."""


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure when CI=true: a part that is missing there was never tested at all."""
    if not (_in_ci() and report.skipped) or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI counts as a failure: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_skip(report)
    return report


@pytest.fixture(autouse=True)
def _restore_signals():
    """The command line, run inside a test, leaves stop signals ignored; processes that later tests start inherit that."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if handler is not None and signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _restore_threads():
    """A run inside a test sets torch's thread count; the tests after it must not compute with another one."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(before)
