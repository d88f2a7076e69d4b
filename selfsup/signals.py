"""Stop signals set a flag; the ranks agree on it at a step boundary, save together, and exit 75."""

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
        self._pending: tuple[torch.Tensor, td.Work] | None = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                before = self._before[number] = signal.signal(number, self._on_signal)
                outer = getattr(before, "__self__", None)
                if isinstance(outer, StopSignals):
                    self.received = self.received or outer.received
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
