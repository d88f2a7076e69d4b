"""Semantic segmentation on a backbone: train a head on masks, predict at the original size, count, draw.

Nothing is chosen on the val images: they are looked at once, by the weights of the last step. The trained model is kept beside
the result; given as TARGET, it is measured on other images, or predicts masks for them, and nothing is trained.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfsup import dist
from selfsup.errors import UserError

from . import results, segment_model
from .progress import Progress
from .segment_data import Reader, fingerprint
from .segment_figures import Counts, count, figures, interval, per_class
from .segment_layouts import Pairs
from .segment_model import SegmentModel
from .segment_predict import Writer, predict
from .segment_settings import SegmentSettings
from .segment_subject import check_keys, has_masks, loaded, trained
from .settings import resolve
from .shown import spread


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """`selfsup eval segment TARGET data=IMAGES masks=MASKS`: print the result, write it to `out` or RUN/eval/segment*.json.

    Beside it the sheet of pictures, segment*.png, and the trained model, the folder segment*. A stopped training is gone on with
    by the same command; a finished one is not repeated. TARGET may be such a folder: nothing is trained then, and with
    `predictions=OUT` no masks are needed.
    """
    settings = resolve("segment", overrides)
    assert isinstance(settings, SegmentSettings)
    if segment_model.is_model(target) and not has_masks(settings):
        check_keys(target, settings)
        if settings.predictions is None:
            raise UserError(
                f"data={settings.data.path}: no masks, so no figures; give masks=FOLDER, or predictions=OUT"
            )
        if out is not None:
            raise UserError(
                f"--out {out}: without masks there are no figures to write; give masks=FOLDER, or leave it out"
            )
        return predict(segment_model.load(target, settings.device), Path(target), settings)
    result, _ = evaluate(target, settings, out)
    show(result, out)
    return result


def evaluate(target: str, settings: SegmentSettings, out: Path | None = None) -> tuple[dict[str, Any], Counts]:
    """The same without printing; and the counts of each val image, for paired differences (`segment_figures.interval`)."""
    results.check_destination(out)
    if dist.env_world()[1] > 1:
        raise UserError("eval segment runs as one process; start it without torchrun or with one task")
    subject = loaded(target, settings) if segment_model.is_model(target) else trained(target, settings, out)
    model, opened, val = subject.model, subject.target, subject.val
    reader = Reader(
        model.segmenter.trunk.backbone.in_chans,
        settings.data.max_pixels,
        settings.data.value_range or model.value_range,
        model.table,
    )
    top = settings.data.val or settings.data.path
    writer = Writer(settings.predictions, model.table, str(top)) if settings.predictions is not None else None
    counts, rows = _measure(model, val, reader, settings, writer)
    metrics = figures(counts)
    protocol = {
        **subject.protocol,
        "val_images": len(val),
        "val_fingerprint": fingerprint(val),
        "classes": len(model.classes),
        "class_names": model.classes,
        "miou_interval_95": interval(counts, settings.seed),
        "interval": "percentile bootstrap over val images",
        "measured_at": "the size of each mask",
        "layers": model.segmenter.trunk.layers,
        "size": settings.size or model.size,
        "settings": settings.model_dump(mode="json"),
        "versions": results.versions(),
    }
    if writer is not None:
        protocol["note"] = f"predicted masks are in {writer.out}"
    result = results.result("segment", opened, metrics, protocol)
    result["per_class"] = per_class(counts, model.classes)

    def draw(path: Path) -> Path:
        from .segment_pictures import sheet

        title = f"{protocol['head']} on {opened.name}: mIoU {100 * metrics['miou']:.1f} %"
        return sheet(rows, model.classes, title, path)

    results.save_with_sheet(result, opened, out, draw if rows else None)
    return result, counts


def _measure(
    model: SegmentModel, val: Pairs, reader: Reader, settings: SegmentSettings, writer: Writer | None
) -> tuple[Counts, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Counts of every val image, and those that are drawn: evenly spaced ones."""
    predictor = model.predictor(
        settings.inference, settings.test_scales, settings.test_flip, settings.precision, settings.size
    )
    shown = set(spread(len(val), settings.pictures).tolist())
    progress, found, rows = Progress(len(val), "val images"), [], []
    for i, (image, mask) in enumerate(zip(val.images, val.masks)):
        pixels, truth = reader.pair(image, mask)
        predicted = predictor(pixels)
        found.append(count(predicted, torch.from_numpy(truth).long(), len(reader.classes), settings.boundary))
        if writer is not None:
            writer.write(image, predicted)
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
