"""Is this loss a spike? Judged against the median of those before it; what follows from one is the trainer's business."""

import math
import statistics
from collections import deque
from collections.abc import Iterable


class SpikeDetector:
    """Remembers the last `window` losses and names one that stands far above them.

    A spike is a finite loss above factor x median. The distance from the median is measured in multiples of the median's
    size, or of the losses' own scatter (median absolute deviation) where that is larger, so that losses around or
    below zero are judged sensibly too; for a positive, steady loss that is factor x median exactly.

    factor: None judges nothing. window: losses; a verdict needs a quarter of them. Raises ValueError for a factor that is
    not above 1 or a window below 1.
    """

    def __init__(self, factor: float | None, window: int = 64) -> None:
        if factor is not None and not factor > 1:
            raise ValueError(f"factor must be above 1, or None; seen {factor}")
        if window < 1:
            raise ValueError(f"window must be at least 1; seen {window}")
        self.factor, self.window = factor, window
        self._losses: deque[float] = deque(maxlen=window)
        self._last: int | None = None

    def threshold(self) -> float:
        """The loss above which the next one is a spike; infinite as long as too few are known."""
        if self.factor is None or len(self._losses) < max(1, self.window // 4):
            return math.inf
        median = statistics.median(self._losses)
        scatter = statistics.median(abs(x - median) for x in self._losses)
        distance = max((self.factor - 1) * abs(median), self.factor * scatter)
        return median + distance if distance > 0 else math.inf

    def judge(self, step: int, loss: float) -> bool:
        """Whether the loss of `step` is a spike; one that is neither a spike nor NaN nor infinite is remembered.

        Raises ValueError if steps do not increase: after going back to an earlier step, `restore` what was known there.
        """
        if self._last is not None and step <= self._last:
            raise ValueError(
                f"step {step} is judged after step {self._last}; restore the state of the earlier step first"
            )
        self._last = step
        if not math.isfinite(loss):
            return False
        if loss > self.threshold():
            return True
        self._losses.append(loss)
        return False

    def state(self) -> list[float]:
        """The remembered losses, for the checkpoint: a resumed run judges as the uninterrupted one would."""
        return list(self._losses)

    def restore(self, state: Iterable[float]) -> None:
        """Undo `state`; any step may be judged next."""
        self._losses = deque((float(x) for x in state), maxlen=self.window)
        self._last = None
