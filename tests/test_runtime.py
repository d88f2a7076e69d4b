"""What a run sets on its machine, and puts back."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, resource
import torch
from selfsup import runtime
from selfsup.config import Config

def resident():
    '''Bytes this process holds now.'''
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def faults_of_a_step(shortcuts):
    '''Page faults of the tenth time that 100 MB are allocated, filled and freed, inside `settings`.'''
    config = Config(shortcuts=shortcuts, device="cpu", threads=1)
    with runtime.settings(runtime.resolve(config)):
        for _ in range(10):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(25_000_000)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults

plain, before = faults_of_a_step(()), resident()
kept, grown = faults_of_a_step(("heap",)), resident() - before
print(json.dumps({"told": runtime.keep_freed_memory(False), "plain": plain, "kept": kept, "grown": grown,
                  "again": faults_of_a_step(())}))
"""


def test_freed_memory_is_kept_during_a_run_and_given_back() -> None:
    """In a process of its own: in one that did much else there may be a hole of 100 MB."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if not found["told"]:
        pytest.skip("the C library is not glibc")
    assert found["plain"] > 10_000 and found["again"] > 10_000, found  # 4 KB each
    assert found["kept"] < 1_000 and found["grown"] < 50_000_000, found
