"""`selfsup eval layers`: a linear probe on every layer, in one pass, and the curve of their accuracies."""

from pathlib import Path
from typing import Any

import numpy as np

from selfsup import dist
from selfsup.errors import UserError

from . import linear, results
from .canvas import BLUE, GREEN, ORANGE, PURPLE, new_figure, save
from .curves import panel
from .poolings import layer_count
from .settings import LinearSettings, resolve
from .shown import beside
from .targets import open_target


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """The probe as `selfsup eval linear`, with layer=0,1,...: result in `out` or RUN/eval/layers.json, and a picture."""
    settings = resolve("layers", overrides)
    assert isinstance(settings, LinearSettings)
    if settings.layer != (-1,):
        raise UserError(f"layer={settings.layer}: eval layers looks at each; leave it out, or use eval linear")
    results.check_destination(out)
    opened = open_target(target, device=settings.device)
    count = layer_count(opened.backbone) if opened.backbone is not None else 0
    if count < 2:
        raise UserError(f"eval layers {target}: it has {count} layers to compare; eval linear probes what there is")
    settings = settings.model_copy(update={"layer": tuple(range(count))})
    path = out or results.path_in_run("layers", opened)
    if path is None:
        raise UserError(f"eval layers {target}: it belongs to no run; name a result file with --out FILE.json")
    result = linear.evaluate(opened, settings, path)
    if not dist.is_main():
        return {}
    result["task"] = "layers"
    results.write(result, path)
    results.show({**result, "settings": best_rows(result["settings"])}, path)
    picture = beside("layers", opened, out)
    assert picture is not None
    print(f"picture: {draw(result, picture)}")
    return result


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every layer and pooling the row with the highest accuracy on held-out training images, in their order."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["pooling"], row["layer"])
        if key not in best or row["holdout_top1"] > best[key]["holdout_top1"]:
            best[key] = row
    return sorted(best.values(), key=lambda row: (row["pooling"], row["layer"]))


def draw(result: dict[str, Any], path: Path) -> Path:
    """Accuracy on held-out training images over layers, a line for each pooling."""
    rows, lines = best_rows(result["settings"]), []
    for pooling, colour in zip(sorted({row["pooling"] for row in rows}), (BLUE, ORANGE, GREEN, PURPLE)):
        mine = [row for row in rows if row["pooling"] == pooling]
        points = np.array([row["layer"] for row in mine]), np.array([100 * row["holdout_top1"] for row in mine])
        lines.append((pooling, points, colour))
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    p, top1 = result["protocol"], 100 * result["metrics"]["top1"]
    title = f"linear probe per layer, held-out training images (%); chosen: layer {p['layer']}, {top1:.1f} % on val"
    panel(axes, title, lines, marks=True, span=10.0)
    axes.set_xticks(range(max(row["layer"] for row in rows) + 1))
    axes.set_xlim(left=-0.3)
    axes.set_xlabel("layer", fontsize=8)
    return save(figure, path)
