"""`selfsup eval segment-knn`: semantic segmentation by retrieval, nothing trained (Balazevic et al., 2023, "Towards in-context
scene understanding", section 3).

Every patch of the training images goes into a bank, with the shares of the classes among its pixels. A patch of a val image
takes the mean label of its k nearest, weighted by a softmax of their cosines; the map of shares is enlarged to the mask's own
size (bilinear), and the largest share wins.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfsup import dist
from selfsup.data.sources import Source, open_source
from selfsup.data.split import split
from selfsup.errors import UserError
from selfsup.randomness import generator

from . import results
from .canvas import INK, bare, new_figure, save
from .datasets import Images, channels_of, data_options
from .dense import backbone_of, maps_of, mask_files, overlay, read_mask, squares
from .features import Transform, transform_for
from .pca import layer_of
from .progress import Progress
from .search import neighbours
from .settings import resolve
from .settings_dense import SegmentKnnSettings
from .shown import beside, displayed, spread
from .targets import Target, open_target

_BANK = 0x5E6B  # keeps these draws apart from other uses of the same seed


@dataclass
class Pairs:
    """Some images of a source and the files of their masks."""

    source: Source
    rows: np.ndarray
    masks: list[Path]
    """Of every image of the source."""
    spec: str

    def batches(self, transform: Transform, rows: np.ndarray | None = None) -> Any:
        """(images, rows), as `dense.squares`."""
        return squares(self.source, self.rows if rows is None else rows, transform)


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Print mIoU and accuracy; write them to `out` or RUN/eval/segment-knn.json, and overlays into a picture."""
    settings = resolve("segment-knn", overrides)
    assert isinstance(settings, SegmentKnnSettings)
    results.check_destination(out)
    opened = open_target(target, device=settings.device)
    backbone = backbone_of(opened, "segment-knn")
    train, val = open_pairs(opened, settings)
    images = Images(train.source, train.rows, train.spec)
    transform = transform_for(opened, images, settings)
    if not dist.is_main():
        return {}
    first, _ = next(train.batches(transform), (None, None))
    layer = layer_of(backbone, first, settings.layer, transform.size)
    features, shares = bank(train, opened, layer, transform, settings)
    classes = shares.shape[1]
    counts = np.zeros((classes, classes), np.int64)
    examples = []
    wanted = set(val.rows[spread(len(val.rows), settings.images)].tolist())
    progress = Progress(len(val.rows), "val images")
    for x, rows in val.batches(transform):
        predicted = predict(maps_of(backbone, x, layer), features, shares, settings, str(opened.device))
        for image, row, scores in zip(x, rows.tolist(), predicted):
            truth = read_mask(val.masks[row])
            if (over := truth[truth != settings.ignore]).size and over.max() >= classes:
                shares = np.pad(shares, ((0, 0), (0, int(over.max()) + 1 - classes)))  # an id that no training mask has
                classes = shares.shape[1]
                counts = np.pad(counts, (0, classes - len(counts)))
            found = enlarged(scores, truth.shape)
            counts += confusion(truth, found, classes, settings.ignore)
            if row in wanted:
                shown = displayed(image[None], transform.mean, transform.std)[0]
                examples.append((shown, truth, found))
        progress.advance(len(x))
    progress.close()
    ious, accuracy = scores_of(counts)
    present = ~np.isnan(ious)
    if not present.any():
        raise UserError(f"{val.spec}: every pixel of its {len(val.rows)} masks is {settings.ignore}, which is ignored")
    metrics = {"miou": float(ious[present].mean()), "accuracy": accuracy}
    protocol = {
        "k": settings.k,
        "temperature": settings.temperature,
        "layer": layer,
        "vote": "softmax(cosine / T) over the k nearest patches; soft labels; bilinear to the mask's own size",
        "metric": "mean over the classes that occur in masks or predictions, from pixels of all val images together",
        "bank_patches": len(features),
        "train": train.spec,
        "val": val.spec,
        "split": "as given"
        if val.source is not train.source
        else f"seeded {1 - settings.val_fraction:.0%} of the pairs",
        "train_images": len(train.rows),
        "val_images": len(val.rows),
        "ignored_id": settings.ignore,
        "squeezed_to": transform.size,
        "seed": settings.seed,
        "versions": results.versions(),
    }
    table = [{"class": c, "iou": float(ious[c])} for c in np.flatnonzero(present).tolist()]
    result = results.result("segment-knn", opened, metrics, protocol, table)
    results.save(result, opened, out)
    results.show(result, out)
    picture = beside("segment-knn", opened, out)
    if picture is not None and examples:
        print(f"picture: {_draw(examples, picture, settings.ignore)}")
    return result


def open_pairs(target: Target, settings: SegmentKnnSettings) -> tuple[Pairs, Pairs]:
    """(train, val). Raises UserError for images without a mask."""
    if settings.data.path is None or settings.masks is None:
        raise UserError("eval segment-knn: give data=IMAGES masks=MASKS, two folders with the same names in them")
    train = _open(target, settings, settings.data.path, settings.masks)
    if settings.data.val is not None:
        if settings.val_masks is None:
            raise UserError(f"data.val={settings.data.val}: its masks are missing; give val_masks=FOLDER")
        return train, _open(target, settings, settings.data.val, settings.val_masks)
    kept, held = split(np.zeros(len(train.rows), np.int64), settings.val_fraction, settings.seed)
    return Pairs(train.source, kept, train.masks, train.spec), Pairs(train.source, held, train.masks, train.spec)


def _open(target: Target, settings: SegmentKnnSettings, spec: str, masks: str) -> Pairs:
    source = open_source(spec, channels=channels_of(target, settings, spec), config=data_options(target, settings))
    return Pairs(source, np.arange(len(source)), mask_files(source, spec, masks), spec)


def bank(
    train: Pairs, target: Target, layer: int, transform: Transform, settings: SegmentKnnSettings
) -> tuple[np.ndarray, np.ndarray]:
    """(features [M, D], shares of the classes [M, C]) of the training patches that are not all ignored."""
    backbone = backbone_of(target, "segment-knn")
    features, owners, ids = [], [], []
    progress = Progress(len(train.rows), "train images")
    for x, rows in train.batches(transform):
        maps = maps_of(backbone, x, layer)
        for one, row in zip(maps, rows.tolist()):
            mask = read_mask(train.masks[row])
            known, cells = cell_shares(mask, one.shape[:2], settings.ignore)
            ids.append(known)
            owners.append(cells.reshape(-1, len(known)))
            features.append(one.reshape(-1, one.shape[-1]).numpy())
        progress.advance(len(x))
    progress.close()
    classes = max((int(i.max()) + 1 for i in ids if len(i)), default=0)
    if classes == 0:
        raise UserError(f"{train.spec}: every pixel of its masks is {settings.ignore}, which is ignored")
    shares = np.concatenate([_spread_out(o, i, classes) for o, i in zip(owners, ids)])
    rows = np.flatnonzero(shares.sum(axis=1) > 0)
    if len(rows) > settings.bank:
        rows = np.sort(generator(_BANK, settings.seed).permutation(rows)[: settings.bank])
    return np.concatenate(features)[rows], shares[rows]


def _spread_out(shares: np.ndarray, ids: np.ndarray, classes: int) -> np.ndarray:
    out = np.zeros((len(shares), classes), np.float32)
    out[:, ids] = shares
    return out


def cell_shares(mask: np.ndarray, cells: Any, ignore: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids in a mask [H, W], share of each among a cell's pixels that count, float32 [h, w, ids]; zeros: none counts)."""
    ids = np.unique(mask[mask != ignore])
    layers = (
        torch.from_numpy(np.stack([mask == i for i in ids]).astype(np.float32))
        if len(ids)
        else torch.zeros(0, *mask.shape)
    )
    shares = F.adaptive_avg_pool2d(layers[None], tuple(cells))[0].permute(1, 2, 0).numpy()  # [h, w, ids]
    return ids, shares / np.maximum(shares.sum(axis=2, keepdims=True), 1e-12)


def predict(
    maps: Tensor, features: np.ndarray, shares: np.ndarray, settings: SegmentKnnSettings, device: str
) -> Tensor:
    """Shares of the classes [B, h, w, C] of maps [B, h, w, D], from the bank."""
    b, h, w, d = maps.shape
    found = neighbours(features, maps.reshape(-1, d).numpy(), settings.k, device=device)
    weights = torch.softmax(found.similarities / settings.temperature, dim=1).float()  # [Q, k]
    out = torch.zeros(len(weights), shares.shape[1])
    labels = torch.from_numpy(shares)
    for j in range(weights.shape[1]):  # one neighbour at a time: [Q, k, C] would be large
        out += weights[:, j, None] * labels[found.indices[:, j]]
    return out.view(b, h, w, -1)


def enlarged(scores: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """Ids int64 [H, W] of the largest of scores [h, w, C], enlarged to `size`."""
    some = scores.flatten(0, 1).any(dim=0).nonzero()[:, 0]  # classes with any share
    large = F.interpolate(scores[..., some].permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    return some[large.argmax(dim=0)].numpy()


def confusion(truth: np.ndarray, found: np.ndarray, classes: int, ignore: int) -> np.ndarray:
    """Pixels int64 [C, C] by true and found class; those of the id `ignore` are left out."""
    keep = truth != ignore
    return np.bincount(truth[keep] * classes + found[keep], minlength=classes**2).reshape(classes, classes)


def scores_of(counts: np.ndarray) -> tuple[np.ndarray, float]:
    """(IoU of every class, NaN for one that neither occurs nor is found; share of right pixels)."""
    hits = np.diag(counts).astype(float)
    union = counts.sum(axis=0) + counts.sum(axis=1) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan), float(hits.sum() / max(counts.sum(), 1))


def _draw(examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path, ignore: int) -> Path:
    figure = new_figure(1.5 * len(examples) + 0.6, 5.0)
    grid = figure.subplots(3, len(examples), squeeze=False)
    for column, (image, truth, found) in enumerate(examples):
        for axes, shown in zip(grid[:, column], (image, overlay(image, truth, ignore), overlay(image, found))):
            bare(axes)
            axes.imshow(shown)
    for axes, name in zip(grid[:, 0], ("image", "mask", "k-NN")):
        axes.set_ylabel(name, fontsize=9, color=INK)
    figure.suptitle("Segmentation by the nearest patches", fontsize=10, color=INK)
    return save(figure, path)
