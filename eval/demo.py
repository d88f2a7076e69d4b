"""`selfsup demo`: train on the bundled images, evaluate beside honest baselines, draw, and hand over the backbone."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfsup import checkpoint
from selfsup.config import Config
from selfsup.log import duration

from . import knn, linear, pictures

ROWS = {
    "random init": "random:{run}",
    "raw pixels": "pixels",
    "DINO student": "{run}@student",
    "DINO teacher": "{run}",
}
"""Rows of the demo's table and the targets they evaluate."""


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
    _say("4/4  the backbone, loaded by timm alone")
    check_backbone(out / "backbone")
    summary: dict[str, Any] = {
        "run": str(out),
        "rows": rows,
        "train_seconds": round(trained, 1),
        "seconds": round(time.monotonic() - began, 1),
        "pictures": [str(p) for p in drawn],
    }
    checkpoint.write_atomically(out / "demo.json", json.dumps(summary, indent=1) + "\n")
    show(rows)
    print(f"trained in {duration(trained)}, all in {duration(summary['seconds'])}")
    print(f"pictures: {', '.join(str(p) for p in drawn)}")
    print(f'load it: timm.create_model("local-dir:{out / "backbone"}", pretrained=True)')
    print(f'     or: selfsup.load_backbone("{out}")')
    return summary


def evaluate_rows(run: Path) -> list[dict[str, Any]]:
    """k-NN (k = 20, T = 0.07) and linear top-1 of every row's target on the run's own data."""
    rows = []
    for name, pattern in ROWS.items():
        target = pattern.format(run=run)
        words = ["eval.train=demo:train", "eval.val=demo:val"]
        slug = name.replace(" ", "_")
        nearest = knn.evaluate_quietly(target, [*words, "k=20"], run / "eval" / f"knn_{slug}.json")
        probe = linear.evaluate_quietly(target, words, run / "eval" / f"linear_{slug}.json")
        rows.append({"name": name, "knn": nearest["metrics"]["top1"], "linear": probe["metrics"]["top1"]})
        _say(f"     {name}: k-NN {rows[-1]['knn']:.4f}  linear {rows[-1]['linear']:.4f}")
    return rows


def check_backbone(folder: Path) -> None:
    """Load the exported folder with timm alone and compare with our loader, bit for bit."""
    import timm
    import torch

    from selfsup.backbones import load_backbone

    ours = load_backbone(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(4, ours.in_chans, ours.input_size, ours.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.equal(theirs(images), ours(images).pooled):
            raise RuntimeError(f"{folder}: timm computes something else than selfsup from the exported backbone")


def show(rows: list[dict[str, Any]]) -> None:
    """The demo's table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Fashion-MNIST, 10,000 training and 2,000 test images, no labels used in training")
    table.add_column("features")
    table.add_column("k-NN (k = 20)", justify="right")
    table.add_column("linear probe", justify="right")
    for row in rows:
        table.add_row(row["name"], f"{row['knn']:.2%}", f"{row['linear']:.2%}")
    Console().print(table)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
