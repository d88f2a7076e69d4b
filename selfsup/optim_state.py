"""The state of an optimizer as a flat table of tensors, and back: what a checkpoint holds of it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selfsup.optim import with_buffers

SCALARS = (torch.float32, torch.float64)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as one flat dict 'parameter name|key' -> tensor (numbers become scalars).

    Of an optimizer that counts the steps of a group (lamb, adabound), each of the group's parameters has its count.
    """
    out: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"]):
            for key, value in optimizer.state.get(p, {}).items():
                if value is not None:
                    out[f"{name}|{key}"] = _tensor(value)
            if "step" in group:
                out[f"{name}|step"] = _tensor(group["step"]).clone()
    return out


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `state_tensors`; raises KeyError, changing nothing, for what this optimizer's own state would not look like.

    A fused optimizer would read beyond the end of a moment that is too small.
    """
    fresh = _Fresh(optimizer)
    kinds: dict[str, set[str]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("|")
        if not _fits(key, value, fresh.state.get(name, {}).get(key)):
            raise KeyError(f"{full} of shape {tuple(value.shape)}, {value.dtype}")
        kinds.setdefault(name, set()).add(key)
    for name, keys in kinds.items():
        lacking = fresh.state[name].keys() - keys
        if lacking and not (fresh.counts_groups and keys == {"step"}):  # a parameter that has had no gradient yet
            raise KeyError(f"{name} lacks {', '.join(sorted(lacking))}")
    counts = [_count(group["names"], tensors) for group in optimizer.param_groups] if fresh.counts_groups else []

    optimizer.state.clear()
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"]):
            for key in fresh.state[name].keys() & kinds.get(name, set()):
                value = tensors[f"{name}|{key}"]
                if key == "step":
                    if not fresh.counts_groups:  # on the device only where the optimizer is fused
                        optimizer.state[p][key] = value.clone().to(p.device if group.get("fused") else "cpu")
                elif value.shape == p.shape:  # with the strides of its parameter, which fused kernels assume
                    optimizer.state[p][key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
                else:
                    optimizer.state[p][key] = value.clone().to(p.device)
    for group, count in zip(optimizer.param_groups, counts):
        group.pop("step", None)
        if count is not None:
            like = fresh.count
            group["step"] = torch.tensor(count, dtype=like.dtype) if isinstance(like, Tensor) else int(count)
    with_buffers(optimizer)


def _fits(key: str, value: Tensor, like: Tensor | None) -> bool:
    if like is None or value.shape != like.shape:
        return False
    if key == "step":
        return value.dtype in SCALARS and 0 <= value.item() < math.inf
    return value.dtype == like.dtype


def _count(names: list[str], tensors: Mapping[str, Tensor]) -> float | None:
    """The steps of a group; None before the first."""
    found = {tensors[full].item() if (full := f"{name}|step") in tensors else None for name in names}
    if len(found) > 1:
        raise KeyError(f"step of {names[0]} and of others that move together: {found}")
    return found.pop() if found else None


class _Fresh:
    """What the state is like after the first step: shapes and types, on no device.

    Of torch's optimizers that is known; another one takes a step over parameters without memory.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.state: dict[str, dict[str, Tensor]] = {}
        """Parameter name -> key -> a tensor as it must be."""
        self.counts_groups = False
        """Whether steps are counted a group, not a parameter."""
        self.count: Any = None
        """Such a count."""
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD)):  # AdamW is an Adam
            step = torch.zeros((), dtype=torch.float32)
            for group in optimizer.param_groups:
                for name, p in zip(group["names"], group["params"]):
                    if isinstance(optimizer, torch.optim.SGD):
                        self.state[name] = {"momentum_buffer": p} if group["momentum"] else {}
                    else:
                        self.state[name] = {"exp_avg": p, "exp_avg_sq": p, "step": step}
            return
        groups = []
        for group in optimizer.param_groups:
            params = [torch.empty_like(p, device="meta", requires_grad=True) for p in group["params"]]
            for p in params:
                p.grad = torch.empty_like(p)
            groups.append({**{k: v for k, v in group.items() if k != "step"}, "params": params, "lr": 1.0})
        kind: Any = type(optimizer)
        trial = kind(groups)
        trial.step()
        for group in trial.param_groups:
            self.counts_groups |= "step" in group
            self.count = group.get("step", self.count)
            for name, p in zip(group["names"], group["params"]):
                self.state[name] = {k: _tensor(v) for k, v in trial.state.get(p, {}).items() if v is not None}
                if "step" in group:
                    self.state[name]["step"] = torch.zeros(())
