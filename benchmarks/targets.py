"""What each figure should reach on a CPU, as issue 5 lists it, and whether it does."""

from dataclasses import dataclass

from benchmarks.protocol import Result


@dataclass(frozen=True)
class Target:
    """A bound on a ratio. at_least: of the peer's cost over ours; else at most, of ours over the peer's."""

    bound: float
    at_least: bool = True
    also: str = ""
    """What a row must show besides, from its details; see `unmet`."""

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}x" + (f", {self.also}" if self.also else "")


FASTER_NOT = Target(1.0, at_least=False)
TARGETS: dict[tuple[str, str], Target] = {
    ("step", "dino"): Target(1.3),
    ("step", "lightly"): Target(2.0),
    ("step-bf16", "dino"): Target(1.6),
    ("step-bf16", "lightly"): Target(4.5),
    ("small", "lightly"): Target(3.0),
    ("loader", "dino"): Target(2.0),
    ("loader-workers", "dino"): Target(6.0),
    ("knn", "dino"): Target(10.0),
    ("knn-search", "faiss"): Target(1.15, at_least=False),
    ("linear", "dino"): Target(15.0),
    ("linear-cached-10", "torch"): Target(2.0),
    ("linear-cached-1000", "torch"): Target(1.0),
    ("features", "timm"): Target(1.0, also="data-wait < 5 %"),
    ("start", "dino"): FASTER_NOT,
    ("syncs", "dino"): Target(0.0, at_least=False),
    ("memory", "dino"): Target(0.65, at_least=False),
}
DATA_WAIT = 0.05
ROUNDING = 0.005
"""A bound of 1.0 is met by an interval that ends within this of it: equal to the second decimal."""


def judge(result: Result) -> Result:
    """Fill in `target` and `met`: None where nothing may be claimed."""
    target = TARGETS.get((result.name, result.peer))
    if target is None:
        return result
    result.target = str(target)
    if result.low is None or result.high is None or not result.claims:
        return result
    if target.at_least:
        result.met = result.low >= target.bound - ROUNDING
    else:
        result.met = result.high <= target.bound + ROUNDING
    if result.details.get("clock") == "cpu" and result.details.get("threads") != 1:
        result.met = None  # CPU seconds do not see what threads wait for
    elif "data_wait" in result.details:
        result.met = result.met and result.details["data_wait"] < DATA_WAIT
    return result
