"""What a network gives to the losses of distillation, student and teacher alike, in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from selfsup.backbones import Backbone, Features, stages
from selfsup.errors import UserError

Layer = int | str
"""A layer by its number (negative from the end) or by timm's name for it, as in 'layer3' or 'blocks.5'."""


@dataclass(frozen=True)
class Wanted:
    """Which outputs the losses of a run need; nothing else is computed, or stored in a cache."""

    logits: bool = False
    pooled: bool = False
    cls: bool = False
    patches: bool = False
    prototypes: bool = False
    layers: tuple[Layer, ...] = ()

    def __or__(self, other: "Wanted") -> "Wanted":
        """What either needs. The layers must be the same, or those of one be none."""
        if self.layers and other.layers and self.layers != other.layers:
            raise ValueError(f"layers {self.layers} and {other.layers}")
        flags = {f.name: getattr(self, f.name) or getattr(other, f.name) for f in fields(self) if f.name != "layers"}
        return Wanted(**flags, layers=self.layers or other.layers)

    @property
    def names(self) -> list[str]:
        """'logits', 'pooled', 'cls', 'patches', 'prototypes', as far as they are wanted."""
        return [f.name for f in fields(self) if f.name != "layers" and getattr(self, f.name)]


@dataclass
class Outputs:
    """Of N images; what was not wanted, or does not exist, is None."""

    logits: Tensor | None = None
    """[N, classes]."""
    pooled: Tensor | None = None
    """[N, D]."""
    cls: Tensor | None = None
    """[N, D]: the CLS token after the last norm."""
    patches: Tensor | None = None
    """[N, D, h, w]: the last map, after the last norm where tokens have one."""
    prototypes: Tensor | None = None
    """[N, K]: a DINO head's logits, of a teacher less its centre."""
    top_indices: Tensor | None = None
    """int64 [N, k], with the two below in place of logits where a cache keeps the largest alone: `losses.logits.keep_top`."""
    top_values: Tensor | None = None
    """[N, k]."""
    top_rest: Tensor | None = None
    """[N]."""
    maps: list[Tensor] = field(default_factory=list)
    """[N, D, h, w] a layer, as the blocks gave them (no norm)."""

    def named(self) -> dict[str, Tensor]:
        """Those that are there, by name; maps are 'map0', 'map1', ..."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "maps"}
        found |= {f"map{i}": value for i, value in enumerate(self.maps)}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Outputs":
        """Undo `named`."""
        maps = [tensors[f"map{i}"] for i in range(sum(name.startswith("map") for name in tensors))]
        return cls(**{name: value for name, value in tensors.items() if not name.startswith("map")}, maps=maps)


def resolve_layers(backbone: Backbone, layers: Sequence[Layer], key: str) -> list[int]:
    """Their numbers from 0. Raises UserError that names `key` and lists the layers there are."""
    names = stages.layer_names(backbone)
    if not names or not hasattr(backbone.model, "forward_intermediates"):
        raise UserError(f"{key}={_show(layers)}: {backbone.name} does not give intermediate layers; leave it out")
    numbers = [names.index(x) if isinstance(x, str) and x in names else x for x in layers]
    for layer in numbers:
        if isinstance(layer, str):
            known = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
            raise UserError(f"{key}={_show(layers)}: {backbone.name} has no layer {layer!r}; it has {known}")
    return stages.resolve_layers(backbone, [int(x) for x in numbers], key)


def features_and_maps(
    backbone: Backbone, images: Tensor, layers: Sequence[int], classifier: bool = False
) -> tuple[Features, list[Tensor], Tensor | None]:
    """(features, maps [N, D, h, w] after `layers` in this order, logits [N, classes] or None) of one forward pass.

    images: [N, C, H, W]. classifier: the timm model has kept its own; `Features.pooled` is what that one takes.
    """
    if not classifier:
        return (*backbone.forward_stages(images, layers), None)
    model: Any = backbone.model
    if layers:
        final, maps = stages._intermediates(backbone, images, layers, whole=True)
    else:
        final, maps = backbone._run("forward_features", images), []
    features = backbone._split(final, model.forward_head(final, pre_logits=True), images)
    return features, maps, model.forward_head(final)


@torch.no_grad()
def probe(backbone: Backbone, layers: Sequence[int], size: int) -> Outputs:
    """What it gives for one blank image of so many pixels, in eval mode, for the shapes; its mode stays as it is."""
    modes = {m: m.training for m in backbone.modules()}
    backbone.eval()
    features, maps, _ = features_and_maps(backbone, torch.zeros(1, backbone.in_chans, size, size), layers)
    for m, mode in modes.items():
        m.training = mode
    return Outputs(pooled=features.pooled, cls=features.cls, patches=features.patches, maps=maps)


def _show(layers: Sequence[Layer]) -> str:
    return ",".join(str(layer) for layer in layers)
