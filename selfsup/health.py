"""Is the run collapsing? Judged from figures that every step computes on the device anyway.

A student/teacher method can fail in two silent ways (Caron et al., 2021, section 5.3, figure 7): the teacher's output
becomes uniform (sharpening too weak: the loss sits at ln K), or it becomes constant, one prototype for every image
(centring too weak: the loss goes to 0). In both cases it no longer depends on the image: the mutual information
between image and prototype, H(mean over the batch) - mean H, goes to 0, and the student's features lose their spread.
"""

from collections import deque
from collections.abc import Mapping

PATIENCE = 20
"""Steps in a row before a verdict is given."""

GRACE = 20
"""Steps at the beginning that are not judged."""

INFORMATION = 0.02
"""Nats; a healthy run has tenths of a nat within its first dozens of steps."""

FEATURE_STD = 0.05
"""Of l2-normalised features times sqrt(D); 1 for features spread evenly over the sphere, 0 for constant ones."""


SLOW_DATA = 0.2
"""Part of the time spent waiting for data above which a run says what to change."""


def collapse_of(health: Mapping[str, float]) -> str:
    """'ok' or the kind of collapse that one step's figures show.

    health: teacher_entropy (fraction of ln K), information (nats), feature_std, as far as the method has them.
    """
    if health.get("information", 1.0) < INFORMATION:
        return "collapse: uniform" if health.get("teacher_entropy", 0.0) > 0.5 else "collapse: constant"
    return "collapse: features" if health.get("feature_std", 1.0) < FEATURE_STD else "ok"


class CollapseMonitor:
    """Names a collapse once it has lasted PATIENCE steps; steps before `grace` are not judged."""

    def __init__(self, grace: int = GRACE) -> None:
        self.grace = grace
        self._verdicts: deque[str] = deque(maxlen=PATIENCE)

    def judge(self, step: int, health: dict[str, float]) -> str:
        """'ok', 'collapse: uniform', 'collapse: constant' or 'collapse: features'; health: as `collapse_of` takes it."""
        verdict = collapse_of(health) if step >= self.grace else "ok"
        self._verdicts.append(verdict)
        if verdict != "ok" and len(self._verdicts) == PATIENCE and all(v != "ok" for v in self._verdicts):
            return verdict
        return "ok"

    def state(self) -> list[str]:
        """For the checkpoint: a resumed run judges as the uninterrupted one would."""
        return list(self._verdicts)

    def restore(self, state: list[str]) -> None:
        """Undo `state`."""
        self._verdicts = deque(state, maxlen=PATIENCE)
