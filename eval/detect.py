"""Detection on a backbone: train torchvision's FCOS, RetinaNet or Faster R-CNN on boxes, find, count, draw.

Nothing is chosen on the val images: they are looked at once, by the weights of the last step.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsup import dist
from selfsup.errors import UserError

from . import results
from .datasets import read_as
from .detect_data import Batches, Picture, check, class_names, fingerprint
from .detect_figures import Found, check_installed, interval, matches, precision
from .detect_layouts import open_parts
from .detect_models import create_detector, multiple_of
from .detect_settings import DetectSettings
from .detect_train import detect, train_detector
from .progress import Progress
from .segment_data import Classes, Reader
from .settings import resolve
from .shown import spread
from .targets import Target, open_target


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """`selfsup eval detect TARGET data=IMAGES boxes=FILE|FOLDER`: print the result, write it to `out` or RUN/eval/detect*.json.

    Beside it the sheet of pictures, detect*.png.
    """
    settings = resolve("detect", overrides)
    assert isinstance(settings, DetectSettings)
    result = evaluate(target, settings, out)
    show(result, out)
    return result


def evaluate(target: str, settings: DetectSettings, out: Path | None = None) -> dict[str, Any]:
    """The same without printing."""
    results.check_destination(out)
    if dist.env_world()[1] > 1:
        raise UserError("eval detect runs as one process; start it without torchrun or with one task")
    counted_by = check_installed()
    settings = settings.complete()
    raw_train, raw_val, facts = open_parts(settings)
    names = class_names(raw_train, raw_val)
    (train, bad_train), (val, bad_val) = (
        check(raw, names, settings, what) for raw, what in ((raw_train, "train"), (raw_val, "val"))
    )
    for part, what in ((train, "train"), (val, "val")):
        if not any((~p.ignored).any() for p in part):
            raise UserError(f"boxes: none in {len(part)} {what} images; at least one is needed")
    opened = open_target(target, device=settings.device)
    backbone, device = opened.backbone, opened.device
    if backbone is None:
        raise UserError("eval detect: pixels have no maps of features; give a run or a backbone")
    short, long, square = sides(opened, settings)
    values = read_as(opened, settings.data).value_range
    reader = Reader(backbone.in_chans, settings.data.max_pixels, values, Classes(names, np.zeros(0)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = create_detector(backbone, len(names), square, settings).to(device)
    trained = train_detector(model, Batches(train, reader, settings, short, long, square), settings, device)
    found, rows = _find(model, val, reader, settings, short, long)
    metrics, per_class = precision(found, val, names)
    protocol = {
        **facts,
        "train_images": len(train),
        "val_images": len(val),
        "train_boxes": sum(int((~p.ignored).sum()) for p in train),
        "val_boxes": sum(int((~p.ignored).sum()) for p in val),
        "ignored_boxes": {
            "train": sum(int(p.ignored.sum()) for p in train),
            "val": sum(int(p.ignored.sum()) for p in val),
        },
        "bad_boxes_left_out": {"train": bad_train, "val": bad_val},
        "train_fingerprint": fingerprint(train),
        "val_fingerprint": fingerprint(val),
        "classes": len(names),
        "class_names": names,
        **interval(matches(found, val, len(names)), settings.seed),
        "interval": "percentile bootstrap over val images",
        "counted_by": counted_by,
        "measured_at": "the size of each image, at most 100 boxes an image",
        "size": short,
        "max_size": long,
        "filled_up_to": square,
        "trained_on": f"{len(train):,} images, {trained['steps']} steps of {settings.batch}",
        "selected": "nothing: the weights of the last step, with the keys given",
        "training": trained,
        "settings": settings.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": results.versions(),
    }
    result = results.result("detect", opened, metrics, protocol)
    result["per_class"] = per_class

    def draw(path: Path) -> Path:
        from .detect_pictures import sheet

        title = f"{settings.detector} on {opened.name}: mAP {100 * metrics['map']:.1f} %, mAP50 {100 * metrics['map50']:.1f} %"
        return sheet(rows, names, title, path, settings.shown)

    results.save_with_sheet(result, opened, out, draw if rows else None)
    return result


def sides(target: Target, settings: DetectSettings) -> tuple[int, int, int]:
    """(shorter side, longer side at most, side of the squares that images are filled up to). UserError if it is not taken."""
    backbone = target.backbone
    assert backbone is not None
    short = settings.size or (target.config.views.global_.size if target.config is not None else backbone.input_size)
    long = settings.max_size or round(short * 5 / 3)
    if long < short:
        raise UserError(f"max_size={long} is smaller than size={short}, the shorter side")
    if backbone.fixed_size:
        side = backbone.input_size
        if max(short, settings.max_size or 0) > side:
            raise UserError(
                f"size={short}, max_size={long}: {backbone.name} takes {side} pixels alone; both must fit into it"
            )
        return short, min(long, side), side
    step = multiple_of(backbone)
    side = math.ceil(long / step) * step
    backbone.check_size(side)
    return short, long, side


def _find(
    model: torch.nn.Module, val: list[Picture], reader: Reader, settings: DetectSettings, short: int, long: int
) -> tuple[list[Found], list[tuple[np.ndarray, Picture, Found]]]:
    """What is found in every val image, and those that are drawn: evenly spaced ones."""
    shown = set(spread(len(val), settings.pictures).tolist())
    progress, found, rows = Progress(len(val), "val images"), [], []
    for i, picture in enumerate(val):
        pixels = reader.image(picture.path)
        found.append(detect(model, pixels, short, long, settings))
        if i in shown:
            rows.append((pixels, picture, found[-1]))
        progress.advance(1)
    progress.close()
    return found, rows


def show(result: dict[str, Any], out: Path | None = None) -> None:
    """The usual table, then one row a class."""
    from rich.markup import escape
    from rich.table import Table

    results.show(result, out)
    table = Table(caption="in %", caption_justify="left")
    table.add_column("class", overflow="fold")
    for name in ("mAP", "mAP50", "mAP75", "objects"):
        table.add_column(name, justify="right")
    for row in result["per_class"]:
        cells = ("–" if row[key] is None else f"{100 * row[key]:.1f}" for key in ("map", "map50", "map75"))
        table.add_row(escape(row["class"]), *cells, f"{row['objects']:,}")
    console = results.terminal()
    console.print(table)
    for path in result.get("pictures", []):
        console.print(f"picture: {path}", markup=False, highlight=False, soft_wrap=True)
