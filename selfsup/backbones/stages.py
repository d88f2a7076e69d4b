"""Maps between the stages of a backbone: with its features in one pass, or of its first stages alone.

A layer is what timm's `feature_info` counts: stages of a pyramid (the stem is the first in ResNets), blocks of a ViT.
"""

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selfsup.backbones.features import Features
from selfsup.errors import UserError

if TYPE_CHECKING:
    from selfsup.backbones.backbone import Backbone

_STEMS = ("stem", "act", "conv", "bn", "norm", "patch_embed")


def layer_names(backbone: "Backbone") -> list[str]:
    """The layers of a backbone as timm names its modules: 'layer1', 'stages.0', 'blocks.3'."""
    info = getattr(backbone.model, "feature_info", None) or []
    return [str(row.get("module", i)) for i, row in enumerate(info)]


def stage_layers(backbone: "Backbone") -> list[int]:
    """The layers that end a stage, but for the last: what may have an exit of its own by default.

    Pyramids: all stages, without the stem. Nets of one resolution (ViTs): after a quarter, a half and three quarters.
    """
    info, names = getattr(backbone.model, "feature_info", None) or [], layer_names(backbone)
    depth = len(names)
    if len({row.get("reduction") for row in info}) == 1:
        return sorted({depth * part // 4 - 1 for part in (1, 2, 3)} - {-1})
    return [i for i in range(depth - 1) if i > 0 or not names[0].startswith(_STEMS)]


def resolve_layers(backbone: "Backbone", layers: Sequence[int], key: str = "layers") -> list[int]:
    """Layers as numbers from 0, negative ones counted from the end. Raises UserError naming `key` and those that exist."""
    names = layer_names(backbone)
    depth = len(names)
    wanted = [i + depth if i < 0 else i for i in layers]
    if any(not 0 <= i < depth for i in wanted):
        known = ", ".join(f"{i} ({name})" for i, name in enumerate(names)) or "none"
        raise UserError(f"{key}={list(layers)}: the layers of {backbone.name} are {known}")
    return wanted


def forward_stages(backbone: "Backbone", images: Tensor, layers: Sequence[int]) -> tuple[Features, list[Tensor]]:
    """`backbone(images)` and `backbone.feature_maps(images, layers, norm=False)`, the same bits, in one pass."""
    if not layers:
        return backbone(images), []
    out, maps = _intermediates(backbone, images, layers, whole=True)
    return backbone._split(out, backbone.model.forward_head(out), images), maps  # type: ignore[operator]


def map_after(backbone: "Backbone", images: Tensor, layer: int) -> Tensor:
    """The map [B, D, h, w] after a layer, as in `feature_maps(norm=False)`; deeper layers are not computed."""
    return _intermediates(backbone, images, [layer], whole=False)[1][0]


def cut_after(backbone: "Backbone", layer: int) -> "Backbone":
    """Remove what comes after a layer, in place: of the result only `map_after(..., layer)` is left."""
    prune = getattr(backbone.model, "prune_intermediate_layers", None)
    if prune is None:
        raise UserError(f"{backbone.name} cannot be cut after a layer: timm has no way to; export the deepest exit")
    resolve_layers(backbone, [layer], "layer")
    prune([layer], prune_norm=True, prune_head=True)
    return backbone


@torch.no_grad()
def map_shapes(backbone: "Backbone", layers: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Shapes (D, h, w) of the backbone's last map and of those after the layers, found with a blank image of its size."""
    like = next(backbone.parameters())
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        blank = torch.zeros(1, backbone.in_chans, *backbone.image_size, device=like.device, dtype=like.dtype)
        features, maps = forward_stages(backbone, blank, layers)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return tuple(features.patches.shape[1:]), [tuple(m.shape[1:]) for m in maps]


def _intermediates(
    backbone: "Backbone", images: Tensor, layers: Sequence[int], whole: bool
) -> tuple[Any, list[Tensor]]:
    """(what `forward_features` gives, or None if not `whole`; a map a layer, in the order asked for)."""
    if backbone.sees != "images":
        raise UserError(
            f"{backbone.name} gives maps of three axes, where those of images are needed; choose another backbone"
        )
    function = getattr(backbone.model, "forward_intermediates", None)
    if function is None:
        raise UserError(f"{backbone.name} does not give intermediate layers; choose another backbone")
    wanted = resolve_layers(backbone, layers)
    order = sorted(set(wanted))
    known = inspect.signature(function).parameters
    if not whole and "stop_early" not in known:
        raise UserError(f"{backbone.name} cannot stop after a layer; choose another backbone")
    given: dict[str, Any] = {"indices": order, "norm": False, "output_fmt": "NCHW", "stop_early": not whole}
    given = {key: value for key, value in given.items() if key in known} | {"intermediates_only": not whole}
    found = backbone._run("forward_intermediates", images, **given)
    out, maps = found if whole else (None, found)
    by_layer = dict(zip(order, maps, strict=True))
    return out, [by_layer[i] for i in wanted]
