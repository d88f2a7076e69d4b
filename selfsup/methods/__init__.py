"""Methods by name. Adding one: write `selfsup/methods/NAME.py` with a class as `contract.Method` says, and a row here."""

import importlib
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from selfsup.config import Config, MethodConfig, suggest, validate
from selfsup.errors import UserError

METHODS = {
    "barlow_twins": "selfsup.methods.barlow_twins:BarlowTwins",
    "byol": "selfsup.methods.byol:BYOL",
    "byot": "selfsup.methods.byot:BYOT",
    "capi": "selfsup.methods.capi:CAPI",
    "deit": "selfsup.methods.deit:DeiT",
    "dino": "selfsup.methods.dino:DINO",
    "dinov2": "selfsup.methods.dinov2:DINOv2",
    "distill": "selfsup.methods.distill:Distill",
    "ibot": "selfsup.methods.ibot:IBOT",
    "ijepa": "selfsup.methods.ijepa:IJEPA",
    "lejepa": "selfsup.methods.lejepa:LeJEPA",
    "mae": "selfsup.methods.mae:MAE",
    "moco": "selfsup.methods.moco:MoCo",
    "mocov3": "selfsup.methods.mocov3:MoCoV3",
    "msn": "selfsup.methods.msn:MSN",
    "simclr": "selfsup.methods.simclr:SimCLR",
    "simmim": "selfsup.methods.simmim:SimMIM",
    "simsiam": "selfsup.methods.simsiam:SimSiam",
    "supcon": "selfsup.methods.supcon:SupCon",
    "supervised": "selfsup.methods.supervised:Supervised",
    "swav": "selfsup.methods.swav:SwAV",
    "vicreg": "selfsup.methods.vicreg:VICReg",
}


def find(name: str) -> type:
    """The class of a method: a name from METHODS, or `package.module:Class` from outside the tree."""
    target = METHODS.get(name, name)
    module, colon, attribute = target.partition(":")
    if not colon:
        raise UserError(
            f"method.name={name!r}{suggest(name, METHODS)}; known: {', '.join(METHODS)}, or package.module:Class"
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # TypeError: a name that begins with a dot
        raise UserError(f"method.name={name!r}: cannot be imported: {error}") from None
    if not isinstance(found, type):
        raise UserError(f"method.name={name!r} is a {type(found).__name__}, not a class")
    options = getattr(found, "Options", None)
    if not isinstance(options, type) or not issubclass(options, BaseModel):
        raise UserError(f"method.name={name!r} is no method: it has no Options (see selfsup.methods.contract)")
    return found


def complete(config: Config) -> Config:
    """`config` with the method's options validated and their defaults filled in."""
    kind: Any = find(config.method.name)
    if config.teacher.path is not None and not getattr(kind, "takes_teacher", False):
        raise UserError(
            f"teacher={config.teacher.path}: method={config.method.name} learns from no other network; leave it out, or use "
            "method=distill"
        )
    reason = getattr(kind, "whole_batch", None)
    if reason is not None and config.accumulate > 1:
        raise UserError(
            f"accumulate={config.accumulate}: method={config.method.name} {reason}; leave it at 1: use more processes, or a "
            "smaller global_batch"
        )
    options = validate(kind.Options, config.method.options, where="configuration", prefix="method.")
    section = MethodConfig(name=config.method.name, **options.model_dump(mode="json"))
    return config.model_copy(update={"method": section})


def create(config: Config, teacher: nn.Module | None = None) -> Any:
    """The method of a completed configuration, with weights that depend on `seed` alone.

    teacher: a trained module for methods that take one, instead of what `config.teacher` names.
    """
    kind: Any = find(config.method.name)
    if teacher is not None and not getattr(kind, "takes_teacher", False):
        raise UserError(f"teacher={type(teacher).__name__}: method={config.method.name} learns from no other network")
    more = {} if teacher is None else {"teacher": teacher}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return kind(config, kind.Options.model_validate(config.method.options), **more)
