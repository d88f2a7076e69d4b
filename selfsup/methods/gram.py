"""The Gram teacher of DINOv3 (Siméoni et al., 2025, section 4.2): a teacher of some time ago, whose patches were still well
told apart, and which holds the student's similarities between patches where they were.

For student/teacher methods of ViTs: DINOv2 has it. A method gives it a name among its modules, adds `schedules`, adds
s["gram_weight"] * loss(...) where that is above 0, and calls `after_step` after its own moving averages. Both see the same
pixels: the Gram teacher at twice the resolution (section 4.3) is not built, as crops are made at one size.
"""

import torch
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.config import Duration
from selfsup.ema import ema_update
from selfsup.losses.gram import gram_loss
from selfsup.methods.network import momentum_copy
from selfsup.methods.patches import tokens_of
from selfsup.schedules import Plan, Schedule

LATE = 16
"""For so many steps a copy may be late, if the steps before were refused: a run ends after fewer in a row."""


class GramTeacher(nn.Module):
    """A copy of the teacher's backbone that is renewed at given steps."""

    copies: Tensor

    def __init__(self, teacher: Backbone) -> None:
        super().__init__()
        self.backbone = momentum_copy(teacher)
        self.register_buffer("copies", torch.zeros(()))  # how many were taken

    def loss(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Of the student's normalised patch tokens [N*T, D] of global crops [N, C, H, W], which this teacher sees whole."""
        with torch.no_grad():
            anchor = tokens_of(self.backbone, self.backbone(images)).unflatten(0, (len(images), -1))  # [N, T, D]
        return gram_loss(tokens.unflatten(0, (len(images), -1)), anchor)

    def after_step(self, teacher: Backbone, due: float, ok: Tensor) -> None:
        """Become the teacher's backbone if s["gram_copies"] says that a copy is due which was not taken yet, and ok is 1."""
        if due == int(due):  # the host knows at which steps it may be
            new = ok * (self.copies < due)
            ema_update(self.backbone, teacher, 0.0, new)
            self.copies.copy_(torch.where(new > 0, due, self.copies))


def schedules(weight: float, start: Duration, every: Duration, plan: Plan) -> dict[str, Schedule]:
    """'gram_weight': 0 before `start`; 'gram_copies': how many copies are due by the end of a step.

    The first copy is due right before the step `start`, the others `every` so long after it. In DINOv3 they are 1,000,000 and
    10,000 steps. Between them, when nothing is due, the figure has a half added. With a start at 0, which a run has that goes
    on from another, the copy follows step 0 and the weight is there from step 1.
    """
    first, period = plan.steps_of(start), max(1, plan.steps_of(every))

    def copies(step: int) -> float:
        since = step + 1 - first
        if since < 0:
            return 0.5
        return since // period + 1 + (0.0 if since % period < LATE else 0.5)

    return {"gram_weight": lambda step: weight if step >= max(first, 1) else 0.0, "gram_copies": copies}
