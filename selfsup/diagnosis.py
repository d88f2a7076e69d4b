"""Is a run well? Judged from its metrics.jsonl, while it runs or afterwards: what is wrong, since which step, by which figures.

The trainer itself names a collapse as it happens (`health.CollapseMonitor`); here the same rule is applied to the whole log,
which also shows what needs hindsight: a loss that rises or never fell, and how much of the time went into waiting.
"""

from collections.abc import Callable
from dataclasses import dataclass

from selfsup.columns import Curves
from selfsup.judges import Finding, collapse, diverges, flat, refuses, starves

LEAST = 20
"""Steps with a loss; of fewer, nothing but a certain fault is told."""


@dataclass(frozen=True)
class Diagnosis:
    """All that was seen, the worst first."""

    verdict: str
    """'fine', 'unknown', or the kind of the first problem."""
    findings: list[Finding]

    @property
    def healthy(self) -> bool | None:
        """None: there are too few steps with a loss to say."""
        return None if self.verdict == "unknown" else self.verdict == "fine"


def diagnose(curves: Curves, max_nonfinite: int = 10) -> Diagnosis:
    """Judge a log. max_nonfinite: refused steps in a row that end a run, as its configuration says."""
    judges: list[Callable[[Curves], list[Finding]]] = [
        collapse,
        lambda c: diverges(c, max_nonfinite),
        lambda c: refuses(c, max_nonfinite),
        flat,
        starves,
    ]
    found = [(rank, each) for rank, judge in enumerate(judges) for each in judge(curves)]
    if any(each.problem and rank < 2 for rank, each in found):
        found = [(rank, each) for rank, each in found if each.kind != "flat loss"]  # it is why
    # a cause comes before what it causes; that data is slow harms no weights
    found.sort(
        key=lambda item: (not item[1].problem, item[0] >= 3, item[0] if item[0] >= 3 else 0, item[1].since, item[0])
    )
    findings = [each for _, each in found]
    problem = next((each.kind for each in findings if each.problem), None)
    return Diagnosis(problem or ("fine" if len(curves.known("loss")[0]) >= LEAST else "unknown"), findings)
