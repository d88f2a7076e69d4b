"""The teacher as an exponential moving average of the student."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float, ok: Tensor | None = None) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student for parameters; buffers are copied.

    ok: scalar tensor, 1 or 0, on the device: where it is 0 the teacher keeps its value bit for bit, without the host
    having to look (the student did not move either, its step having been skipped).
    """
    targets: list[Tensor] = list(teacher.parameters())
    sources: list[Tensor] = list(student.parameters())
    if len(targets) != len(sources):
        raise ValueError(f"teacher has {len(targets)} parameters, student {len(sources)}")
    if ok is None:
        torch._foreach_lerp_(targets, sources, 1 - momentum)
    else:
        weights: dict[torch.dtype, Tensor] = {}
        for t in targets:
            if t.dtype not in weights:
                weights[t.dtype] = ok.to(t.dtype) * (1 - momentum)
        torch._foreach_lerp_(targets, sources, [weights[t.dtype] for t in targets])
    buffers = list(teacher.buffers())
    if buffers:
        torch._foreach_copy_(buffers, list(student.buffers()))
