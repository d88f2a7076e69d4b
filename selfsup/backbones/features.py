"""What every backbone gives: one embedding an image, its tokens, and a map of patch features."""

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """Output of a `Backbone` for B images; h and w are the patch grid (rows, columns).

    pooled: [B, D], what bare timm's `model(images)` gives. cls: [B, D], or None without a CLS token.
    registers: [B, R, D], R may be 0. patches: [B, D', h, w]; D' = D but for the few nets with a wider layer after the
    pooling (MobileNet's). A distillation token (DeiT) is part of `pooled` alone.
    Of B clips of T frames (`ClipBackbone`): patches [B, D, T, h, w]; pooled and cls are of the whole clip.
    Of B volumes (`VolumeBackbone`): patches [B, D, d, h, w], slices first; pooled and cls are of the whole volume.
    """

    pooled: Tensor
    cls: Tensor | None
    registers: Tensor
    patches: Tensor
