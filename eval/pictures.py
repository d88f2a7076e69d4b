"""Pictures of a run: attention of each head, patch features as colours, a map of embeddings, and its curves."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup.backbones import Backbone
from selfsup.data.eval_transform import eval_batches
from selfsup.data.sources import open_source
from selfsup.errors import UserError

from .canvas import BLUE, INK, bare, new_figure, save
from .class_figures import class_name
from .curves import curves
from .datasets import Images, labelled_only, open_pair, stratified_choice
from .features import Transform, transform_for
from .settings import KnnSettings
from .targets import Target, open_target

_LEAST_CELLS = 4  # a map with fewer cells a side says nothing as a picture


def draw_run(
    run: Path, out: Path | None = None, *, target: str | None = None, images: int = 8, points: int = 1500
) -> list[Path]:
    """Every picture that makes sense for a run, into `out` (default RUN/pictures); returns the files.

    attention.png needs a backbone with attention, pca.png a map of at least 4 x 4 cells; curves.png metrics.jsonl.
    target: default the run itself. images: how many are shown; points: at most so many in the map of embeddings.
    """
    out = out or run / "pictures"
    out.mkdir(parents=True, exist_ok=True)
    opened = open_target(target or str(run), device="cpu")
    if opened.backbone is None:
        raise UserError("pictures need a backbone; raw pixels have no features to draw")
    shown, labels, names = _val_images(opened)
    transform = transform_for(opened, shown, KnnSettings())
    known = labels if labels is not None else np.zeros(len(shown), dtype=np.int64)
    few, _ = _read(shown, _one_per_class(known, images), transform)
    files = []
    if opened.backbone.has_attention:
        files.append(attention(opened.backbone, few, out / "attention.png"))
    layer = map_layer(opened.backbone, few)
    if layer is not None:
        files.append(patch_pca(opened.backbone, few, out / "pca.png", layer))
    many = stratified_choice(known, min(points, len(shown)), seed=0)
    loaded, rows = _read(shown, many, transform)
    if len(rows) >= 10:
        features = _pooled(opened.backbone, loaded)
        files.append(embedding_map(features, None if labels is None else labels[rows], names, out / "embeddings.png"))
    if (run / "metrics.jsonl").is_file():
        files.append(curves(run, out / "curves.png"))
    return files


def _displayed(backbone: Backbone, images: Tensor) -> np.ndarray:
    """[N, C, S, S] normalised -> [N, S, S, 3] in [0, 1]: channels 1 as grey, of more than 3 the first three."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (backbone.mean, backbone.std))
    x = (images * std + mean).clamp(0, 1)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return x.permute(0, 2, 3, 1).numpy()


def _val_images(target: Target) -> tuple[Images, np.ndarray | None, list[str] | None]:
    """The run's val images; without labels the training images and None."""
    assert target.config is not None and target.backbone is not None
    try:
        pair, _ = labelled_only(open_pair(target, KnnSettings()))
        return pair.val, pair.val_labels, pair.class_names
    except UserError:
        path = target.config.data.path
        source = open_source(path, channels=target.backbone.in_chans, config=target.config.data)
        return Images(source, np.arange(len(source)), path), None, None


def _one_per_class(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` rows: the first of every class, then the second ones, and so on."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return np.lexsort((labels, turn))[:count]


def _read(images: Images, rows: np.ndarray, transform: Transform) -> tuple[Tensor, np.ndarray]:
    """(images [N, C, S, S], their rows) of those that can be read."""
    found, ids = [], []
    indices = images.indices[rows]
    for x, _, i in eval_batches(
        images.source, size=transform.size, resize=transform.resize, interpolation=transform.interpolation,
        mean=transform.mean, std=transform.std, batch_size=64, workers=0, indices=indices, on_bad=lambda name, reason: None,
    ):  # fmt: skip
        found.append(x)
        ids.append(i.numpy())
    if not found:
        raise UserError(f"{images.spec}: none of {len(rows)} images can be read; there is nothing to draw")
    kept = np.concatenate(ids)
    return torch.cat(found), np.searchsorted(images.indices, kept)


@torch.no_grad()
def _pooled(backbone: Backbone, images: Tensor, batch: int = 128) -> np.ndarray:
    return torch.cat([backbone(part).pooled.float() for part in images.split(batch)]).numpy()


# ------------------------------------------------------------------------------------------------------------ pictures


def attention(backbone: Backbone, images: Tensor, path: Path, max_heads: int = 6) -> Path:
    """Each head's attention of the class token (or the mean query) in the last block, laid over the images.

    images: [N, C, S, S], normalised. One column an image; the first row is the image, the second the mean over heads.
    A map's colours go from its own lowest to its 99th percentile.
    """
    with torch.no_grad():
        maps = backbone.attention(images).float()  # [N, heads, h, w]
    heads = maps.shape[1]
    rows = torch.cat([maps.mean(dim=1, keepdim=True), maps[:, :max_heads]], dim=1)  # [N, 1 + shown, h, w]
    size = images.shape[-2:]
    smooth = F.interpolate(rows, size=(8 * rows.shape[2], 8 * rows.shape[3]), mode="bilinear", align_corners=False)
    pictures = _displayed(backbone, images)
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
    figure.suptitle(f"Where the {query} looks: last block, {backbone.name}{extra}", fontsize=10, color=INK)
    return save(figure, path)


def map_layer(backbone: Backbone, images: Tensor) -> int | None:
    """The last layer whose map has at least 4 x 4 cells; None if there is none (or no layers are given)."""
    count = len(getattr(backbone.model, "feature_info", None) or [])
    try:
        with torch.no_grad():
            maps = backbone.feature_maps(images[:1], list(range(count)))
    except UserError:
        return None
    return next((i for i in reversed(range(count)) if min(maps[i].shape[-2:]) >= _LEAST_CELLS), None)


def patch_pca(backbone: Backbone, images: Tensor, path: Path, layer: int = -1) -> Path:
    """The first three principal components of the patch features of all images together, as red, green and blue.

    Alike patches have alike colours, across images too. images: [N, C, S, S], normalised. Features are scaled to length
    1; each component is stretched from its 1st to its 99th percentile.
    """
    with torch.no_grad():
        maps = backbone.feature_maps(images, [layer])[0].float()  # [N, D, h, w]
    n, _, h, w = maps.shape
    x = F.normalize(maps.permute(0, 2, 3, 1).flatten(0, 2), dim=1).double()  # [N*h*w, D]
    x = x - x.mean(dim=0)
    _, values, basis = torch.linalg.svd(x, full_matrices=False)
    basis = basis[:3] * torch.where(basis[:3].sum(dim=1, keepdim=True) < 0, -1.0, 1.0)  # a fixed sign
    parts = x @ basis.T  # [N*h*w, 3]
    low, high = parts.quantile(0.01, dim=0), parts.quantile(0.99, dim=0)
    colours = ((parts - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).view(n, h, w, -1)
    if colours.shape[-1] < 3:
        colours = F.pad(colours, (0, 3 - colours.shape[-1]))
    share = float((values[:3].square().sum() / values.square().sum().clamp_min(1e-30)).item())
    pictures = _displayed(backbone, images)
    figure = new_figure(1.25 * n + 0.1, 2.9)
    grid = figure.subplots(2, n, squeeze=False)
    for column in range(n):
        for axes in grid[:, column]:
            bare(axes)
        grid[0, column].imshow(pictures[column])
        grid[1, column].imshow(colours[column].numpy(), interpolation="nearest")
    figure.suptitle(
        f"Patch features as colours: three principal components ({share:.0%} of the variance), {h} x {w} cells, layer {layer}",
        fontsize=10, color=INK,
    )  # fmt: skip
    return save(figure, path)


def embedding_map(features: np.ndarray, labels: np.ndarray | None, names: Sequence[str] | None, path: Path) -> Path:
    """t-SNE (cosine, perplexity 30, PCA start, fixed seed) of features [N, D], coloured by class; axes have no meaning."""
    from sklearn.manifold import TSNE

    n = len(features)
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    start = "pca" if min(features.shape) >= 2 else "random"
    places = TSNE(2, perplexity=min(30.0, (n - 1) / 3), init=start, random_state=0).fit_transform(unit)
    figure = new_figure(8.2 if labels is not None else 6.4, 6.4)
    axes = figure.subplots()
    if labels is None:
        axes.scatter(places[:, 0], places[:, 1], s=9, color=BLUE, alpha=0.75, linewidths=0)
    else:
        found = np.unique(labels)
        few = len(found) <= 20
        palette = (
            matplotlib.colormaps["tab10" if len(found) <= 10 else "tab20"] if few else matplotlib.colormaps["turbo"]
        )
        for i, label in enumerate(found):
            mine = places[labels == label]
            colour = palette(i if few else i / len(found))
            axes.scatter(
                mine[:, 0],
                mine[:, 1],
                s=11,
                color=colour,
                alpha=0.8,
                linewidths=0,
                label=class_name(names, int(label)),
            )
        if few:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, markerscale=2.2)
    bare(axes)
    axes.margins(0.03)
    axes.set_title(f"t-SNE of the embeddings of {n:,} images", fontsize=11, color=INK, loc="left")
    return save(figure, path)
