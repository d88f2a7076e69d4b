"""Activation checkpointing that repeats exactly what the forward pass did (Chen et al., 2016).

timm's own switch recomputes a block with whatever masks its drop path holds at backward time, and counts a batch twice
in the running statistics of batch norm. Here each block keeps the draws of its forward pass, and batch norm is held
still while recomputing, so that results do not depend on the switch. Under `torch.compile` blocks with batch norm are
not recomputed.
"""

import contextlib
import re
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from selfsup.backbones.stochastic import capture, restart_all
from selfsup.errors import UserError


def find_blocks(model: nn.Module, name: str) -> list[nn.Module]:
    """The blocks of a timm model, by its own `group_matcher`. Raises UserError where timm declares none."""
    try:
        patterns = model.group_matcher(coarse=False)["blocks"]  # type: ignore[operator]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"grad_checkpointing=true: timm does not say what blocks {name} has; leave it false") from None
    if isinstance(patterns, str):
        patterns = [(patterns, None)]
    expressions = [re.compile(p[0] if isinstance(p, (tuple, list)) else p) for p in patterns]
    # A block itself, not its parts: the pattern has to consume the whole name, and the block to hold parameters.
    found = {
        path: module
        for path, module in model.named_modules()
        if any(e.fullmatch(path) for e in expressions) and any(True for _ in module.parameters())
    }
    outermost = [m for path, m in found.items() if not any(path.startswith(f"{other}.") for other in found)]
    if not outermost:
        raise UserError(f"grad_checkpointing=true: {name} has no blocks to recompute; leave it false")
    return outermost


def set_checkpointing(model: nn.Module, enable: bool, name: str) -> None:
    """Recompute the blocks of `model` in the backward pass, or stop doing so."""
    if enable:
        try:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
            model.set_grad_checkpointing(False)  # type: ignore[operator]
        except (AttributeError, AssertionError):
            raise UserError(f"grad_checkpointing=true: timm's {name} does not support it; leave it false") from None
    for block in find_blocks(model, name) if enable else list(model.modules()):
        if enable:
            block.forward = types.MethodType(_forward, block)  # a bound method follows its block through deepcopy
        elif getattr(block.__dict__.get("forward"), "__func__", None) is _forward:
            del block.forward


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `forward` of a block."""
    plain = type(self).forward
    if not (self.training and torch.is_grad_enabled()):
        return plain(self, *args, **kwargs)
    if torch.compiler.is_compiling():
        if _norms(self):  # a compiled recomputation would read running statistics that have moved on
            return plain(self, *args, **kwargs)
        restart_all(self)  # the graph holds the masks as inputs: nothing to put back
        return checkpoint(_traced, self, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
    restored = capture(self)

    @contextlib.contextmanager
    def recompute() -> Iterator[None]:
        with restored(), _still_statistics(self):
            yield

    return checkpoint(
        plain,
        self,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), recompute()),
        **kwargs,
    )


def _traced(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's forward that leaves the counts of calls as it found them, which tracing demands."""
    out = type(block).forward(block, *args, **kwargs)
    restart_all(block)
    return out


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextlib.contextmanager
def _still_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch, as in the forward pass, but does not count the batch again."""
    norms = _norms(module)
    buffers = [(m.running_mean, m.running_var, m.num_batches_tracked) for m in norms]
    for norm in norms:
        for key in ("running_mean", "running_var", "num_batches_tracked"):
            value = norm._buffers[key]
            norm._buffers[key] = None if value is None else value.clone()
    try:
        yield
    finally:
        for norm, (mean, var, count) in zip(norms, buffers):
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, var, count
