"""Every picture of a run: attention of each head, patch features as colours, a map of embeddings, and its curves."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfsup.backbones import Backbone
from selfsup.data.sources import open_source
from selfsup.errors import UserError

from .attention import attention
from .curves import curves
from .datasets import Images, labelled_only, open_pair, stratified_choice
from .features import transform_for
from .pca import map_layer, patch_pca
from .settings import KnnSettings
from .shown import one_per_class, read
from .targets import Target, open_target
from .tsne import embedding_map


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
    few, _ = read(shown, one_per_class(known, images), transform)
    files = []
    if opened.backbone.has_attention:
        files.append(attention(opened.backbone, few, out / "attention.png"))
    layer = map_layer(opened.backbone, few)
    if layer is not None:
        files.append(patch_pca(opened.backbone, few, out / "pca.png", layer))
    many = stratified_choice(known, min(points, len(shown)), seed=0)
    loaded, rows = read(shown, many, transform)
    if len(rows) >= 10:
        features = _pooled(opened.backbone, loaded)
        files.append(embedding_map(features, None if labels is None else labels[rows], names, out / "embeddings.png"))
    if (run / "metrics.jsonl").is_file():
        files.append(curves(run, out / "curves.png"))
    return files


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


@torch.no_grad()
def _pooled(backbone: Backbone, images: Tensor, batch: int = 128) -> np.ndarray:
    return torch.cat([backbone(part).pooled.float() for part in images.split(batch)]).numpy()
