"""Stop signals set a flag; the ranks agree on it at a step boundary, save together, and exit 75."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as td

from selfsup import dist

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Context manager that turns stop signals into a flag; a third SIGINT kills at once.

    Inside another one it begins with what that one received: the command line holds one from its start to its end, so
    that no signal between two parts of a run is lost or deadly.

    The agreement of the ranks is exchanged over the host-side group and read one step later, so that no step waits.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._interrupts = 0
        self._before: dict[int, Any] = {}
        self._wake: tuple[int, int] | None = None
        """The pipe that tells of signals, and the descriptor that was told before."""
        self._pending: tuple[torch.Tensor, td.Work] | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                before = self._before[number] = signal.signal(number, self._on_signal)
                outer = getattr(before, "__self__", None)
                if isinstance(outer, StopSignals):
                    self.received = self.received or outer.received
            self._count_interrupts()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wake is not None:
            signal.set_wakeup_fd(self._wake[1])
            with contextlib.suppress(OSError):
                os.write(self._wake[0], b"\0")  # ends the thread
            os.close(self._wake[0])
            self._wake = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _count_interrupts(self) -> None:
        """In a thread too: while the main thread waits in a collective for a rank that hangs, it runs no handler."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        if before != -1:  # an event loop's, or of the one around this
            signal.set_wakeup_fd(before)
            os.close(read)
            os.close(write)
            return
        self._wake = write, before
        threading.Thread(target=_third_interrupt_kills, args=(read,), name="interrupts", daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= 3:
                os._exit(130)

    def agreed(self) -> bool:
        """Whether any rank wanted to stop, as of the previous call (of this call in a single process)."""
        mine = self.received is not None
        if dist.world() == 1:
            return mine
        before = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            before = bool(flag.item())
        self._pending = dist.start_agreement(mine)
        return before

    def finish(self) -> None:
        """Wait for the exchange under way; every rank calls it when its loop ends."""
        if self._pending is not None:
            self._pending[1].wait()
            self._pending = None


def _third_interrupt_kills(pipe: int) -> None:
    """Reads the numbers of signals as the C library's handler writes them; a 0 ends it."""
    count = 0
    while (numbers := os.read(pipe, 64)) and 0 not in numbers:
        count += numbers.count(signal.SIGINT)
        if count >= 3:
            os._exit(130)
    os.close(pipe)
