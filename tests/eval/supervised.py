"""A tiny supervised run on real images."""

import importlib
from pathlib import Path

from selfsup import config
from tests.eval.conftest import RUN

TINY = [word for word in RUN if not word.startswith("method.")]
TINY += [
    "method=supervised",
    "method.ema=0.5",
    "views.global.count=1",
    "views.global.blur=0",
    "views.global.solarize=0",
    "views.global.scale=[0.8,1.0]",
    "optimizer.lr=0.005",
    "steps=60",
]


def train(out: Path, *words: str, **options: object) -> Path:
    """60 steps of a tiny ViT with labels."""
    importlib.import_module("selfsup.train").train(config.load(None, [*TINY, *words]), out=out, quiet=True, **options)
    return out
