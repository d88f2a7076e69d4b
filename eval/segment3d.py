"""Segmentation of volumes with UNETR on a backbone: train on masks, predict in overlapping windows, count, draw.

Nothing is chosen on the val volumes: they are looked at once, by the weights of the last step.
"""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup import dist
from selfsup.config import DataConfig
from selfsup.data.volumes import resized
from selfsup.data.workers import items
from selfsup.errors import UserError
from selfsup.losses.segmentation import pixel_cross_entropy, soft_dice

from . import results
from .datasets import read_as
from .descent import Descent
from .progress import Progress
from .settings import resolve
from .shown import spread
from .targets import Target, open_target
from .volume_data import VolumeCrops, VolumePairs, VolumeReader, open_pairs, open_reader
from .volume_figures import Row, counts, figures, hausdorff95, per_class, slices
from .volume_settings import Segment3dSettings
from .volume_unetr import UNETR, check_unetr, monai_blocks


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """`selfsup eval segment3d TARGET data=VOLUMES masks=MASKS`: print the result, write it to `out` or RUN/eval/segment3d*.json.

    Beside it the sheet of pictures, segment3d*.png.
    """
    settings = resolve("segment3d", overrides)
    assert isinstance(settings, Segment3dSettings)
    result = evaluate(target, settings, out)
    show(result, out)
    return result


def evaluate(target: str, settings: Segment3dSettings, out: Path | None = None) -> dict[str, Any]:
    """The same without printing."""
    results.check_destination(out)
    if dist.env_world()[1] > 1:
        raise UserError("eval segment3d runs as one process; start it without torchrun or with one task")
    monai_blocks()
    train, val, split = open_pairs(settings)
    opened = open_target(target, device=settings.device)
    if opened.backbone is None:
        raise UserError("eval segment3d: pixels have no maps of features; give a run or a backbone")
    backbone, device = opened.backbone, opened.device
    check_unetr(backbone)
    shape = _shape(opened, settings)
    backbone.check_size(shape)
    config = _data(opened, settings)
    reader = open_reader((train, val), settings, backbone.in_chans, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = UNETR(backbone, len(reader.names), settings.width, settings.trunk == "frozen").to(device)
    trained = _train(model, VolumeCrops(train, reader, settings, shape), settings, device)
    counted, surfaces, rows = _measure(model, val, reader, settings, shape, device)
    metrics = figures(counted)
    protocol = {
        "train": settings.data.path,
        "val": settings.data.val or settings.data.path,
        "split": split,
        "train_volumes": len(train),
        "val_volumes": len(val),
        "train_fingerprint": train.fingerprint(),
        "val_fingerprint": val.fingerprint(),
        "class_names": reader.names,
        "measured_at": "the grid of each mask; dice: classes other than 0, a mean over volumes, then over classes",
        "layers": model.layers,
        "shape": list(shape),
        "levels": config.model_dump(include={"value_range", "percentiles", "channel", "spacing"}, mode="json"),
        "trained_on": f"{len(train):,} volumes, {settings.steps} steps of {settings.batch} crops",
        "selected": "nothing: the weights of the last step, with the keys given",
        "training": trained,
        "settings": settings.model_dump(mode="json"),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": results.versions(),
    }
    result = results.result("segment3d", opened, metrics, protocol)
    result["per_class"] = per_class(counted, reader.names, surfaces)

    def draw(path: Path) -> Path:
        from .segment_pictures import sheet

        title = f"UNETR on {opened.name}: Dice {100 * metrics['dice']:.1f} %"
        return sheet(rows, reader.names, title, path)

    results.save_with_sheet(result, opened, out, draw if rows else None)
    return result


def _shape(opened: Target, settings: Segment3dSettings) -> tuple[int, int, int]:
    """Voxels of a crop and of a window: as given, else the run's global crops, else what the backbone was built for."""
    built: Any = opened.backbone.volume_size  # type: ignore[union-attr]
    if opened.config is not None:
        crops = opened.config.views.global_
        built = (crops.slices or crops.size, crops.size, crops.size)
    if settings.size is None:
        return settings.depth or built[0], built[1], built[2]
    return settings.depth or settings.size, settings.size, settings.size


def _data(opened: Target, settings: Segment3dSettings) -> DataConfig:
    """How values are read: as given, else as the run read them; percentiles that are given go before the run's window."""
    found = read_as(opened, settings.data)
    if settings.data.percentiles is not None and settings.data.value_range is None:
        found = found.model_copy(update={"value_range": None})
    return found


def _train(model: UNETR, crops: VolumeCrops, settings: Segment3dSettings, device: torch.device) -> dict[str, Any]:
    """Train in place on cross-entropy + Dice, as UNETR (section 3.2, equation 1). UserError if the loss is not finite."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    descend = Descent(named, settings, frozen=model.frozen, steps=settings.steps, images=len(crops.pairs))
    progress, said = Progress(settings.steps, "training UNETR, steps"), 0.0
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        closing(items(crops, 0, settings.steps, workers=settings.workers)) as made,
    ):
        torch.manual_seed(settings.seed)
        model.train()
        for step, (volumes, masks) in enumerate(made):
            logits = _logits(model, _normalised(volumes.to(device), model), settings).flatten(2, 3)  # [B, K, D*H, W]
            truth = masks.to(device).flatten(1, 2)  # [B, D*H, W]
            loss = pixel_cross_entropy(logits, truth) + soft_dice(logits, truth)
            descend(loss, step)
            said = said if (value := descend.looked_at(loss, step)) is None else value
            progress.advance(1, f"loss {said:.4f}")
    progress.close(f"loss {said:.4f}")
    model.eval()
    return {"steps": settings.steps, "lr": descend.peak, "loss": "cross-entropy + Dice", "final_loss": round(said, 5)}


def _normalised(volumes: Tensor, model: UNETR) -> Tensor:
    """[B, C, D, H, W] of 0..1, as the backbone takes it."""
    mean, std = (
        torch.tensor(v, device=volumes.device).view(-1, 1, 1, 1) for v in (model.backbone.mean, model.backbone.std)
    )
    return (volumes - mean) / std


def _logits(model: UNETR, volumes: Tensor, settings: Segment3dSettings) -> Tensor:
    with torch.autocast(volumes.device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
        return model(volumes).float()


@torch.no_grad()
def predict(
    model: UNETR, volume: np.ndarray, settings: Segment3dSettings, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """float [C, D, H, W] of 0..1 -> logits [K, D, H, W], from windows that overlap, averaged with a Gaussian weight."""
    from monai.inferers.utils import sliding_window_inference

    x = _normalised(torch.from_numpy(volume)[None].to(device), model)
    low = float(_normalised(torch.zeros(1, len(volume), 1, 1, 1, device=device), model).min())
    found: Any = sliding_window_inference(
        x, shape, settings.windows, lambda part: _logits(model, part, settings), overlap=settings.overlap, mode="gaussian",
        cval=low,
    )  # fmt: skip
    return found[0].cpu()


def _measure(
    model: UNETR,
    val: VolumePairs,
    reader: VolumeReader,
    settings: Segment3dSettings,
    shape: tuple[int, ...],
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray | None, list[Row]]:
    """Counts [N, 3, K] and distances [N, K] of every val volume, and the slices that are drawn: of evenly spaced ones."""
    shown = set(spread(len(val), settings.pictures).tolist())
    progress, counted, surfaces, rows = Progress(len(val), "val volumes"), [], [], []
    for i, (image, mask) in enumerate(zip(val.images, val.masks)):
        volume, spacing = reader.volume(image)
        truth = reader.mask(mask)
        logits = resized(predict(model, volume, settings, shape, device), truth.shape)
        predicted = logits.argmax(0).numpy()
        counted.append(counts(predicted, truth, len(reader.names)))
        if settings.hausdorff:
            ratio = [
                n / m for n, m in zip(volume.shape[1:], truth.shape)
            ]  # the mask's own voxels, if volumes are resampled
            own: Any = None if spacing is None else tuple(s * r for s, r in zip(spacing, ratio))
            surfaces.append(hausdorff95(predicted, truth, len(reader.names), own))
        if i in shown:
            rows += slices(resized(torch.from_numpy(volume), truth.shape).numpy(), truth, predicted)
        progress.advance(1)
    progress.close()
    return np.stack(counted), np.stack(surfaces) if surfaces else None, rows


def show(result: dict[str, Any], out: Path | None = None) -> None:
    """The usual table, then one row a class."""
    from rich.markup import escape
    from rich.table import Table

    results.show(result, out)
    surfaces = "hausdorff95" in result["per_class"][0]
    table = Table()
    table.add_column("class", overflow="fold")
    for name in ("Dice, %", *(("Hausdorff 95, mm",) if surfaces else ()), "voxels"):
        table.add_column(name, justify="right")
    for row in result["per_class"]:
        cells = ["–" if row["dice"] is None else f"{100 * row['dice']:.1f}"]
        if surfaces:
            cells.append("–" if row["hausdorff95"] is None else f"{row['hausdorff95']:.1f}")
        table.add_row(escape(row["class"]), *cells, f"{row['voxels']:,}")
    console = results.terminal()
    console.print(table)
    for path in result.get("pictures", []):
        console.print(f"picture: {path}", markup=False, highlight=False, soft_wrap=True)
