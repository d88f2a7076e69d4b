"""Any image-to-image network as an operation of the augmentation: `package.module:Class`, frozen, in batches on the device."""

import importlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from selfsup.data.rows import on_rows
from selfsup.data.views import View
from selfsup.errors import UserError
from selfsup.wording import one_line

_SIDE = 64  # pixels of the image that a module is tried with, if it is not for views


@lru_cache(maxsize=8)
def image_module(name: str, channels: int, device: torch.device, size: int = _SIDE) -> nn.Module:
    """`package.module:Class` (or a function), called without arguments: an nn.Module with its weights, frozen and in eval().

    It takes float32 [M,C,S,S] in [0, 1] and gives the same. Raises UserError naming `module` if it cannot be imported, is no
    module, or gives another shape.
    """
    where, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(
            f"module={one_line(name)!r}: write package.module:Class, as in mypackage.seasons:SummerToWinter"
        )
    try:
        made = getattr(importlib.import_module(where), attribute)()
    except (Exception, SystemExit) as error:  # a user's own code
        why = one_line(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {one_line(error)}"
        missing = isinstance(error, ModuleNotFoundError) and where.split(".")[0] == error.name
        hint = "; it must be installed, or its folder on PYTHONPATH" if missing else ""
        raise UserError(f"module={one_line(name)!r}: cannot be imported and called: {why}{hint}") from None
    if not isinstance(made, nn.Module):
        raise UserError(f"module={one_line(name)!r} gives a {type(made).__name__}; an nn.Module is needed")
    probe = torch.full((2, channels, size, size), 0.5, device=device)
    try:
        made = made.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        with torch.no_grad():
            got = made(probe)
    except Exception as error:  # a user's own code
        raise UserError(
            f"module={one_line(name)!r} cannot take images [2, {channels}, {size}, {size}]: {one_line(error)}"
        ) from None
    if not isinstance(got, Tensor) or got.shape != probe.shape:
        seen = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise UserError(
            f"module={one_line(name)!r} gives {seen} for images {list(probe.shape)}; it must keep their shape"
        )
    return made


def modules_of(groups: Sequence[Sequence[View]], channels: int, device: torch.device | str) -> list[nn.Module | None]:
    """For each tensor of a batch (`views.resolutions`) what its images may go through."""
    kinds = [(group[0].crops.module, group[0].size) for group in groups]
    return [image_module(name, channels, torch.device(device), size) if name else None for name, size in kinds]


@torch.no_grad()
def through(module: nn.Module, x: Tensor, live: np.ndarray) -> Tensor:
    """Levels [N,C,H,W] of any type, with those rows where `live` [N] is not 0 passed through the module: whole levels,
    unless x is float."""

    def changed(some: Tensor) -> Tensor:
        out = module(some.to(torch.float32) / 255).to(torch.float32) * 255
        return (out if x.is_floating_point() else out.round_()).clamp_(0, 255).to(x.dtype)

    rows = np.flatnonzero(live)
    return on_rows(x.clone(), rows, changed) if rows.size else x
