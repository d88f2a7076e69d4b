"""How a ratio between two programs is measured, and when it may be claimed. No torch here.

One process a side, the same threads; timings interleaved A B B A, so that a drift of the machine falls on both sides
alike; the ratio of each pair; their median with a bootstrap interval. Two processes of the same program, measured in
the same way and in turn with the pairs, say how far the machine itself is from 1.
"""

import math
import os
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MIN_PAIRS = 15
AA_TOLERANCE = 0.05
RTOL = 1e-5

Timer = Callable[[], float]


def interleave(pairs: int) -> Iterator[tuple[str, str]]:
    """(who, with whom) for `pairs` A/B pairs and as many A/A pairs: A B B A, then A C C A, C being a second A."""
    for block in range(0, pairs, 2):
        for other in "BC":
            order = ["A", other, other, "A"] if block + 1 < pairs else ["A", other]
            yield from ((who, other) for who in order)


def measure(timers: Mapping[str, Timer], pairs: int) -> tuple[list[float], list[float]]:
    """Run timers 'A' (ours), 'B' (the peer) and 'C' (ours again) interleaved.

    Returns the ratios B / A and C / A of each pair: above 1 means that A is faster.
    """
    seconds: dict[tuple[str, str], list[float]] = {(who, other): [] for other in "BC" for who in ("A", other)}
    for who, other in interleave(pairs):
        seconds[who, other].append(timers[who]())
    versus, control = ([b / a for a, b in zip(seconds["A", o], seconds[o, o], strict=True)] for o in "BC")
    return versus, control


def bootstrap(
    values: Sequence[float], resamples: int = 5000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the median (Efron, 1979)."""
    if not values:
        raise ValueError("no values")
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples))
    tail = (1 - level) / 2
    return medians[math.floor(tail * (resamples - 1))], medians[math.ceil((1 - tail) * (resamples - 1))]


@dataclass
class Result:
    """One row against one peer. Ratios are the peer's time over ours: above 1, ours is faster."""

    name: str
    peer: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    aa: float | None = None
    """Median ratio of the A/A control; 1.00 +- 0.05 or nothing is claimed."""
    gemm_fraction: float | None = None
    """Our floating-point operations a second over this machine's GEMM peak at the same dtype."""
    peak_bytes: int | None = None
    """Our resident memory at its highest, above what the process held after its imports."""
    claim: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The row as it is written to a file."""
        return dict(vars(self))


def claim(ratio: float, low: float, high: float, aa: float, pairs: int, unit: str = "x as fast") -> str:
    """What may be said: the interval's lower bound, and only if the control landed on 1."""
    if abs(aa - 1) > AA_TOLERANCE:
        return f"too noisy, nothing claimed (A/A {aa:.2f})"
    if pairs < MIN_PAIRS:
        return f"{pairs} pairs are too few, nothing claimed"
    low, high = math.floor(low * 100 + 1e-9) / 100, math.ceil(high * 100 - 1e-9) / 100
    if low > 1:
        return f"at least {low:.2f}{unit}"
    if high < 1:
        return f"slower: at most {high:.2f}{unit}"
    return "no difference shown"


def summarise(result: Result, versus: Sequence[float], control: Sequence[float]) -> Result:
    """Fill in ratio, interval, control and claim."""
    result.ratio, (result.low, result.high) = statistics.median(versus), bootstrap(versus)
    result.aa = statistics.median(control)
    result.claim = claim(result.ratio, result.low, result.high, result.aa, len(versus))
    result.details["pairs"] = len(versus)
    return result


def memory_bytes(key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest so far) of this process in bytes."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(key)


def thread_environment(threads: int) -> dict[str, str]:
    """The same threads and the same waiting policy for every side, set before torch is imported."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "5000",  # threads of a process that waits for its turn must not burn the others' cores
        "HF_HUB_OFFLINE": "1",
    }
