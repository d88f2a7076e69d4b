"""`selfsup eval tsne`: a map of embeddings (van der Maaten & Hinton, 2008), with thumbnails where there is room."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.patches import Rectangle

from selfsup import dist
from selfsup.errors import UserError
from selfsup.randomness import generator

from .canvas import BLUE, INK, bare, new_figure, save
from .class_figures import class_name
from .datasets import Images, stratified_choice
from .features import extract, transform_for
from .poolings import Request
from .shown import begin, displayed, open_shown, read, said

_ACROSS = 24
"""Thumbnails that fit side by side."""

_THUMBNAILS = 0x7B5E  # keeps these draws apart from other uses of the same seed


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Draw into `out` or RUN/pictures/tsne.png. Raises UserError for fewer than 10 images."""
    settings, opened, path = begin("tsne", target, overrides, out)
    shown = open_shown(opened, settings)
    transform = transform_for(opened, shown.images, settings)
    labels = shown.labels if shown.labels is not None else np.zeros(len(shown.images), dtype=np.int64)
    rows = stratified_choice(labels, min(settings.points, len(labels)), settings.seed)
    chosen = Images(shown.images.source, shown.images.indices[rows], shown.images.spec)
    request = Request(settings.pooling, settings.layer)
    file = extract(opened, chosen, settings, [request], transform, what="features")
    if not dist.is_main():
        return {}
    readable = np.flatnonzero(file.readable(request))
    if len(readable) < 10:
        raise UserError(f"{chosen.spec}: {len(readable)} images can be read; a map needs 10 or more")
    places = layout(np.asarray(file.array(request))[readable], settings.perplexity, settings.seed)
    with_picture = spaced(places, settings.thumbnails, settings.seed)
    thumbnails = None
    if len(with_picture):
        images, _ = read(chosen, readable[with_picture], transform)
        thumbnails = with_picture, displayed(images, transform.mean, transform.std)
    known = None if shown.labels is None else shown.labels[rows][readable]
    return said(draw(places, known, shown.names, path, thumbnails))


def layout(features: np.ndarray, perplexity: float = 30.0, seed: int = 0) -> np.ndarray:
    """float32 [N, 2]: t-SNE by cosine of features [N, D], from a PCA start. Perplexity is at most a third of the others."""
    from sklearn.manifold import TSNE

    n = len(features)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    start = "pca" if min(features.shape) >= 2 else "random"
    return TSNE(2, perplexity=min(perplexity, (n - 1) / 3), init=start, random_state=seed).fit_transform(unit)


def spaced(places: np.ndarray, most: int, seed: int = 0) -> np.ndarray:
    """At most so many rows of places [N, 2], drawn in a seeded order, of which no two are within a thumbnail of one another."""
    side = _side(places)
    kept: list[int] = []
    for row in generator(_THUMBNAILS, seed).permutation(len(places)).tolist():
        if len(kept) == most:
            break
        if not kept or np.abs(places[kept] - places[row]).max(axis=1).min() >= side:
            kept.append(row)
    return np.array(kept, dtype=np.int64)


def _side(places: np.ndarray) -> float:
    return float(np.ptp(places, axis=0).max()) / _ACROSS


def embedding_map(features: np.ndarray, labels: np.ndarray | None, names: Sequence[str] | None, path: Path) -> Path:
    """t-SNE (cosine, perplexity 30, PCA start, fixed seed) of features [N, D], coloured by class; axes have no meaning."""
    return draw(layout(features), labels, names, path)


def draw(
    places: np.ndarray,
    labels: np.ndarray | None,
    names: Sequence[str] | None,
    path: Path,
    thumbnails: tuple[np.ndarray, np.ndarray] | None = None,
) -> Path:
    """Points at places [N, 2], coloured by labels [N] if there are any.

    thumbnails: (rows [M], their images [M, S, S, 3] in [0, 1]), framed in the colour of the class.
    """
    side = _side(places)
    figure = new_figure(8.2 if labels is not None else 6.4, 6.4)
    axes = figure.subplots()
    colours: dict[int, Any] = {}
    if labels is None:
        axes.scatter(places[:, 0], places[:, 1], s=9, color=BLUE, alpha=0.75, linewidths=0)
    else:
        found = np.unique(labels)
        few = len(found) <= 20
        palette = matplotlib.colormaps[("tab10" if len(found) <= 10 else "tab20") if few else "turbo"]
        for i, label in enumerate(found):
            mine = places[labels == label]
            colour = colours[int(label)] = palette(i if few else i / len(found))
            name = class_name(names, int(label)) if label >= 0 else "no label"
            axes.scatter(mine[:, 0], mine[:, 1], s=11, color=colour, alpha=0.8, linewidths=0, label=name)
        if few:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, markerscale=2.2)
    for row, image in zip(*thumbnails) if thumbnails is not None else ():
        (x, y), half = places[row], 0.47 * side
        edge = BLUE if labels is None else colours[int(labels[row])]
        axes.imshow(image, extent=(x - half, x + half, y - half, y + half), zorder=2, interpolation="antialiased")
        axes.add_patch(
            Rectangle((x - half, y - half), 2 * half, 2 * half, fill=False, edgecolor=edge, lw=1.1, zorder=3)
        )
    bare(axes)
    axes.set_aspect("equal" if thumbnails is not None else "auto")
    low, high = places.min(axis=0) - side, places.max(axis=0) + side
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_title(f"t-SNE of the embeddings of {len(places):,} images", fontsize=11, color=INK, loc="left")
    return save(figure, path)
