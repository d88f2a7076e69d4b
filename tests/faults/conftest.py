"""The zygote and the runs of a session."""

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.faults.lab")

from tests.faults.lab import Lab  # noqa: E402
from tests.faults.zygote import Zygote  # noqa: E402


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Forks runs for all tests of a session (of one worker under pytest-xdist)."""
    with Zygote(tmp_path_factory.mktemp("zygote")) as started:
        yield started


@pytest.fixture(scope="session")
def _lab(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(zygote, tmp_path_factory.mktemp("lab"))


@pytest.fixture
def lab(_lab: Lab) -> Iterator[Lab]:
    """Runs of a tiny recipe. Those that still run when a test ends are killed."""
    yield _lab
    _lab.zygote.end_all()
