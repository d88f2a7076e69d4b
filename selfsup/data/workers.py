"""Worker processes that make the items of a data set; those that are killed are replaced, and no item is lost."""

import atexit
import dataclasses
import gc
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from selfsup.data.threads import one_thread
from selfsup.errors import UserError

DEATHS, APART = 3, 100
"""So many deaths, each fewer than so many items after the one before, end the run: starting again does not help."""

_IGNORED = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT") if hasattr(signal, name)
)
_PATIENCE = 20.0
"""Seconds that workers get to finish the item they are making when no more are wanted."""


def items(
    dataset: Dataset[Any],
    first: int,
    end: int,
    *,
    workers: int = 0,
    prefetch: int = 2,
    pin: bool = False,
    say: Callable[[str], None] | None = None,
) -> Generator[Any, None, None]:
    """dataset[first] to dataset[end - 1], in order. An item must depend on its number alone: it may be made twice.

    A worker that is killed is announced (`say`; by default on stderr) and all are started again at the item that is due.
    Raises UserError after 3 deaths with fewer than 100 items between them; an item's own UserError as it is, and any
    other exception in a worker as a RuntimeError with its traceback.
    """
    due = first
    deaths: list[int] = []
    while due < end:
        crew: _Crew | None = None
        died = ""
        try:
            while due < end and not died:
                try:
                    crew = crew or _Crew(dataset, range(due, end), workers, prefetch, pin)
                    item = crew.next()
                except _WorkerDied as error:
                    died = str(
                        error
                    )  # not its traceback: frames hold files and sockets, which new workers would inherit
                else:
                    due += 1
                    yield item.opened() if isinstance(item, _Failure) else item
        finally:
            if crew is not None:
                crew.close(kill=bool(died))
        if died:
            deaths = [*deaths, due] if deaths and due - deaths[-1] < APART else [due]
            advice = f"Is memory short, or /dev/shm full? Fewer workers than workers={workers}, or a smaller batch, need less"
            if len(deaths) == DEATHS:
                raise UserError(f"data: {died}; {DEATHS} deaths within {due - deaths[0] + 1} batches.\n{advice}")
            text = f"{died}; its batches are made again. {advice}"
            print(text, file=sys.stderr, flush=True) if say is None else say(text)


class _WorkerDied(BaseException):  # torch catches Exception, and then waits for a lock that the worker may have held
    """Worker processes ended that should not have; the message says which and how."""


class _Crew:
    """The worker processes of one iteration; without workers, this process."""

    def __init__(self, dataset: Dataset[Any], numbers: range, workers: int, prefetch: int, pin: bool) -> None:
        loader: DataLoader[Any] = DataLoader(
            _Careful(dataset),
            sampler=numbers,
            batch_size=None,
            collate_fn=_same,
            pin_memory=pin,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_start_worker,
            multiprocessing_context=_context() if workers else None,
            generator=torch.Generator(),  # else iter() would draw from torch's global one
        )
        self._owner = os.getpid()
        self._processes: list[BaseProcess] = []
        self._listens = False
        self._child_handler: Any = None
        self._iterator: Iterator[Any] | None = None
        if not workers:
            self._iterator = iter(loader)
            return
        others = multiprocessing.active_children()
        try:
            with _held_signals():  # until a worker has set its own handlers, it would run the trainer's
                self._iterator = iter(loader)
        except OSError as error:  # fork, or pipes
            raise UserError(f"workers={workers}: cannot be started: {error.strerror or error}; give fewer") from None
        except RuntimeError as error:  # torch's SIGCHLD handler: one ended already
            raise _WorkerDied(str(error).strip().rstrip(".")) from None
        self._processes = [p for p in multiprocessing.active_children() if p not in others]
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is not None:
            self._child_handler = signal.signal(signal.SIGCHLD, self._on_child)
        _ALIVE.add(self)
        if len(self._processes) < workers:
            self.close(kill=True)
            raise _WorkerDied("a loader worker ended while it started")

    def next(self) -> Any:
        """The next item. Raises _WorkerDied at once when a worker has ended, also while it waits."""
        assert self._iterator is not None
        if not self._processes:
            return _single_threaded(self._iterator)
        try:
            self._listens = True
            self._look()
            return next(self._iterator)
        except Exception:  # torch's, or of the pipe or the socket of a worker that is just ending
            self._listens = False
            for process in self._processes:
                process.join(0.2)
            self._listens = True
            self._look()
            raise
        finally:
            self._listens = False

    def _look(self) -> None:
        if self._listens and (gone := self._gone()):
            self._listens = False
            raise _WorkerDied(gone)

    def _on_child(self, *event: Any) -> None:
        """SIGCHLD as long as this crew is there. It raises while an item is waited for, and never in the middle of a step,
        as the handler would that torch leaves behind once a loader with workers was used.
        """
        if callable(self._child_handler):
            with suppress(RuntimeError):
                self._child_handler(*event)
        self._look()

    def _gone(self) -> str:
        """Which workers have ended; '' if none has."""
        gone = [p for p in self._processes if not p.is_alive()]
        return "; ".join(f"loader worker {p.pid} {_ending(p.exitcode)}" for p in gone[:2])

    def close(self, kill: bool = False) -> None:
        """End the workers: after the item each is making, or at once."""
        if kill:
            self.kill()
        last, self._iterator = [self._iterator], None
        if self._processes and not sys.is_finalizing():
            # when nobody holds the iterator any more it ends its workers: in a thread, for if one was killed while it held a
            # lock of torch's queues, this never returns
            closing = threading.Thread(target=_let_go, args=(last, kill), daemon=True)
            closing.start()
            closing.join(_PATIENCE / 10 if kill else _PATIENCE)
        self.kill()
        if self._child_handler is not None and signal.getsignal(signal.SIGCHLD) == self._on_child:
            with suppress(ValueError):  # closed by another thread: it stays, and does nothing
                signal.signal(signal.SIGCHLD, self._child_handler)
        _ALIVE.discard(self)

    def kill(self) -> None:
        """End the workers at once; they hold nothing that is worth a wait."""
        if os.getpid() != self._owner:  # a fork's copy
            return
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join(1)


def _let_go(last: list[Iterator[Any] | None], broken_off: bool) -> None:
    last.clear()
    if broken_off:  # frames of the exception hold it in a cycle, which the next worker would else find and tear down
        gc.collect()


_ALIVE: weakref.WeakSet[_Crew] = weakref.WeakSet()


@atexit.register
def _kill_all() -> None:
    """At exit with an iteration open, multiprocessing would send SIGTERM, which workers ignore, and wait for ever."""
    for crew in list(_ALIVE):
        crew.kill()


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


@dataclasses.dataclass
class _Failure:
    """An exception in a worker, brought to the trainer whole."""

    error: str
    user: bool
    trace: str

    def opened(self) -> Any:
        raise UserError(self.error) if self.user else RuntimeError(f"in a loader worker: {self.error}\n{self.trace}")


class _Careful(Dataset[Any]):
    """A data set's items in shared memory; what goes wrong in a worker is an item too."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, k: int) -> Any:
        worker = torch.utils.data.get_worker_info()
        if worker is None:
            return self.dataset[k]
        try:
            item = self.dataset[k]
        except Exception as error:
            text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            return _Failure(text, isinstance(error, UserError), traceback.format_exc())
        try:
            _share(item)  # torch would do it while it sends, where a failure is lost and the trainer waits for ever
        except RuntimeError as error:
            text = (
                f"shared memory is full ({error}); fewer workers than workers={worker.num_workers}, or a smaller batch"
            )
            return _Failure(f"data: /dev/shm: {text}, need less", True, "")
        return item


def _share(item: Any) -> None:
    if isinstance(item, Tensor) and item.numel():
        item.share_memory_()
    elif isinstance(item, (list, tuple)):
        for part in item:
            _share(part)
    elif dataclasses.is_dataclass(item):
        _share(list(vars(item).values()))


def _same(item: Any) -> Any:
    return item


def _single_threaded(iterator: Iterator[Any]) -> Any:
    """A data set's torch code runs on one thread here too, as it does in a worker; the trainer's count is put back."""
    with one_thread():
        return next(iterator)


def _context() -> str | None:
    """Fork on Linux, so that the table of names is shared and a user's data set needs no pickling."""
    return "fork" if sys.platform == "linux" and "fork" in multiprocessing.get_all_start_methods() else None


def _unless_broken_off(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """A transfer that the trainer broke off, because another worker was killed, is nothing to show a traceback of."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _start_worker(worker: int) -> None:
    """Signals are the trainer's business: a scheduler sends them to every process."""
    sys.excepthook = _unless_broken_off
    signal.set_wakeup_fd(-1)  # a pipe of the trainer's
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_IGNORED, signal.SIGCHLD))


@contextmanager
def _held_signals() -> Iterator[None]:
    """Signals wait, and torch's handler for the end of children is not left behind."""
    handler = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*_IGNORED, signal.SIGCHLD))
    try:
        yield
    finally:
        if handler is not None and signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
