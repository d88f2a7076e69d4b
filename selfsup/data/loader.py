"""Batches for the trainer: from worker processes or from this one, the same either way and from any step on."""

import multiprocessing
import signal
import sys
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from selfsup.data.base import Source
from selfsup.data.batch import Batch, BatchMaker, Split
from selfsup.data.sampler import check_split
from selfsup.data.views import View
from selfsup.errors import UserError

__all__ = ["Batch", "Loader", "WorkerDied"]

_IGNORED = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT") if hasattr(signal, name)
)


class WorkerDied(RuntimeError):
    """A worker process ended without an answer: killed, out of memory, or out of shared memory."""


class Loader:
    """Batches of one rank; everything in them is a function of (source, views, seed, global_batch) and the step.

    The number of workers, ranks and micro-batches only decides who makes which part. Raises UserError when the source
    holds fewer images than a global batch, or the batch does not split evenly.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        seed: int,
        global_batch: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin: bool = False,
        prefetch: int = 2,
    ) -> None:
        check_split(global_batch, accumulate, world)
        if len(source) < global_batch:
            raise UserError(
                f"data holds {len(source)} images, fewer than global_batch={global_batch}; "
                f"add images or give global_batch={len(source)} or less"
            )
        self.make = BatchMaker(source, views, seed, Split(global_batch, accumulate, rank, world))
        self.seed, self.accumulate, self.workers, self.pin, self.prefetch = seed, accumulate, workers, pin, prefetch
        self.wait_seconds = 0.0
        """How long the consumer waited for batches, in all."""

    def stream(self, start_step: int, total_steps: int) -> Generator[list[Batch], None, None]:
        """For each step from `start_step` to `total_steps` - 1 its `accumulate` micro-batches."""
        batches = self._batches(start_step * self.accumulate, total_steps * self.accumulate)
        try:
            for _ in range(start_step, total_steps):
                began = time.perf_counter()
                step = [next(batches) for _ in range(self.accumulate)]
                self.wait_seconds += time.perf_counter() - began
                yield step
        finally:
            batches.close()

    def _batches(self, first: int, end: int) -> Generator[Batch, None, None]:
        loader: DataLoader[Any] = DataLoader(
            _Calls(self.make, self.accumulate),
            sampler=range(first, end),
            pin_memory=self.pin,
            **worker_options(self.workers, self.prefetch),
        )
        if self.workers:
            with _held_signals():  # until a worker has set its own handlers, it would run the trainer's
                iterator = iter(loader)
        else:
            iterator = iter(loader)
        while True:
            try:
                result = next(iterator) if self.workers else _single_threaded(iterator)
            except StopIteration:
                return
            except RuntimeError as error:
                if self.workers and "DataLoader worker" in str(error):
                    raise WorkerDied(_death(error)) from None
                raise
            if isinstance(result, _Failure):
                result.raise_again()
            yield result


def worker_options(workers: int, prefetch: int = 2) -> dict[str, Any]:
    """What every DataLoader of this library is given: items as they are, careful workers, no global random numbers."""
    return {
        "batch_size": None,
        "num_workers": workers,
        "collate_fn": _same,
        "prefetch_factor": prefetch if workers else None,
        "worker_init_fn": _start_worker,
        "multiprocessing_context": _context() if workers else None,
        "generator": torch.Generator(),  # else iter() would draw from torch's global one
    }


@dataclass
class _Failure:
    """An exception in a worker, brought to the trainer whole."""

    error: str
    user: bool
    trace: str

    def raise_again(self) -> None:
        raise UserError(self.error) if self.user else RuntimeError(f"in a loader worker: {self.error}\n{self.trace}")


class _Calls(Dataset[Any]):
    """Item k is micro-batch k % accumulate of step k // accumulate."""

    def __init__(self, make: BatchMaker, accumulate: int) -> None:
        self.make, self.accumulate = make, accumulate

    def __getitem__(self, k: int) -> Batch | _Failure:
        try:
            return self.make(*divmod(k, self.accumulate))
        except Exception as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return _Failure(text, isinstance(error, UserError), traceback.format_exc())


def _same(batch: Any) -> Any:
    return batch


def _single_threaded(iterator: Iterator[Any]) -> Any:
    """A data set's torch code runs on one thread here too, as it does in a worker; the trainer's count is put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return next(iterator)
    finally:
        torch.set_num_threads(threads)


def _context() -> str | None:
    """Fork on Linux, so that the table of names is shared and a user's data set needs no pickling."""
    return "fork" if sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods() else None


def _start_worker(worker: int) -> None:
    """Signals are the trainer's business: a scheduler sends them to every process."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)


@contextmanager
def _held_signals() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _death(error: RuntimeError) -> str:
    first = str(error).strip().splitlines()[0].rstrip(". ")
    return f"{first}. Was it out of memory, or is /dev/shm full? Fewer workers (workers=...) or a smaller batch need less."
