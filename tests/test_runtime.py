"""What a run sets on its machine, and puts back."""

import resource

import pytest
import torch

from selfsup import runtime
from selfsup.config import Config


def resident() -> int:
    """Bytes this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def faults_of_a_step(shortcuts: tuple[str, ...]) -> int:
    """Page faults of the tenth time that 100 MB are allocated, filled and freed, inside `settings`."""
    config = Config(shortcuts=shortcuts, device="cpu", threads=1)  # type: ignore[arg-type]
    with runtime.settings(runtime.resolve(config)):
        for _ in range(10):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(25_000_000)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults


@pytest.mark.skipif(not runtime.keep_freed_memory(False), reason="the C library is not glibc")
def test_freed_memory_is_kept_during_a_run_and_given_back() -> None:
    assert faults_of_a_step(()) > 10_000  # 4 KB each
    start = resident()
    assert faults_of_a_step(("heap",)) < 1_000
    assert resident() < start + 50_000_000
    assert faults_of_a_step(()) > 10_000
