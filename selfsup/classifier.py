"""Classifiers: a backbone with a linear head, as a module, and as a folder that bare timm loads with its head.

    timm.create_model("local-dir:RUN/classifier", pretrained=True)(images)      # logits [B, classes]

The folder is that of `backbones.export` with the weights of the head and the names of the classes (`label_names`).
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor, nn

from selfsup.backbones import Backbone
from selfsup.backbones.backbone import _pair
from selfsup.backbones.export import evaluating, folder_config, noise, only_here, write_folder
from selfsup.backbones.load import IMAGENET_MEAN, IMAGENET_STD, _open_folder
from selfsup.backbones.positions import set_pos_interp
from selfsup.config import Config
from selfsup.errors import UserError
from selfsup.wording import one_line

Activation = Literal["softmax", "sigmoid"]
"""What turns logits into probabilities: one distribution over all classes, or a yes or no for each of them."""


class Classifier(nn.Module):
    """Linear head on what a backbone pools; `drop` is in front of it. state dict: `backbone.*`, `head.*`."""

    def __init__(
        self, backbone: Backbone, head: nn.Module, dropout: float = 0.0, activation: Activation = "softmax"
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.drop = nn.Dropout(dropout)
        self.head = head
        self.activation = activation

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W], normalised -> logits [B, classes]."""
        return self.head(self.drop(self.backbone(images).pooled))


class Trained(NamedTuple):
    """What a run has learned to tell classes with, by name (see `methods.contract`), and where that comes from."""

    classifiers: dict[str, nn.Module]
    config: Config
    step: int


class NotAsTimm(Exception):
    """A classifier that no timm model is; the message says why."""


# ------------------------------------------------------------------------------------------------------------- writing


def export_classifier(module: nn.Module, out_dir: str | Path, label_names: Sequence[str] | None = None) -> Path:
    """Write OUT/config.json and OUT/model.safetensors: timm's whole model whose logits are those of `module`.

    module: has a `backbone` (a `Backbone`) and a linear `head`; where timm's model has two heads (DeiT's distilled ones),
    a `head_dist` as well. The same weights give the same bytes. Returns the folder. Raises NotAsTimm where timm has no
    such model, or computes something else with it; UserError if the folder cannot be written.
    """
    own = copy.deepcopy(module).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    backbone = getattr(own, "backbone", None)
    head = getattr(own, "head", None)
    if not isinstance(backbone, Backbone) or not isinstance(head, nn.Linear):
        raise NotAsTimm("it is not a backbone with one linear head")
    if why := only_here(backbone.options):
        raise NotAsTimm(why)
    classes = head.out_features
    config = folder_config(backbone, classes)
    model = _timm_model(config["architecture"], classes, config["model_args"])
    state = {**backbone.model.state_dict(), **_head_tensors(own, model, backbone)}
    model.load_state_dict(state)
    images = noise(backbone, None, batch=2)
    with torch.no_grad(), evaluating(own):
        expected, found = own(images), model.eval()(images)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise NotAsTimm(f"timm's {backbone.name} with a classifier computes something else from the same weights")
    if label_names is not None and len(label_names) == classes:
        config["label_names"] = list(label_names)
    if getattr(module, "activation", "softmax") != "softmax":
        config["selfsup"]["activation"] = module.activation
    return write_folder(Path(out_dir), config, state, "classifier")


def _timm_model(name: str, classes: int, options: dict[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
        return timm.create_model(name, num_classes=classes, **options)


def _head_tensors(own: nn.Module, model: nn.Module, backbone: Backbone) -> dict[str, Tensor]:
    """The heads' weights under timm's names. NotAsTimm unless timm's model is the backbone and these linear layers."""
    named = model.pretrained_cfg.get("classifier")  # type: ignore[union-attr,operator]
    names = [named] if isinstance(named, str) else list(named or [])
    out: dict[str, Tensor] = {}
    for name, attribute in zip(names, ("head", "head_dist")):
        mine = getattr(own, attribute, None)
        theirs: Any = model.get_submodule(name)
        # on a map of one cell a pointwise convolution is a linear layer
        pointwise = isinstance(theirs, nn.Conv2d) and theirs.kernel_size == (1, 1)
        if not isinstance(mine, nn.Linear) or not (isinstance(theirs, nn.Linear) or pointwise):
            kinds = f"{type(theirs).__name__} {name!r} of timm's {backbone.name}, {type(mine).__name__} here"
            raise NotAsTimm(f"both sides need a linear layer: {kinds}")
        shape = model.get_parameter(f"{name}.weight").shape
        if shape[:2] != mine.weight.shape or (theirs.bias is None) != (mine.bias is None):
            raise NotAsTimm(f"{name!r} of timm's {backbone.name} has another shape than the head")
        out[f"{name}.weight"] = mine.weight.detach().reshape(shape)
        if mine.bias is not None:
            out[f"{name}.bias"] = mine.bias.detach()
    needed = model.state_dict().keys()
    odd = sorted(needed ^ (backbone.model.state_dict().keys() | out.keys()))
    if not out or odd:
        what = f"more than a linear layer behind its features ({odd[0]})" if odd else "no classifier that it names"
        raise NotAsTimm(f"timm's {backbone.name} has {what}")
    return out


# ------------------------------------------------------------------------------------------------------------- reading


class Exported(NamedTuple):
    """A classifier from a folder: timm's model in eval mode, and what its images must be like."""

    module: nn.Module
    classes: int
    label_names: list[str] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    """Pixels, square."""
    in_chans: int
    activation: Activation


def has_classifier(folder: Path) -> bool:
    """Whether this is a folder of timm's (config.json) that holds a model with classes."""
    return bool(_classes(_recorded(folder)))


def label_names(folder: Path) -> list[str] | None:
    """Names of the classes that the classifier in this folder tells, if it says so."""
    recorded = _recorded(folder)
    return _names(recorded, _classes(recorded))


def _recorded(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _classes(recorded: dict[str, Any]) -> int:
    found = recorded.get("num_classes", _cfg(recorded).get("num_classes", 0))
    return found if type(found) is int and found > 0 else 0


def _names(recorded: dict[str, Any], classes: int) -> list[str] | None:
    names = recorded.get("label_names") or _cfg(recorded).get("label_names")
    if not isinstance(names, (list, tuple)) or len(names) != classes:
        return None
    return [str(name) for name in names]


def _cfg(recorded: dict[str, Any]) -> dict[str, Any]:
    found = recorded.get("pretrained_cfg", recorded)
    return found if isinstance(found, dict) else {}


def load_classifier(folder: str | Path) -> Exported:
    """The classifier in a folder of ours, or in any that timm's `save_for_hf` wrote. UserError if there is none."""
    source = _open_folder(Path(folder))
    recorded = source.recorded
    cfg, classes = _cfg(recorded), _classes(recorded)
    if not classes:
        raise UserError(f"{folder}: a backbone without a classifier; use selfsup eval linear, or eval knn")
    channels, height, width = cfg.get("input_size", (3, 224, 224))
    args = {"in_chans": channels, **recorded.get("model_args", {})}
    args.pop("num_classes", None)
    try:
        model = _timm_model(recorded["architecture"], classes, args)
        model.load_state_dict(source.state)
    except (RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise UserError(
            f"{folder}: timm's {recorded['architecture']} does not take its options and weights: {one_line(error, 160)}"
        ) from None
    set_pos_interp(model, recorded.get("selfsup", {}).get("pos_interp", "timm"))
    channels = args["in_chans"]
    mean, std = tuple(cfg.get("mean", IMAGENET_MEAN)), tuple(cfg.get("std", IMAGENET_STD))
    if len(mean) != channels or len(std) != channels:
        mean, std = (0.5,) * channels, (0.25,) * channels
    size = max(_pair(args.get("img_size") or (height, width)))
    activation: Activation = "sigmoid" if recorded.get("selfsup", {}).get("activation") == "sigmoid" else "softmax"
    return Exported(model.eval(), classes, _names(recorded, classes), mean, std, size, channels, activation)
