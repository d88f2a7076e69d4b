"""`selfsup eval objects`: masks of the main object of each image, nothing trained, and how well they fit where masks exist."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from selfsup import dist
from selfsup.backbones import Backbone
from selfsup.data.sources import open_source
from selfsup.errors import UserError

from . import results
from .canvas import INK, ORANGE, bare, new_figure, save
from .datasets import Images, channels_of, data_options
from .dense import backbone_of, has_keys, keys_of, maps_of, mask_files, overlay, read_mask, squares
from .features import transform_for
from .object_masks import box_iou, box_of, by_mass, lost, tokencut
from .pca import map_layer
from .progress import Progress
from .settings import resolve
from .settings_dense import ObjectsSettings
from .shown import beside, displayed, spread, val_spec
from .targets import open_target


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Print and write what was found to `out` or RUN/eval/objects.json, and a picture of the first images."""
    settings = resolve("objects", overrides)
    assert isinstance(settings, ObjectsSettings)
    results.check_destination(out)
    opened = open_target(target, device=settings.device)
    backbone = backbone_of(opened, "objects")
    spec = val_spec(opened, settings)
    source = open_source(spec, channels=channels_of(opened, settings, spec), config=data_options(opened, settings))
    rows = np.arange(len(source)) if settings.masks is not None else spread(len(source), settings.images)
    masks = mask_files(source, spec, settings.masks) if settings.masks is not None else None
    transform = transform_for(opened, Images(source, rows, spec), settings)
    if not dist.is_main():
        return {}
    find, how = finder(backbone, settings, squares(source, rows[:1], transform))
    shown = set(rows[spread(len(rows), settings.images)].tolist())
    examples, shares, ious, hits = [], [], [], []
    progress = Progress(len(rows), f"objects by {settings.by}")
    for x, ids in squares(source, rows, transform):
        for image, row, mask in zip(x, ids.tolist(), find(x)):
            shares.append(float(mask.float().mean()))
            truth = None
            if masks is not None:
                truth = read_mask(masks[row])
                iou, hit = compare(to_size(mask, truth.shape), truth, settings.ignore)
                ious.append(iou)
                hits.append(hit)
            if row in shown:
                examples.append((displayed(image[None], transform.mean, transform.std)[0], mask, truth))
        progress.advance(len(x))
    progress.close()
    if not shares:
        raise UserError(f"{spec}: none of {len(rows)} images can be read")
    metrics = {"covered": float(np.mean(shares))}
    if masks is not None:
        found = [hit for hit in hits if hit is not None]
        if not found:
            raise UserError(
                f"masks={settings.masks}: none of {len(hits)} masks holds an object (an id but 0 and {settings.ignore})"
            )
        metrics |= {"iou": float(np.nanmean(ious)), "corloc": float(np.mean(found))}
    protocol = {
        "method": settings.by,
        **how,
        "metric": "means over images: share covered, IoU with all objects, how often the largest piece's box has IoU 0.5",
        "val": spec,
        "val_images": len(shares),
        "without_object": sum(hit is None for hit in hits),
        "squeezed_to": transform.size,
        "versions": results.versions(),
    }
    result = results.result("objects", opened, metrics, protocol)
    results.save(result, opened, out)
    results.show(result, out)
    picture = beside("objects", opened, out)
    if picture is not None:
        print(f"picture: {_draw(examples, picture, settings.by)}")
    return result


def finder(
    backbone: Backbone, settings: ObjectsSettings, first: Any
) -> tuple[Callable[[Tensor], list[Tensor]], dict[str, Any]]:
    """(images [B, C, S, S] -> one bool [h, w] an image, what belongs in the protocol)."""
    if settings.by == "attention":
        if not backbone.has_attention:
            raise UserError(
                f"by=attention: {backbone.name} has none over the whole image, that needs a ViT; use tokencut or lost"
            )

        def attend(x: Tensor) -> list[Tensor]:
            maps = backbone.attention(x.to(next(backbone.parameters()).device)).float().cpu().mean(dim=1)  # [B, h, w]
            return [by_mass(one, settings.mass) for one in maps]

        return attend, {"features": "attention of the class token, mean over heads", "mass": settings.mass}
    kind = settings.features or ("keys" if has_keys(backbone) and settings.layer is None else "output")
    layer = settings.layer
    if kind == "output" and layer is None:
        x = next(first, (None,))[0]
        layer = map_layer(backbone, x) if x is not None else None
        if layer is None:
            raise UserError(f"size: {backbone.name} has no map of 4 x 4 cells at this size; give a larger size=")
    features = (
        (lambda x: keys_of(backbone, x)) if kind == "keys" else (lambda x: _centred(maps_of(backbone, x, layer or 0)))
    )
    cut = (lambda f: tokencut(f, settings.tau)) if settings.by == "tokencut" else (lambda f: lost(f, settings.k))
    how: dict[str, Any] = {"features": kind, **({"layer": layer} if kind == "output" else {})}
    how |= {"tau": settings.tau} if settings.by == "tokencut" else {"k": settings.k}
    return lambda x: [cut(one) for one in features(x)], how


def _centred(maps: Tensor) -> Tensor:
    """Without the image's mean: outputs, of ConvNets above all, have cosines near 1 everywhere."""
    return maps - maps.mean(dim=(1, 2), keepdim=True)


def to_size(mask: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """bool [H, W] from a mask [h, w] of cells, smoothly."""
    large = F.interpolate(mask[None, None].float(), size=size, mode="bilinear", align_corners=False)
    return (large[0, 0] > 0.5).numpy()


def compare(found: np.ndarray, truth: np.ndarray, ignore: int) -> tuple[float, bool | None]:
    """(IoU of all that is object, whether the box of the largest piece has IoU 0.5 with a box of an id); NaN, None: no object."""
    known = truth != ignore
    there = (truth > 0) & known
    if not there.any():
        return float("nan"), None
    union = ((found | there) & known).sum()
    box = box_of(found)
    boxes = [box_of(truth == i) for i in np.unique(truth[there])]
    hit = box is not None and any(b is not None and box_iou(box, b) >= 0.5 for b in boxes)
    return float((found & there).sum() / union), hit


def _draw(examples: list[tuple[np.ndarray, Tensor, np.ndarray | None]], path: Path, method: str) -> Path:
    with_truth = any(truth is not None for _, _, truth in examples)
    figure = new_figure(1.5 * len(examples) + 0.6, 5.0 if with_truth else 3.5)
    grid = figure.subplots(2 + with_truth, len(examples), squeeze=False)
    for column, (image, mask, truth) in enumerate(examples):
        found = to_size(mask, image.shape[:2])
        parts = [image, overlay(image, found.astype(np.int64))]
        parts += [overlay(image, (truth > 0).astype(np.int64))] if truth is not None else []
        for axes, part in zip(grid[:, column], parts):
            bare(axes)
            axes.imshow(part)
        _box(grid[1, column], found)
    for axes, name in zip(grid[:, 0], ("image", method, "mask")):
        axes.set_ylabel(name, fontsize=9, color=INK)
    figure.suptitle(f"The main object, by {method}", fontsize=10, color=INK)
    return save(figure, path)


def _box(axes: Axes, mask: np.ndarray) -> None:
    if (box := box_of(mask)) is not None:
        top, left, bottom, right = box
        axes.add_patch(
            Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=ORANGE, linewidth=1.5)
        )
