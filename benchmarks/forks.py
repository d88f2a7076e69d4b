"""`selfsup ...` in processes that are forked from one with the libraries imported, with one thread each."""

import functools
import multiprocessing
import multiprocessing.context
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOAD = ["selfsup.cli", "selfsup.train", "selfsup.eval.classify", "torchvision.datasets"]


class Failed(Exception):
    """A run that ended otherwise than it should; the message is the end of what it said."""


def say(text: str) -> None:
    """On stderr, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Spent:
    """What a command took."""

    seconds: float
    """Of the CPU."""
    peak_mb: float
    """Resident memory at its highest, libraries included."""


def selfsup(log: Path, *arguments: str) -> Spent:
    """Run it; what it says is added to `log`. Raises Failed unless it ends with 0."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context = _context()
    told = context.Array("d", 2)
    process = context.Process(target=_command, args=(str(log), ["selfsup", *arguments], told))
    process.start()
    process.join()
    if process.exitcode != 0:
        end = "\n".join(log.read_text().splitlines()[-15:])
        raise Failed(f"selfsup {' '.join(arguments[:3])} ... ended with {process.exitcode}; {log}:\n{end}")
    return Spent(*told[:])


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    """To import takes longer than a hundred steps of a small net: it is done once."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _command(log: str, arguments: list[str], told: Any) -> None:
    """What such a process runs: the command line, as if it had been typed. told: gets the fields of `Spent`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from selfsup.cli import main

    sys.argv = arguments
    began = time.process_time()  # what was imported before the fork is not its own
    try:
        main()
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        told[:] = [time.process_time() - began, peak]
