"""Which features: a pooling of a layer, for any backbone, and for raw pixels."""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selfsup.backbones import Backbone
from selfsup.errors import UserError

from .settings import FeatureSettings
from .targets import Target

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Request(NamedTuple):
    """One feature: a pooling of a layer. layer: index (negative from the end) or 'lastN', the last N concatenated."""

    pooling: str
    layer: int | str = -1

    @property
    def name(self) -> str:
        """'cls+patchmean', 'cls@last4', 'patchmean@5'."""
        return self.pooling if self.layer == -1 else f"{self.pooling}@{self.layer}"


def layer_count(backbone: Backbone) -> int:
    """Blocks of a ViT, stages of a pyramid."""
    return len(getattr(backbone.model, "feature_info", None) or [])


def check_requests(target: Target, requests: Sequence[Request]) -> None:
    """Raise UserError for a layer or pooling that this target does not have."""
    for request in requests:
        if request.pooling == "pooled" and request.layer != -1:
            raise UserError(
                f"layer={request.layer} with pooling=pooled: it is the backbone's own output; use cls or patchmean"
            )
        if target.backbone is None:
            if request != Request("pooled"):
                raise UserError(
                    f"pooling={request.pooling}, layer={request.layer}: raw pixels have neither; leave both out"
                )
        elif request.layer != -1:
            _layers_of(target.backbone, request.layer)


def _layers_of(backbone: Backbone, layer: int | str) -> list[int]:
    """Layers from the end: -1 -> [1], 'last3' -> [3, 2, 1], 5 of 12 -> [7]."""
    count = layer_count(backbone)
    far = int(layer[4:]) if isinstance(layer, str) else (-layer if layer < 0 else count - layer)
    if not 1 <= far <= count:
        raise UserError(
            f"layer={layer}: {backbone.name} has layers 0 to {count - 1} (or -1 to -{count}, or last{count})"
        )
    return list(range(far, 0, -1)) if isinstance(layer, str) else [far]


def compute(backbone: Backbone | None, images: Tensor, requests: Sequence[Request]) -> list[Tensor]:
    """Features of a batch [B, C, S, S]: [B, D_r] a request. One forward pass for the last layer, one for all the others."""
    if backbone is None:
        return [images.flatten(1) for _ in requests]
    far = max((_layers_of(backbone, r.layer)[0] for r in requests if r.layer != -1), default=0)
    tokens = backbone.tokens(images, far) if far else []
    if any(r.layer == -1 for r in requests):
        f = backbone(images)
        last = (f.cls, f.patches.mean(dim=tuple(range(2, f.patches.ndim))))
    out = []
    for request in requests:
        if request.pooling == "pooled":
            out.append(f.pooled)
            continue
        chosen = [last] if request.layer == -1 else [tokens[-n] for n in _layers_of(backbone, request.layer)]
        parts = []
        for cls, patchmean in chosen:
            if "cls" in request.pooling:
                if cls is None:
                    raise UserError(
                        f"pooling={request.pooling}: {backbone.name} has no class token; use pooled or patchmean"
                    )
                parts.append(cls)
            if "patchmean" in request.pooling:
                parts.append(patchmean)
        out.append(torch.cat(parts, dim=1))
    return out


def forward_function(
    target: Target, settings: FeatureSettings, requests: Sequence[Request]
) -> Callable[[Tensor], list[Tensor]]:
    """Batch on the host -> float32 features on the target's device, without gradients, in the asked precision."""
    kind = target.device.type

    @torch.no_grad()
    def forward(images: Tensor) -> list[Tensor]:
        images = images.to(target.device, non_blocking=True)
        cast = (
            torch.autocast(kind, _DTYPES[settings.precision])
            if settings.precision in _DTYPES
            else contextlib.nullcontext()
        )
        with cast:
            return [x.float() for x in compute(target.backbone, images, requests)]

    return forward
