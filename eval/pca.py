"""`selfsup eval pca`: patch features as colours, by one PCA over all images (Oquab et al., 2024, DINOv2, figure 1)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.errors import UserError

from .canvas import INK, bare, new_figure, save
from .dense import maps_of
from .features import transform_for
from .shown import begin, displayed, open_shown, read, said

_LEAST_CELLS = 4  # a map with fewer cells a side says nothing as a picture


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Draw into `out` or RUN/pictures/pca.png. Raises UserError for raw pixels, and for maps of too few cells."""
    settings, opened, path = begin("pca", target, overrides, out)
    if opened.backbone is None:
        raise UserError("eval pca pixels: raw pixels have no patch features; name a run or a backbone")
    shown = open_shown(opened, settings)
    transform = transform_for(opened, shown.images, settings)
    if not dist.is_main():
        return {}
    images, _ = read(shown.images, shown.few(settings.images), transform)
    layer = settings.layer if settings.layer is not None else map_layer(opened.backbone, images)
    if layer is None:
        raise UserError(
            f"size={transform.size}: no map of {opened.backbone.name} has {_LEAST_CELLS} x {_LEAST_CELLS} cells; give a larger "
            f"size, as in size={_LEAST_CELLS * opened.backbone.stride}"
        )
    limit = settings.threshold if settings.foreground else None
    return said(patch_pca(opened.backbone, images, path, layer, foreground=limit))


def map_layer(backbone: Backbone, images: Tensor) -> int | None:
    """The last layer whose map has at least 4 x 4 cells; None if there is none (or no layers are given)."""
    count = len(getattr(backbone.model, "feature_info", None) or [])
    try:
        with torch.no_grad():
            maps = backbone.feature_maps(images[:1].to(next(backbone.parameters()).device), list(range(count)))
    except UserError:
        return None
    return next((i for i in reversed(range(count)) if min(maps[i].shape[-2:]) >= _LEAST_CELLS), None)


def layer_of(backbone: Backbone, images: Tensor | None, given: int | None, size: object) -> int:
    """`given`, else `map_layer` of the first of `images`. Raises UserError, which names `size`, if that has none."""
    layer = given if given is not None or images is None else map_layer(backbone, images)
    if layer is None:
        raise UserError(f"size={size}: {backbone.name} has no map of 4 x 4 cells at this size; give a larger size")
    return layer


def unit_maps(backbone: Backbone, images: Tensor, layer: int, batch: int = 16) -> Tensor:
    """[N, C, S, S], normalised -> the layer's map with features of length 1: float32 [N, h, w, D], on the host."""
    return torch.cat([maps_of(backbone, part, layer) for part in images.split(batch)])


def components(x: Tensor, count: int) -> tuple[Tensor, float]:
    """([N, count] projections of x [N, D] on its principal components, their share of the variance), in float64.

    Each is turned so that the sum of its weights is not negative; of a width below `count` the rest is zeros.
    """
    x = x.double()
    x = x - x.mean(dim=0)
    values, vectors = torch.linalg.eigh(x.T @ x)  # ascending; [D], [D, D]
    basis = vectors.flip(1)[:, :count]
    parts = x @ (basis * torch.where(basis.sum(dim=0) < 0, -1.0, 1.0))
    share = values.clamp_min(0).flip(0)[:count].sum() / values.clamp_min(0).sum().clamp_min(1e-30)
    return F.pad(parts, (0, count - parts.shape[1])), float(share)


def foreground_of(maps: Tensor, threshold: float) -> Tensor:
    """bool [N, h, w]: cells whose first component over all of maps [N, h, w, D] is above `threshold`.

    DINOv2 keeps the positive side, whose sign a PCA leaves open; here it is the one that is rarer on the images' rims.
    """
    n, h, w, _ = maps.shape
    first = components(maps.flatten(0, 2), 1)[0].view(n, h, w)
    rim = torch.ones(h, w, dtype=torch.bool)
    rim[1:-1, 1:-1] = False
    if first[:, rim].mean() > first[:, ~rim].mean():
        first = -first
    return first > threshold


def colours_of(maps: Tensor, foreground: Tensor | None = None) -> tuple[np.ndarray, float]:
    """(RGB in [0, 1], [N, h, w, 3], the components' share of the variance) of maps [N, h, w, D], or of a part of the cells.

    Each component is stretched from its 1st to its 99th percentile; cells outside the foreground bool [N, h, w] are black.
    """
    inside = torch.ones(maps.shape[:3], dtype=torch.bool) if foreground is None else foreground
    if int(inside.sum()) < 4:
        raise UserError(
            f"foreground=true: {int(inside.sum())} of {inside.numel()} cells are above the threshold; give a lower one, "
            "as in threshold=-0.1"
        )
    parts, share = components(maps[inside], 3)
    low, high = (torch.from_numpy(np.quantile(parts.numpy(), q, axis=0)) for q in (0.01, 0.99))
    out = torch.zeros(*maps.shape[:3], 3, dtype=torch.float64)
    out[inside] = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return out.numpy(), share


def patch_pca(
    backbone: Backbone, images: Tensor, path: Path, layer: int = -1, *, foreground: float | None = None
) -> Path:
    """The first three principal components of the patch features of all images together, as red, green and blue.

    Alike patches have alike colours, across images too. images: [N, C, S, S], normalised. foreground: the threshold of
    `foreground_of`; None: all cells.
    """
    maps = unit_maps(backbone, images, layer)
    n, h, w, _ = maps.shape
    colours, share = colours_of(maps, None if foreground is None else foreground_of(maps, foreground))
    pictures = displayed(images, backbone.mean, backbone.std)
    figure = new_figure(1.25 * n + 0.1, 2.9)
    grid = figure.subplots(2, n, squeeze=False)
    for column in range(n):
        for axes in grid[:, column]:
            bare(axes)
        grid[0, column].imshow(pictures[column])
        grid[1, column].imshow(colours[column], interpolation="nearest")
    of = "the variance" if foreground is None else "the foreground's variance"
    title = (
        f"Patch features as colours: three principal components ({share:.0%} of {of}), {h} x {w} cells, layer {layer}"
    )
    figure.suptitle(title if n >= 6 else title.replace(": ", ":\n").replace(", ", ",\n", 1), fontsize=10, color=INK)
    return save(figure, path)
