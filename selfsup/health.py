"""Is the run collapsing? Judged from figures that every step computes on the device anyway.

A student/teacher method can fail in two silent ways (Caron et al., 2021, section 5.3, figure 7): the teacher's output
becomes uniform (sharpening too weak: the loss sits at ln K), or it becomes constant, one prototype for every image
(centring too weak: the loss goes to 0). In both cases it no longer depends on the image: the mutual information
between image and prototype, H(mean over the batch) - mean H, goes to 0, and the student's features lose their spread.
"""

from collections import deque

PATIENCE = 20
"""Steps in a row before a verdict is given."""

INFORMATION = 0.02
"""Nats; a healthy run has tenths of a nat within its first dozens of steps."""

FEATURE_STD = 0.05
"""Of l2-normalised features times sqrt(D); 1 for features spread evenly over the sphere, 0 for constant ones."""


class CollapseMonitor:
    """Names a collapse once it has lasted PATIENCE steps; steps before `grace` are not judged."""

    def __init__(self, grace: int = 20) -> None:
        self.grace = grace
        self._verdicts: deque[str] = deque(maxlen=PATIENCE)

    def judge(self, step: int, health: dict[str, float]) -> str:
        """'ok', 'collapse: uniform', 'collapse: constant' or 'collapse: features'.

        health: teacher_entropy (fraction of ln K), information (nats), feature_std.
        """
        verdict = "ok"
        if health.get("information", 1.0) < INFORMATION and step >= self.grace:
            verdict = "collapse: uniform" if health.get("teacher_entropy", 0.0) > 0.5 else "collapse: constant"
        elif health.get("feature_std", 1.0) < FEATURE_STD and step >= self.grace:
            verdict = "collapse: features"
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


ADVICE = {
    "collapse: uniform": "the teacher's output is uniform; lower method.teacher_temp, or warm it up for longer",
    "collapse: constant": "every image gets the same prototype; check method.center_momentum, lower the learning rate",
    "collapse: features": "features no longer depend on the image; lower the learning rate, check the crops",
}
