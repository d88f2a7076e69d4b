"""A proposal as it comes together: overrides, and the reason for each."""

import math
from dataclasses import dataclass

from selfsup import config as configuration


@dataclass(frozen=True)
class Choice:
    """One setting, and why."""

    what: str
    value: str
    why: str


class Plan:
    """Overrides and reasons as they come together."""

    def __init__(self, recipe: str, spec: str) -> None:
        self.recipe = recipe
        self.base = configuration.load(recipe, [])
        self.overrides = [f"data={spec}"]
        self.choices: list[Choice] = []
        self.small = False
        """Whether a small network is proposed, of the demo recipes."""
        self.size = self.local = 0
        """Pixels of global and local crops."""
        self.gpus = 0
        """That it will use."""
        self.free = 0
        """Bytes on all of them together."""
        self.room = 1
        """Images that fit at a time on all of them, no more than a quarter of those there are."""
        self.workers = 1

    def say(self, what: str, value: object, why: str) -> None:
        self.choices.append(Choice(what, str(value), why))

    def set(self, *overrides: str) -> None:
        self.overrides += overrides


def power_below(value: float) -> int:
    """The largest power of two that is not above it, and 1 at least."""
    return 1 << max(0, int(math.log2(max(value, 1))))


def pair(values: tuple[float, float]) -> str:
    """As a list for the command line, without a space that a shell would split."""
    return f"[{values[0]:g},{values[1]:g}]"


def span(seconds: float) -> str:
    """For people: '90 s', '2.5 hours'."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} s"
