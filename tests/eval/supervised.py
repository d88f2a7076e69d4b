"""A tiny supervised run on real images."""

import importlib
from pathlib import Path

from selfsup import config
from tests.eval.conftest import RUN

TINY = [word for word in RUN if not word.startswith("method.")]
TINY += ["method=supervised", "method.ema=0.5", "views.global.count=1", "optimizer.lr=0.003", "steps=30"]


def train(out: Path, *words: str, **options: object) -> Path:
    """30 steps of a tiny ViT with labels."""
    importlib.import_module("selfsup.train").train(config.load(None, [*TINY, *words]), out=out, quiet=True, **options)
    return out
