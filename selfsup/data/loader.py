"""Batches for the trainer: from worker processes or from this one, the same either way and from any step on."""

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from torch.utils.data import Dataset

from selfsup.data.base import Source
from selfsup.data.batch import Batch, BatchMaker, Split
from selfsup.data.sampler import check_split
from selfsup.data.views import View
from selfsup.data.workers import items
from selfsup.errors import UserError

__all__ = ["Batch", "Loader"]


class Loader:
    """Batches of one rank; everything in them is a function of (source, views, seed, global_batch) and the step.

    The number of workers, ranks and micro-batches only decides who makes which part. Raises UserError when the source
    holds fewer images than a global batch, or the batch does not split evenly. `say` is told of workers that were killed
    and replaced; by default stderr is. repeat, copies: see `BatchMaker`.
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
        say: Callable[[str], None] | None = None,
        repeat: int | None = None,
        copies: int = 1,
    ) -> None:
        check_split(global_batch, accumulate, world)
        if len(source) < global_batch:
            raise UserError(
                f"data holds {len(source)} images, fewer than global_batch={global_batch}; "
                f"add images or give global_batch={len(source)} or less"
            )
        maker = maker_of(source)
        self.make = maker(source, views, seed, Split(global_batch, accumulate, rank, world), repeat, copies)
        self.seed, self.accumulate, self.workers, self.pin, self.prefetch = seed, accumulate, workers, pin, prefetch
        self.say = say
        self.wait_seconds = 0.0
        """How long the consumer waited for batches, in all."""

    def stream(self, start_step: int, total_steps: int) -> Generator[list[Batch], None, None]:
        """For each step from `start_step` to `total_steps` - 1 its `accumulate` micro-batches."""
        batches = items(
            _Calls(self.make, self.accumulate),
            start_step * self.accumulate,
            total_steps * self.accumulate,
            workers=self.workers,
            prefetch=self.prefetch,
            pin=self.pin,
            say=self.say,
        )
        try:
            for _ in range(start_step, total_steps):
                began = time.perf_counter()
                step = [next(batches) for _ in range(self.accumulate)]
                self.wait_seconds += time.perf_counter() - began
                yield step
        finally:
            batches.close()


def maker_of(source: Source) -> type[BatchMaker]:
    """Of images, of clips where the source has videos, or of volumes where it has those."""
    if hasattr(source, "video"):
        from selfsup.data.clip_batch import ClipBatchMaker

        return ClipBatchMaker
    if hasattr(source, "volume"):
        from selfsup.data.volume_batch import VolumeBatchMaker

        return VolumeBatchMaker
    return BatchMaker


class _Calls(Dataset[Any]):
    """Item k is micro-batch k % accumulate of step k // accumulate."""

    def __init__(self, make: BatchMaker, accumulate: int) -> None:
        self.make, self.accumulate = make, accumulate

    def __getitem__(self, k: int) -> Batch:
        return self.make(*divmod(k, self.accumulate))
