"""`selfsup eval attention`: where each head of the last block looks (Caron et al., 2021, figure 1), laid over images."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.errors import UserError

from .canvas import INK, bare, new_figure, save
from .features import transform_for
from .shown import begin, displayed, open_shown, read, said


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Draw into `out` or RUN/pictures/attention.png. Raises UserError for a backbone without attention."""
    settings, opened, path = begin("attention", target, overrides, out)
    if opened.backbone is None or not opened.backbone.has_attention:
        name = "raw pixels" if opened.backbone is None else opened.backbone.name
        use = "eval neighbors" if opened.backbone is None else "eval pca (its feature map as colours) or eval neighbors"
        raise UserError(
            f"eval attention {target}: {name}: no attention over the whole image, that needs a ViT; use {use}"
        )
    shown = open_shown(opened, settings)
    transform = transform_for(opened, shown.images, settings)
    if not dist.is_main():
        return {}
    images, _ = read(shown.images, shown.few(settings.images), transform)
    return said(attention(opened.backbone, images, path, settings.heads))


def attention(backbone: Backbone, images: Tensor, path: Path, max_heads: int = 6) -> Path:
    """Each head's attention of the class token (or the mean query) in the last block, laid over the images.

    images: [N, C, S, S], normalised. One column an image; the first row is the image, the second the mean over heads.
    A map's colours go from its own lowest to its 99th percentile.
    """
    with torch.no_grad():
        maps = backbone.attention(images.to(next(backbone.parameters()).device)).float().cpu()  # [N, heads, h, w]
    heads = maps.shape[1]
    rows = torch.cat([maps.mean(dim=1, keepdim=True), maps[:, :max_heads]], dim=1)  # [N, 1 + shown, h, w]
    size = images.shape[-2:]
    smooth = F.interpolate(rows, size=(8 * rows.shape[2], 8 * rows.shape[3]), mode="bilinear", align_corners=False)
    pictures = displayed(images, backbone.mean, backbone.std)
    count, shown = rows.shape[:2]
    figure = new_figure(1.15 * count + 0.6, 1.15 * (shown + 1) + 0.5)
    grid = figure.subplots(shown + 1, count, squeeze=False)
    names = ["image", "mean", *(f"head {i + 1}" for i in range(shown - 1))]
    colours = matplotlib.colormaps["inferno"]
    for column in range(count):
        bare(grid[0, column])
        grid[0, column].imshow(pictures[column])
        for row in range(shown):
            axes = grid[row + 1, column]
            bare(axes)
            value = smooth[column, row].numpy()
            low, high = float(value.min()), float(np.percentile(value, 99))
            strength = np.clip((value - low) / max(high - low, 1e-12), 0, 1)
            extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
            axes.imshow(pictures[column].mean(axis=2), cmap="gray", vmin=0, vmax=1.4, extent=extent)
            overlay = colours(strength)
            overlay[..., 3] = 0.2 + 0.6 * strength
            axes.imshow(overlay, extent=extent, interpolation="bilinear")
    for row, name in enumerate(names):
        grid[row, 0].set_ylabel(name, fontsize=9, color=INK)
    query = "class token" if getattr(backbone.model, "cls_token", None) is not None else "mean query"
    extra = f", first {max_heads} of {heads} heads" if heads > max_heads else ""
    figure.suptitle(
        _fitting(f"Where the {query} looks: last block, {backbone.name}{extra}", count), fontsize=10, color=INK
    )
    return save(figure, path)


def _fitting(title: str, columns: int) -> str:
    """In two lines over a narrow picture."""
    return title if columns >= 4 else title.replace(": ", ":\n", 1)
