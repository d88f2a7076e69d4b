"""How a ratio between two programs is measured, and when it may be claimed. No torch here.

One process a side, the same threads; timings interleaved A B C, C B A, where A and C are both ours: without C that is
A B B A, so that a drift of the machine falls on both sides alike. The ratio of each pair; their median with a bootstrap
interval. A and C, two processes of the same program, say how far the machine itself is from 1.
"""

import math
import os
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIN_PAIRS = 15
AA_TOLERANCE = 0.05
RTOL = 1e-5

Timer = Callable[[], float]


def interleave(pairs: int) -> Iterator[str]:
    """Who is timed, in order: A B C, C B A, A B C, ... for `pairs` timings of each."""
    for n in range(pairs):
        yield from "ABC" if n % 2 == 0 else "CBA"


def measure(
    timers: Mapping[str, Timer], pairs: int, tick: Callable[[int], object] = lambda done: None
) -> tuple[list[float], list[float]]:
    """Run timers 'A' (ours), 'B' (the peer) and 'C' (ours again) interleaved; tick(n) is called after the n-th pair.

    Returns the ratios B / A and C / A of each pair: above 1 means that A is faster.
    """
    seconds: dict[str, list[float]] = {who: [] for who in "ABC"}
    for n, who in enumerate(interleave(pairs), start=1):
        seconds[who].append(timers[who]())
        if n % 3 == 0:
            tick(n // 3)
    versus, control = ([b / a for a, b in zip(seconds["A"], seconds[who], strict=True)] for who in "BC")
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
    """One row against one peer. Ratios are the peer's cost over ours: above 1, ours is cheaper.

    With `at_most` they are ours over the peer's: the rows whose target is an upper bound.
    """

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
    at_most: bool = False
    claims: bool = False
    """Whether anything may be claimed: control, pairs and equality are in order."""
    target: str | None = None
    met: bool | None = None
    """Whether the interval reaches the target; None where nothing is claimed or there is no target."""
    details: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """The row as it is written to a file."""
        return dict(vars(self))


def refusal(aa: float, pairs: int, least: int = MIN_PAIRS) -> str:
    """Why nothing may be claimed, or ''."""
    if abs(aa - 1) > AA_TOLERANCE:
        return f"too noisy, nothing claimed (A/A {aa:.2f})"
    if pairs < least:
        return f"{pairs} pairs are too few, nothing claimed"
    return ""


def claim(low: float, high: float, at_most: bool = False) -> str:
    """What may be said: the bound of the interval that is nearer to 1, rounded towards 1."""
    low, high = math.floor(low * 100 + 1e-9) / 100, math.ceil(high * 100 - 1e-9) / 100
    if at_most:
        if high < 1:
            return f"at most {high:.2f}x of the peer's"
        return f"more: at least {low:.2f}x of the peer's" if low > 1 else "no difference shown"
    if low > 1:
        return f"at least {low:.2f}x as fast"
    if high < 1:
        return f"slower: at most {high:.2f}x as fast"
    return "no difference shown"


def summarise(
    result: Result, versus: Sequence[float], control: Sequence[float], at_most: bool = False, least: int = MIN_PAIRS
) -> Result:
    """Fill in ratio, interval, control and claim. at_most: give the ratios the other way round."""
    versus = [1 / v for v in versus] if at_most else list(versus)
    result.ratio, (result.low, result.high) = statistics.median(versus), bootstrap(versus)
    result.aa, result.at_most = statistics.median(control), at_most
    why = refusal(result.aa, len(versus), least)
    result.claims, result.claim = not why, why or claim(result.low, result.high, at_most)
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
    """The same threads and the same waiting policy for every side, set before torch is imported; this folder's code."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "5000",  # threads of a process that waits for its turn must not burn the others' cores
        "HF_HUB_OFFLINE": "1",
    }
