"""Do evaluations still get better? Judged against the best so far; that a run then ends is the trainer's business."""

import math
from collections.abc import Collection, Mapping
from typing import Any, Literal

from selfsup.config import suggest
from selfsup.errors import UserError
from selfsup.wording import one_line

PREFERRED = ("top1", "knn_top1")
"""Figures that are judged unless another is named: the first that there is."""


class EarlyStopping:
    """Counts evaluations in a row that were not better than the best before them by more than `min_delta`.

    patience: so many end the run; None judges nothing. metric: which figure; None: as PREFERRED. mode: "max" if larger is
    better, "min" if smaller. What is not finite is never better. Raises ValueError for a patience below 1 or a negative
    min_delta.
    """

    def __init__(
        self,
        patience: int | None,
        metric: str | None = None,
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
    ) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be at least 1, or None; seen {patience}")
        if min_delta < 0:
            raise ValueError(f"min_delta must not be negative; seen {min_delta}")
        self.patience, self.mode, self.min_delta = patience, mode, min_delta
        self._asked = metric
        self.metric = metric
        """The figure that is judged; None until it is known."""
        self.best: float | None = None
        self.best_step = 0
        """Where the best was seen; 0 before any."""
        self.waited = 0
        """Evaluations since."""

    @property
    def stopped(self) -> bool:
        """Whether the run is to end."""
        return self.patience is not None and self.waited >= self.patience

    def judge(self, step: int, figures: Mapping[str, float]) -> bool:
        """Count the evaluation of `step`; whether the run is to end with it.

        Raises UserError if it has no such figure.
        """
        if self.patience is None:
            return False
        if self._asked is None and self.metric not in figures:
            self.restore({})
            self.metric = next((name for name in PREFERRED if name in figures), None)
        if self.metric is None or self.metric not in figures:
            given = ", ".join(sorted(figures)) or "no figures"
            raise UserError(
                f"early_stop.metric={one_line(self._asked or ' or '.join(PREFERRED), 40)}: the evaluation of step {step} gives "
                f"{given}; name one of them, or leave out early_stop.patience"
            )
        value = float(figures[self.metric])
        if self._better(value):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1
        return self.stopped

    def check(self, figures: Collection[str]) -> None:
        """Raise UserError if evaluations, which will give these figures, do not give the one that is asked for."""
        if self.patience is None or (self._asked in figures if self._asked else any(x in figures for x in PREFERRED)):
            return
        asked = self._asked or " or ".join(PREFERRED)
        raise UserError(
            f"early_stop.metric={one_line(asked, 40)}{suggest(asked, figures)}; the evaluations of this run give "
            f"{', '.join(figures) or 'no figures'}; name one of them, or leave out early_stop.patience"
        )

    def _better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        gain = value - self.best if self.mode == "max" else self.best - value
        return gain > self.min_delta

    def why(self, step: int) -> str:
        """For people: why the run ended at `step`."""
        since = f"has not improved since step {self.best_step}" if self.best_step else "was never finite"
        return f"stopped early at step {step}: {self.metric} {since}"

    def state(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run judges as the undisturbed one would. "stopped" is for readers."""
        return {
            "metric": self.metric,
            "mode": self.mode,
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
            "stopped": self.stopped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo `state`; {} is that of the beginning. What is known of another figure than is judged now is forgotten."""
        known = bool(state) and state["mode"] == self.mode and self._asked in (None, state["metric"])
        self.metric = state["metric"] if known else self._asked
        self.best = state["best"] if known else None
        self.best_step, self.waited = (state["best_step"], state["waited"]) if known else (0, 0)
