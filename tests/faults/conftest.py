"""The zygote of a session."""

from collections.abc import Iterator

import pytest

from tests.faults.zygote import Zygote


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Forks runs for all tests of a session (of one worker under pytest-xdist)."""
    with Zygote(tmp_path_factory.mktemp("zygote")) as started:
        yield started
