"""The memory of CRD (Tian et al., 2020): a row for each training image and side, N of which every image is told from.

The contract is in `losses.contrastive`. Rows start at random, by the seed. They move between steps alone, so that the loss of
an image does not depend on the micro-batch or the process that it is in; all processes hold the same rows.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from selfsup import dist
from selfsup.losses.contrastive import crd_bank, crd_log_normaliser, crd_update
from selfsup.losses.numerics import unit
from selfsup.methods.contract import ViewBatch
from selfsup.randomness import generator, keyed_integers, mix

_ROWS, _NEGATIVES = 0xC2D0, 0xC2D1


class CRDMemory(nn.Module):
    """`student_rows` and `teacher_rows` [M, D], in the checkpoint; empty until `fill` or a state tells M."""

    after_steps_only: ClassVar[bool] = True

    def __init__(self, dim: int, negatives: int, temperature: float, seed: int) -> None:
        super().__init__()
        self.negatives, self.temperature, self.seed = negatives, temperature, seed
        self.student_rows: Tensor
        self.teacher_rows: Tensor
        self.register_buffer("student_rows", torch.empty(0, dim))
        self.register_buffer("teacher_rows", torch.empty(0, dim))
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # of a step's micro-batches: ids, places, pairs
        self._step = -1

    def fill(self, images: int) -> None:
        """Make random rows for so many images, on our device."""
        for side, name in enumerate(("student_rows", "teacher_rows")):
            like = getattr(self, name)
            drawn = generator(self.seed, _ROWS, side).standard_normal((images, like.shape[1]), dtype=np.float32)
            setattr(self, name, unit(torch.from_numpy(drawn).to(like)))  # uniform on the sphere

    def forward(self, student: Tensor, teacher: Tensor, batch: ViewBatch) -> Tensor:
        """The loss of projections of length 1 of the global views, [V * B, D] each; they are noted for `after_step`."""
        keys = batch.keys(0)  # [V*B]
        ids = batch.ids.repeat(len(keys) // len(batch.ids))  # [B] -> [V*B]
        if batch.step != self._step:
            self._seen, self._step = [], batch.step
        self._seen.append((ids, keys, torch.stack((student.detach(), teacher.detach()), 1)))
        index = torch.cat((ids[:, None], self.draw(batch.step, keys)), 1)  # [V*B, 1+N]
        images, width = self.student_rows.shape
        log_z = crd_log_normaliser(images, width, self.temperature)
        return crd_bank(student, teacher, self.student_rows, self.teacher_rows, index, self.temperature, log_z)

    def draw(self, step: int, keys: Tensor) -> Tensor:
        """N rows, with replacement, for each key (view and place in the global batch): [V*B] -> [V*B, N]."""
        rows = len(self.student_rows)
        assert rows, "Distill.bind tells how many images there are"
        numbers = keys[:, None] * self.negatives + torch.arange(self.negatives, device=keys.device)
        return keyed_integers(mix(self.seed, _NEGATIVES, step), numbers, rows)

    @torch.no_grad()
    def after_step(self, ok: Tensor) -> None:
        """Rows of the step's images move towards what was seen, on every process; none where ok is 0.

        Of an image that was there several times, in other views or at the end of an epoch, the last one counts.
        """
        if not self._seen:
            return
        ids, places, pairs = (dist.all_gather(torch.cat(parts)) for parts in zip(*self._seen, strict=True))
        self._seen = []
        last = last_of_each(ids, places)
        for side, rows in enumerate((self.student_rows, self.teacher_rows)):
            old = rows[ids]
            new = crd_update(old, pairs[last, side].to(old.dtype))
            rows[ids] = torch.where(ok > 0, new, old)  # to the same row always the same

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("student_rows", "teacher_rows"):
            own, stored = getattr(self, name), state_dict.get(prefix + name)
            if len(own) == 0 and stored is not None:  # as when a refused step is computed again, without the data
                setattr(self, name, own.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def last_of_each(ids: Tensor, places: Tensor) -> Tensor:
    """ids, places: int64 [n], places all different -> [n]: where the largest place with the same id is."""
    size = places.max() + 1
    ordered, order = (ids * size + places).sort()
    return order[torch.searchsorted(ordered, (ids + 1) * size) - 1]
