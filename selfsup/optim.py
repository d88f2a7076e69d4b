"""Parameter groups, optimizers, clipping, and steps that can be refused on the device."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selfsup.config import OptimizerConfig


def layer_index(name: str, depth: int) -> int:
    """Depth of a backbone parameter for layer-wise decay: 0 for the stem, i + 1 for block i, depth + 1 for the rest."""
    match = re.search(r"\b(?:blocks|layers|layer|stages)[._]?(\d+)", name)
    if match:
        return int(match.group(1)) + 1
    return 0 if re.search(r"embed|stem|cls_token|reg_token|conv1|bn1", name) else depth + 1


def parameter_groups(named: Sequence[tuple[str, nn.Parameter]], layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups with `names`, `lr_scale`, `wd_scale` and `backbone` (whether it is theirs).

    No weight decay for biases and for what has one dimension (norms).
    layer_decay: learning rate times this for each layer below the last (Clark et al., 2020), for names that hold
    'backbone.'; heads keep 1.
    """
    trainable = [(n, p) for n, p in named if p.requires_grad]
    depth = max((layer_index(n, -2) for n, _ in trainable if "backbone." in n), default=0)
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, p in trainable:
        decay = 0.0 if p.ndim <= 1 or name.endswith(".bias") else 1.0
        scale, backbone = 1.0, "backbone." in name
        if layer_decay != 1.0 and backbone:
            scale = layer_decay ** (depth + 1 - min(layer_index(name, depth), depth + 1))
        fresh = {"params": [], "names": [], "wd_scale": decay, "lr_scale": scale, "backbone": backbone}
        group = groups.setdefault((decay, scale, backbone), fresh)
        group["params"].append(p)
        group["names"].append(name)
    return list(groups.values())


def create_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer by name; fused where torch has it, so that a refused step costs no look by the host."""
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
    if config.name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, fused=True)
        if config.momentum:  # torch leaves the buffer uninitialised if the very first step is refused
            for group in groups:
                for p in group["params"]:
                    sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    from timm.optim import Lars

    return Lars(groups, lr=0.0, momentum=config.momentum, trust_coeff=0.001)


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, freeze_backbone: bool = False
) -> None:
    """This step's learning rate and weight decay in every group; freeze_backbone: 0 for the backbone's groups."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if freeze_backbone and group["backbone"] else lr * group["lr_scale"]
        group["weight_decay"] = weight_decay * group["wd_scale"]


def guarded_step(optimizer: torch.optim.Optimizer, ok: Tensor) -> None:
    """optimizer.step() where ok (a device scalar, 1 or 0) is 1; nothing moves where it is 0.

    Fused optimizers take the flag on the device; for the others the host has to look at it.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (1 - ok).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(ok):
        optimizer.step()


@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], limit: float | None, mode: str) -> Tensor:
    """Clip in place; returns the global l2 norm before clipping (a device scalar).

    mode 'parameter' clips each gradient's own norm, as DINO's code does; 'global' the norm over all of them.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), device=parameters[0].device)
    norms = torch._foreach_norm(grads)
    total = torch.linalg.vector_norm(torch.stack([n.float() if n.dtype != torch.float64 else n for n in norms]))
    if limit is not None:
        if mode == "global":
            torch._foreach_mul_(grads, [(limit / (total + 1e-6)).clamp(max=1.0).to(g.dtype) for g in grads])
        else:
            factors = (limit / (torch.stack(norms) + 1e-6)).clamp(max=1.0)  # [number of parameters]
            torch._foreach_mul_(grads, list(factors.unbind()))
    return total


class LossScale(nn.Module):
    """Dynamic loss scaling for fp16 (Micikevicius et al., 2018, section 3.2), held and updated on the device."""

    scale: Tensor
    good_steps: Tensor

    def __init__(self, initial: float = 2.0**16, interval: int = 2000) -> None:
        super().__init__()
        self.interval = interval
        self.register_buffer("scale", torch.tensor(initial))
        self.register_buffer("good_steps", torch.zeros(()))

    @torch.no_grad()
    def unscale_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Divide the gradients by the scale."""
        grads = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(grads, 1.0 / self.scale)

    @torch.no_grad()
    def update(self, ok: Tensor) -> None:
        """Halve after a refused step; double after `interval` good ones in a row."""
        good = (self.good_steps + 1) * ok
        grow = (good >= self.interval).float()
        self.scale.mul_(torch.where(ok > 0, 1.0 + grow, torch.full_like(ok, 0.5)))
        self.good_steps.copy_(good * (1 - grow))


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as one flat dict 'parameter name|key' -> tensor (numbers become scalars)."""
    out: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, p in zip(group["names"], group["params"]):
            for key, value in optimizer.state.get(p, {}).items():
                if value is not None:
                    out[f"{name}|{key}"] = (
                        value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
                    )
    return out


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo `state_tensors`; raises KeyError for a parameter or a shape that this optimizer does not have.

    A fused optimizer would read beyond the end of a moment that is too small.
    """
    by_name = {n: p for group in optimizer.param_groups for n, p in zip(group["names"], group["params"])}
    kinds: dict[str, set[str]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition("|")
        p = by_name.get(name)
        if key == "step":
            fits = p is not None and value.ndim == 0 and value.dtype in (torch.float32, torch.float64)
        else:
            fits = p is not None and value.shape == p.shape and value.dtype == p.dtype
        if not fits:
            raise KeyError(f"{full} of shape {tuple(value.shape)}, {value.dtype}")
        kinds.setdefault(name, set()).add(key)
    everything = set().union(*kinds.values())
    for name, keys in kinds.items():
        if keys != everything:
            raise KeyError(f"{name} lacks {', '.join(sorted(everything - keys))}")
    optimizer.state.clear()
    for full, value in tensors.items():
        name, _, key = full.rpartition("|")
        p = by_name[name]
        if value.shape == p.shape and p.ndim:  # a moment: with the strides of its parameter, which fused kernels assume
            optimizer.state[p][key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        else:  # a step counter, on the device only where the optimizer is fused
            optimizer.state[p][key] = value.clone().to(p.device if optimizer.defaults.get("fused") else "cpu")
