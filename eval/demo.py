"""`selfsup demo`: train on the bundled images, evaluate beside honest baselines, draw, and hand over the backbone."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.image import imread

from selfsup import durable
from selfsup.backbones import load_backbone
from selfsup.backbones.export import timm_difference
from selfsup.config import Config
from selfsup.log import duration

from . import knn, linear, pictures
from .canvas import BLUE, INK, MUTED, ORANGE, bare, new_figure, save
from .results import terminal

ROWS = {
    "random init": "random:{run}",
    "raw pixels": "pixels",
    "DINO student": "{run}@student",
    "DINO teacher": "{run}",
}
"""Rows of the demo's table and the targets they evaluate."""

DATA = ["eval.train=demo:train", "eval.val=demo:val"]
LAYERS = ["layer=[-1,last2,last3]", "pooling=[pooled,patchmean]"]
"""The probe's grid, the same for every backbone: which of them is best is decided on held-out training images."""


def run_demo(config: Config, out: Path, train: Callable[[Config, Path], Any]) -> dict[str, Any]:
    """Train `config` into `out`, print one table, write demo.json and the pictures; returns what is in demo.json."""
    began = time.monotonic()
    _say("1/4  training")
    train(config, out)
    trained = time.monotonic() - began
    _say("2/4  k-NN and linear probe, beside random weights and raw pixels")
    rows = evaluate_rows(out)
    _say("3/4  pictures")
    drawn = pictures.draw_run(out)
    drawn = [poster(rows, drawn, out / "pictures" / "demo.png"), *drawn]
    _say("4/4  the backbone, loaded by timm alone")
    check_backbone(out / "backbone")
    summary: dict[str, Any] = {
        "run": str(out),
        "rows": rows,
        "train_seconds": round(trained, 1),
        "seconds": round(time.monotonic() - began, 1),
        "pictures": [str(p) for p in drawn],
    }
    durable.write_atomically(out / "demo.json", json.dumps(summary, indent=1) + "\n")
    show(rows)
    print(f"trained in {duration(trained)}, all in {duration(summary['seconds'])}")
    print(f"pictures: {', '.join(str(p) for p in drawn)}")
    print(f'load it: timm.create_model("local-dir:{out / "backbone"}", pretrained=True)')
    print(f'     or: selfsup.load_backbone("{out}")')
    return summary


def evaluate_rows(run: Path) -> list[dict[str, Any]]:
    """k-NN (k = 20, T = 0.07, the backbone's own output) and linear top-1 of every row's target on the bundled images."""
    rows = []
    for name, pattern in ROWS.items():
        target = pattern.format(run=run)
        slug = name.replace(" ", "_")
        grid = [] if target == "pixels" else LAYERS
        nearest = knn.evaluate_quietly(target, [*DATA, "k=20"], run / "eval" / f"knn_{slug}.json")
        probe = linear.evaluate_quietly(target, [*DATA, *grid], run / "eval" / f"linear_{slug}.json")
        rows.append({"name": name, "knn": nearest["metrics"]["top1"], "linear": probe["metrics"]["top1"]})
        _say(f"     {name}: k-NN {rows[-1]['knn']:.4f}  linear {rows[-1]['linear']:.4f}")
    return rows


def poster(rows: list[dict[str, Any]], drawn: list[Path], path: Path) -> Path:
    """The demo in one picture: the table as bars, the map of embeddings, the features as colours or attention."""
    found = {p.name: p for p in drawn}
    strip = found.get("pca.png") or found.get("attention.png")
    figure = new_figure(11, 7.2 if strip else 4.6)
    grid = figure.add_gridspec(2 if strip else 1, 2, height_ratios=[1.9, 1] if strip else None, width_ratios=[1, 1.15])
    bars = figure.add_subplot(grid[0, 0])
    names = [row["name"] for row in rows]
    for offset, key, label, colour in ((-0.2, "knn", "k-NN, k = 20", BLUE), (0.2, "linear", "linear probe", ORANGE)):
        values = [100 * row[key] for row in rows]
        drawn_bars = bars.barh([i + offset for i in range(len(rows))], values, height=0.36, color=colour, label=label)
        bars.bar_label(drawn_bars, fmt="%.1f", padding=3, fontsize=9, color=INK)
    bars.set_yticks(range(len(rows)), names)
    bars.invert_yaxis()
    bars.set_xlim(0, 100)
    bars.set_xlabel("accuracy on 2,000 test images (%)", color=MUTED)
    bars.spines[["top", "right", "left"]].set_visible(False)
    bars.tick_params(length=0)
    bars.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    for place, name in ((grid[0, 1], found.get("embeddings.png")), (grid[1, :] if strip else None, strip)):
        if place is not None and name is not None:
            axes = figure.add_subplot(place)
            bare(axes)
            axes.imshow(imread(name), interpolation="antialiased")
    return save(figure, path)


def check_backbone(folder: Path) -> None:
    """Load the exported folder with timm alone and compare with our loader, bit for bit."""
    difference = timm_difference(load_backbone(folder), folder)
    if difference != 0:
        raise RuntimeError(
            f"{folder}: timm computes something else than selfsup from the exported backbone ({difference})"
        )


def show(rows: list[dict[str, Any]]) -> None:
    """The demo's table."""
    from rich.table import Table

    table = Table(title="Fashion-MNIST, 10,000 training and 2,000 test images, no labels used in training")
    table.add_column("features")
    table.add_column("k-NN (k = 20)", justify="right")
    table.add_column("linear probe", justify="right")
    for row in rows:
        table.add_row(row["name"], f"{row['knn']:.2%}", f"{row['linear']:.2%}")
    terminal().print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
