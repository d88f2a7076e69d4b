"""What the trainer expects of a method, and what it hands to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.config import Config, Section
from selfsup.data.views import View
from selfsup.schedules import Plan, Schedule


@dataclass(frozen=True)
class ViewBatch:
    """One micro-batch on the training device."""

    images: list[Tensor]
    """One entry a kind of view, float, normalised: [views of this kind, B, C, S, S]."""
    positions: Tensor
    """Place of each image in the global batch, int64 [B]: what drop path and masks are keyed by."""
    labels: Tensor
    """int64 [B], -1 where there is none."""
    ids: Tensor
    """Index in the data set, int64 [B]."""
    step: int
    global_batch: int
    rows: tuple[Tensor, Tensor] | None = None
    """On the host, int64 [B] each: `ids`, and the epochs that the augmentation is drawn for. For what is kept by image
    without asking the device; None where nothing may be kept, as when a refused step is computed again."""
    places: Tensor | None = None
    """`positions` on the host, for what is drawn there; None: ask for them with `on_host`."""

    def on_host(self) -> np.ndarray:
        """`positions` as int64 [B], without waiting for the device if the trainer has made the batch."""
        return (self.positions.cpu() if self.places is None else self.places).numpy()

    def keys(self, kind: int, first_view: int = 0) -> Tensor:
        """A number for each image of `images[kind]`, flattened [views * B], unique in the global batch.

        first_view: the number of views of the kinds before it.
        """
        views = self.images[kind].shape[0]
        view = first_view + torch.arange(views, device=self.positions.device)  # [views]
        return (view[:, None] * self.global_batch + self.positions).reshape(-1)  # [views, B] -> [views * B]


Labels = Literal["unused", "optional", "needed"]
"""What a method does with the labels of its training images; `data.classes` is counted unless they are unused."""


class Method(Protocol):
    """An nn.Module that owns its student, teacher and buffers. Methods share functions, not parents.

    The trainer calls, in this order: `views` once; each step `forward` for every micro-batch, the backward pass of its
    "loss", and `after_step` once the optimizer has moved. `export` is the backbone that evaluation and users get.
    """

    Options: ClassVar[type[Section]]
    """The schema of `method.<option>`."""

    labels: ClassVar[Labels]

    batch_statistics: bool
    """Whether images of a batch influence one another (batch norm): accumulation then is not the large batch."""

    def __init__(self, config: Config, options: Any) -> None: ...

    def views(self) -> list[View]:
        """What the loader must produce."""
        ...

    # A method may have, besides (the trainer asks whether it does):
    #   whole_batch = "why"      its loss is of all images of a step at once: accumulate > 1 is refused, for this reason
    #   takes_teacher = True     `teacher=...` is for it, and a module given to `selfsup.train(teacher=...)` is its third argument
    #   bind(source, views)      called once before the first step, on every rank, with the data and the views in use
    #   classifiers_from(config, state)     class method: `classifiers` of a checkpoint, in eval mode, without the teacher
    #   rate_of(name, parameter) the name of the schedule that is this parameter's learning rate; 'lr' is the trainer's own
    #   suits(backbone)          static method: UserError for a backbone that it cannot train; `selfsup backbones` asks it as well
    #   further()                more backbones by name, for RUN/backbones/NAME and the evaluations of backbones

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """Schedules besides 'lr' and 'wd', by name; their values are in `s` and in the log."""
        ...

    def forward(self, batch: ViewBatch, s: Mapping[str, float]) -> dict[str, Tensor]:
        """{"loss": scalar to differentiate, other names: scalars for the log; 'health/...' ones are monitored}.

        The same names at every step.
        """
        ...

    def after_step(self, s: Mapping[str, float], ok: Tensor) -> None:
        """Moving averages. ok: device scalar; where it is 0 the step was refused and nothing may move.

        The method's own buffers are its own business: what `forward` gathers in one, for the whole step, is taken and emptied
        here. Those of its networks, as running statistics are, the trainer has put back if the step was refused.
        """
        ...

    def export(self) -> Backbone:
        """The backbone to evaluate and hand over."""
        ...

    def backbones(self) -> dict[str, Backbone]:
        """Every backbone by role, for `RUN@role` targets: {'student': ..., 'teacher': ...}."""
        ...

    def classifiers(self) -> dict[str, nn.Module]:
        """What tells classes, by name, the one to use first; {} if nothing does.

        Each takes normalised images [B, C, H, W] and gives logits [B, classes]. They share weights with the method.
        """
        ...
