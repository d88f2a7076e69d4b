"""The optimizer of what is trained on a backbone's maps: AdamW with a warm-up and a cosine to 0, the same for every head."""

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor, nn

from selfsup.config import OptimizerConfig
from selfsup.errors import UserError
from selfsup.optim import clip_gradients, create_optimizer, parameter_groups, set_hyperparameters
from selfsup.schedules import Plan, learning_rate

from .detect_settings import DetectSettings
from .segment_settings import SegmentSettings
from .volume_settings import Segment3dSettings

Settings = SegmentSettings | DetectSettings | Segment3dSettings


def steps_of(settings: SegmentSettings | DetectSettings, images: int, usual: float) -> int:
    """`settings.steps` as given, else those of `settings.epochs`, by default of `usual` ones and at least 300."""
    if settings.steps is not None:
        return settings.steps
    epochs, least = (usual, 300) if settings.epochs is None else (settings.epochs, 1)
    return max(least, round(epochs * images / settings.batch))


class Descent:
    """`loss` at step 0, 1, ... -> the next weights.

    named: the parameters that are trained; with a trunk that is not frozen their names say the layer (`layer_decay`). peak: the
    learning rate, by default 1e-3 on frozen features and 1e-4 else.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], settings: Settings, *, frozen: bool, steps: int, images: int
    ) -> None:
        named = list(named)
        self.peak, self.steps = settings.lr or (1e-3 if frozen else 1e-4), steps
        config = OptimizerConfig(
            lr=self.peak, min_lr=0.0, warmup=settings.warmup, weight_decay=settings.weight_decay, weight_decay_end=None
        )
        groups = parameter_groups(named, layer_decay=1.0 if frozen else settings.layer_decay)
        self.optimizer = create_optimizer(config, groups, self.peak)
        self._rate = learning_rate(config, self.peak, Plan(steps, images, settings.batch))
        self._parameters = [p for _, p in named]
        self._clip, self._decay = settings.clip, settings.weight_decay

    def __call__(self, loss: Tensor, step: int) -> None:
        """Take the step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_gradients(self._parameters, self._clip, "global")
        set_hyperparameters(self.optimizer, self._rate(step), self._decay)
        self.optimizer.step()

    def looked_at(self, loss: Tensor, step: int, parts: Mapping[str, Tensor] | None = None) -> float | None:
        """The loss at every tenth step and the last one, where the device is waited for; UserError if it is not finite."""
        if step % 10 and step != self.steps - 1:
            return None
        value = float(loss.detach())
        if not np.isfinite(value):
            said = ", ".join(f"{name} {float(part.detach()):.3g}" for name, part in (parts or {}).items())
            more = f" ({said})" if said else ""
            raise UserError(
                f"step {step}: the loss is {value}{more}; try a smaller lr (it is {self.peak:g}), or precision=fp32"
            )
        return value
