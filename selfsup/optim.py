"""Parameter groups, optimizers, clipping, and steps that can be refused on the device; `optim_state` saves and loads them."""

import re
from collections.abc import Callable, Mapping, Sequence
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


def parameter_groups(
    named: Sequence[tuple[str, nn.Parameter]],
    layer_decay: float = 1.0,
    decay_all: bool = False,
    rate_of: Callable[[str, nn.Parameter], str] | None = None,
) -> list[dict[str, Any]]:
    """Groups with `names`, `lr_scale`, `wd_scale`, `backbone` (whether it is theirs) and `rate` (the schedule of theirs).

    No weight decay for biases and for what has one dimension (norms), unless `decay_all`.
    layer_decay: learning rate times this for each layer below the last (Clark et al., 2020), for names that hold
    'backbone.'; heads keep 1. rate_of: the schedule of each parameter's learning rate; default: 'lr'.
    """
    trainable = [(n, p) for n, p in named if p.requires_grad]
    depth = max((layer_index(n, -2) for n, _ in trainable if "backbone." in n), default=0)
    groups: dict[tuple[float, float, bool, str], dict[str, Any]] = {}
    for name, p in trainable:
        decay = 0.0 if not decay_all and (p.ndim <= 1 or name.endswith(".bias")) else 1.0
        scale, backbone = 1.0, "backbone." in name
        rate = "lr" if rate_of is None else rate_of(name, p)
        if layer_decay != 1.0 and backbone:
            scale = layer_decay ** (depth + 1 - min(layer_index(name, depth), depth + 1))
        fresh = {"params": [], "names": [], "wd_scale": decay, "lr_scale": scale, "backbone": backbone, "rate": rate}
        group = groups.setdefault((decay, scale, backbone, rate), fresh)
        group["params"].append(p)
        group["names"].append(name)
    return list(groups.values())


def create_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]], peak: float | None = None
) -> torch.optim.Optimizer:
    """The optimizer by name. In each, the rate is the one that `set_hyperparameters` gives, and nothing else scales it.

    adamw     torch's: Loshchilov & Hutter, 2019; with decoupled=false Adam (Kingma & Ba, 2015), with L2 in the gradient
    sgd       torch's, L2 in the gradient; Nesterov's momentum as Sutskever et al., 2013
    lars      timm's: You et al., 2017; trust coefficient 0.001
    lamb      timm's: You et al., 2020, without the clipping that its authors' code adds (`optimizer.clip` does that)
    adafactor timm's AdafactorBigVision: the variant of Zhai et al., 2022, section 3.4, and their code: momentum in bfloat16,
              updates not scaled by the size of the weights, the decay of the second moment at most 0.999. timm's other one
              is that of the first paper (Shazeer & Stern, 2018), which with a schedule from outside is no longer either's
    adabound  pytorch_optimizer's: Luo et al., 2019, algorithm 2, with corrected moments as in the authors' code; the bounds
              are those of `final_lr` times lr / peak, so that they follow the schedule. peak: needed here alone

    lars and lamb scale the decayed parameters by their trust ratios, and the others, as their papers' codes do, not.
    """
    rates: dict[str, Any] = {"lr": 0.0, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        adam = torch.optim.Adam if config.decoupled is False else torch.optim.AdamW
        return adam(groups, **rates, fused=True)
    momentum: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.name == "sgd":
        return with_buffers(torch.optim.SGD(groups, lr=0.0, **momentum, fused=True))
    if config.name == "adabound":
        if peak is None:
            raise ValueError("adabound needs the peak of its learning rate")
        from pytorch_optimizer import AdaBound

        bound = AdaBound(groups, **rates, final_lr=config.final_lr, weight_decouple=bool(config.decoupled))
        bound.base_lrs = [peak] * len(bound.param_groups)
        return bound
    if config.name == "adafactor":
        from timm.optim import AdafactorBigVision

        first, second = config.betas
        dtype = getattr(torch, config.momentum_dtype)
        return AdafactorBigVision(groups, lr=0.0, momentum=first or None, momentum_dtype=dtype, beta2_cap=second)
    from timm.optim import Lamb, Lars

    for group in groups:
        group["always_adapt"] = group["wd_scale"] > 0  # also with weight_decay=0, where timm would leave it out
    if config.name == "lamb":
        return Lamb(groups, **rates, max_grad_norm=None, decoupled_decay=bool(config.decoupled))
    for group in groups:
        group["undone_on_device"] = True
    return with_buffers(Lars(groups, lr=0.0, **momentum, trust_coeff=0.001))


def with_buffers(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """sgd and lars with momentum 0 where there is none yet, which makes no difference to the first step that is taken.

    If the very first one is refused, torch would leave the buffer uninitialised.
    """
    if isinstance(optimizer, torch.optim.SGD) or "trust_coeff" in optimizer.defaults:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if group["momentum"] and "momentum_buffer" not in optimizer.state[p]:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def set_hyperparameters(
    optimizer: torch.optim.Optimizer,
    lr: float,
    weight_decay: float,
    head_weight_decay: float | None = None,
    freeze_backbone: bool = False,
    rates: Mapping[str, float] | None = None,
) -> None:
    """This step's learning rate and weight decay in every group; freeze_backbone: rate 0 for the backbone's groups.

    head_weight_decay: of the other groups; None: the same. rates: of groups whose rate is another schedule than 'lr', by name.
    """
    for group in optimizer.param_groups:
        own = weight_decay if head_weight_decay is None or group["backbone"] else head_weight_decay
        rate = lr if group["rate"] == "lr" else (rates or {})[group["rate"]]
        group["lr"] = 0.0 if freeze_backbone and group["backbone"] else rate * group["lr_scale"]
        group["weight_decay"] = own * group["wd_scale"]


@torch.no_grad()
def add_l1(optimizer: torch.optim.Optimizer, l1: float) -> None:
    """Add a subgradient of l1 * |w| to the gradients of the parameters that are decayed; at w = 0 it is 0.

    After clipping, as L2 is, so that clipping judges the loss alone. Like L2 it goes through momentum and scaling.
    """
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        if l1 and group["wd_scale"] and params:
            torch._foreach_add_([p.grad for p in params], torch._foreach_sign(params), alpha=l1 * group["wd_scale"])


def guarded_step(optimizer: torch.optim.Optimizer, ok: Tensor) -> None:
    """optimizer.step() where ok (a device scalar, 1 or 0) is 1; nothing moves where it is 0.

    Fused optimizers (adamw, sgd) take the flag on the device. lars is computed and then undone there, at the price of a copy
    of weights and momentum. lamb, adafactor and adabound count steps on the host and correct their moments by that count, so
    the host has to look at the flag: once a step it waits for the device.
    """
    if all(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (1 - ok).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif all(group.get("undone_on_device") for group in optimizer.param_groups):
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        moved = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
        before = [t.clone() for t in moved]
        optimizer.step()
        for tensor, old in zip(moved, before):
            tensor.copy_(torch.where(ok > 0, tensor, old))
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
