"""Semantic segmentation on a backbone: train a head on masks, predict at the original size, count, draw.

Nothing is chosen on the val images: they are looked at once, by the weights of the last step.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsup import dist
from selfsup.errors import UserError

from . import results
from .progress import Progress
from .segment_crops import Crops
from .segment_data import Reader, fingerprint, open_classes
from .segment_figures import Counts, count, figures, interval, per_class
from .segment_heads import Trunk, create_head
from .segment_layouts import Pairs, open_layout
from .segment_settings import SegmentSettings
from .segment_test import Predictor
from .segment_train import Normalise, Segmenter, class_weights, train_head
from .settings import resolve
from .shown import spread
from .targets import Target, open_target


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """`selfsup eval segment TARGET data=IMAGES masks=MASKS`: print the result, write it to `out` or RUN/eval/segment*.json.

    Beside it the sheet of pictures, segment*.png.
    """
    settings = resolve("segment", overrides)
    assert isinstance(settings, SegmentSettings)
    result, _ = evaluate(target, settings, out)
    show(result, out)
    return result


def evaluate(target: str, settings: SegmentSettings, out: Path | None = None) -> tuple[dict[str, Any], Counts]:
    """The same without printing; and the counts of each val image, for paired differences (`segment_figures.interval`)."""
    results.check_destination(out)
    if dist.env_world()[1] > 1:
        raise UserError("eval segment runs as one process; start it without torchrun or with one task")
    layout = open_layout(settings)
    opened = open_target(target, device=settings.device)
    if opened.backbone is None:
        raise UserError("eval segment: pixels have no maps of features; give a run or a backbone")
    classes, train_pixels, _ = open_classes(layout, settings)
    weights = class_weights(settings, train_pixels)
    assert layout.val is not None
    backbone, device = opened.backbone, opened.device
    size = settings.size or (opened.config.views.global_.size if opened.config is not None else backbone.input_size)
    backbone.check_size(size)
    if settings.inference == "whole" and backbone.fixed_size:
        raise UserError(
            f"inference=whole: {backbone.name} takes {backbone.input_size} pixels alone; use inference=slide"
        )
    reader = Reader(backbone.in_chans, settings.data.max_pixels, settings.data.value_range, classes)
    model = _model(opened, settings, len(classes)).to(device)
    fill = np.clip(np.rint(255 * np.array(backbone.mean)), 0, 255).astype(np.uint8)
    crops = Crops(layout.train, reader, settings, size, fill)
    trained = train_head(model, crops, settings, weights, Normalise(backbone.mean, backbone.std, device))
    predictor = Predictor(
        _forward(model, settings, device), mean=backbone.mean, std=backbone.std, size=size, multiple=max(32, backbone.stride),
        inference=settings.inference, scales=settings.test_scales, flip=settings.test_flip, device=device,
    )  # fmt: skip
    counts, rows = _measure(predictor, layout.val, reader, settings)
    metrics = figures(counts)
    protocol = {
        **layout.facts,
        "split": layout.split,
        "train_images": len(layout.train),
        "val_images": len(layout.val),
        "train_fingerprint": fingerprint(layout.train),
        "val_fingerprint": fingerprint(layout.val),
        "classes": len(classes),
        "class_names": classes.names,
        "miou_interval_95": interval(counts, settings.seed),
        "interval": "percentile bootstrap over val images",
        "measured_at": "the size of each mask",
        "layers": model.trunk.layers,
        "size": size,
        "trained_on": f"{len(layout.train):,} images, {trained['steps']} steps of {settings.batch}",
        "selected": "nothing: the weights of the last step, with the keys given",
        "training": trained,
        "settings": settings.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": results.versions(),
    }
    if class_weights_used := (None if weights is None else [round(float(w), 5) for w in weights]):
        protocol["class_weights"] = class_weights_used
    result = results.result("segment", opened, metrics, protocol)
    result["per_class"] = per_class(counts, classes.names)
    path = out or results.path_in_run("segment", opened)
    if path is not None and rows:
        from .segment_pictures import sheet

        picture = path.with_suffix(".png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        title = f"{settings.head} on {opened.name}: mIoU {100 * metrics['miou']:.1f} %"
        result["pictures"] = [str(sheet(rows, classes.names, title, picture))]
    json.dumps(result, allow_nan=False)
    results.save(result, opened, out)
    return result, counts


def _model(target: Target, settings: SegmentSettings, classes: int) -> Segmenter:
    assert target.backbone is not None
    backbone = target.backbone
    trunk = Trunk(backbone, settings.head)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = create_head(
            settings.head, trunk.channels, classes, stride=backbone.stride, in_chans=backbone.in_chans, width=settings.width,
            dropout=settings.dropout,
        )  # fmt: skip
    return Segmenter(trunk, head, frozen=settings.trunk == "frozen")


def _forward(model: Segmenter, settings: SegmentSettings, device: torch.device) -> Any:
    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = model(images)
        return torch.nn.functional.interpolate(
            logits.float(), size=images.shape[-2:], mode="bilinear", align_corners=False
        )

    return forward


def _measure(
    predictor: Predictor, val: Pairs, reader: Reader, settings: SegmentSettings
) -> tuple[Counts, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Counts of every val image, and those that are drawn: evenly spaced ones."""
    shown = set(spread(len(val), settings.pictures).tolist())
    progress, found, rows = Progress(len(val), "val images"), [], []
    for i, (image, mask) in enumerate(zip(val.images, val.masks)):
        pixels, truth = reader.pair(image, mask)
        predicted = predictor(pixels)
        found.append(count(predicted, torch.from_numpy(truth).long(), len(reader.classes), settings.boundary))
        if i in shown:
            rows.append((pixels, truth, predicted.numpy()))
        progress.advance(1)
    progress.close()
    return Counts.stacked(found), rows


def show(result: dict[str, Any], out: Path | None = None) -> None:
    """The usual table, then one row a class."""
    from rich.markup import escape
    from rich.table import Table

    results.show(result, out)
    table = Table(caption="in %", caption_justify="left")
    table.add_column("class", overflow="fold")
    columns = ("iou", "dice", "boundary_iou", "accuracy")
    for name in (*columns, "pixels"):
        table.add_column(name.replace("_", " "), justify="right")
    for row in result["per_class"]:
        cells = ("–" if row[key] is None else f"{100 * row[key]:.1f}" for key in columns)
        table.add_row(escape(row["class"]), *cells, f"{row['pixels']:,}")
    console = results.terminal()
    console.print(table)
    for path in result.get("pictures", []):
        console.print(f"picture: {path}", markup=False, highlight=False, soft_wrap=True)
