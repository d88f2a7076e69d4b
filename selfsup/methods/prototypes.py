"""What DINO, iBOT and DINOv2 share: schedules of teacher and prototypes, the loss between views, and how a centre moves."""

from typing import Any

import torch
from torch import Tensor

from selfsup import dist
from selfsup.heads import DINOHead
from selfsup.losses.dino import dino_loss
from selfsup.losses.prototypes import prototype_loss
from selfsup.schedules import Plan, Schedule, cosine, linear


def prototype_schedules(o: Any, plan: Plan) -> dict[str, Schedule]:
    """Teacher momentum and temperature, and whether the prototypes are frozen (1 or 0); o: options of DINO, iBOT or DINOv2."""
    freeze = plan.steps_of(o.freeze_last_layer)
    return {
        "momentum": cosine(o.momentum, o.momentum_end, plan.steps),
        "teacher_temp": linear(o.warmup_teacher_temp, o.teacher_temp, plan.steps_of(o.teacher_temp_warmup)),
        "freeze_last_layer": lambda step: float(step < freeze),
    }


def views_loss(head: DINOHead, pooled: Tensor, q: Tensor, temperature: float, *, frozen: bool, fused: bool) -> Tensor:
    """DINO's loss of all views' features [V*B, D], of which the teacher gives probabilities q [G, B, K] of the global ones.

    frozen: the prototypes get no gradient. fused: by `prototype_loss`, unless somebody watches the prototypes.
    """
    x = head.bottleneck(pooled).unflatten(0, (-1, q.shape[1]))  # [V, B, bottleneck]
    prototypes = head.last_layer
    if fused and not prototypes._forward_hooks:  # whoever watches it wants it called
        direction, scale = prototypes.parts(frozen)
        return prototype_loss(x, direction, scale, q, temperature)
    return dino_loss(prototypes(x, frozen), q, temperature)


@torch.no_grad()
def move_center(center: Tensor, total: Tensor, count: Tensor, momentum: float, ok: Tensor) -> None:
    """EMA of a teacher's centre from the sum of its outputs over this rank's images, which is emptied, and the count of all's.

    ok: where it is 0, the centre stays as it is.
    """
    dist.all_reduce_(total)
    center.copy_(torch.where(ok > 0, torch.lerp(total / count, center, momentum), center))
    total.zero_()
