"""selfsup: train visual backbones without labels and by distillation.

    import selfsup
    model = selfsup.load_backbone(TARGET)                # run, folder, .safetensors, .pth
    config = selfsup.load_config("demo", ["steps=50"])   # a recipe and overrides
    selfsup.train(config, out="runs/mine", dataset=my_dataset)

Names are imported when first used, so that `selfsup --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from selfsup.config import Config
from selfsup.config import load as load_config
from selfsup.errors import EarlyStop, UserError

if TYPE_CHECKING:
    from selfsup.backbones import Features as Features
    from selfsup.backbones import load_backbone as load_backbone
    from selfsup.exits import load_exit as load_exit

__all__ = ["Config", "EarlyStop", "Features", "UserError", "load_backbone", "load_config", "load_exit", "train"]

_LAZY = {"load_backbone": "selfsup.backbones", "Features": "selfsup.backbones", "load_exit": "selfsup.exits"}


def __getattr__(name: str) -> Any:
    if name == "train":  # the module is callable: see the end of train.py
        return importlib.import_module("selfsup.train")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'selfsup' has no attribute {name!r}")
