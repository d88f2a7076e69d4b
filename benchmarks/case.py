"""A timed row that is not the step: what it is called, which file holds its sides, and at which sizes.

The file `module` holds `SIDES`, a table of `Timed` classes by name ("ours" and the peers); `inputs(options, folder)`,
which writes what both sides read; and `differ(options, ours, peer)`, which says how their answers differ, or ''.
"""

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One row against one peer."""

    name: str
    peer: str
    title: str
    module: str
    """In this package."""
    options: dict[str, Any] = field(default_factory=dict)
    threads: int | None = None
    """Of every side; default: all."""
    minutes: float = 1.0
    """About how long the row takes on two cores, for the ETA."""
    dtype: str = "fp32"

    def load(self) -> ModuleType:
        """The file with the sides."""
        return importlib.import_module(f"benchmarks.{self.module}")


class Timed:
    """One side in its own process. Libraries are imported in `imports`, memory is counted from there."""

    disclosures: ClassVar[tuple[str, ...]] = ()
    shortest: ClassVar[float] = 0.3
    """Seconds between two looks at the clock, at least."""
    elsewhere: ClassVar[bool] = False
    """The work is done in processes of its own; this one's memory says nothing."""

    @staticmethod
    def imports(path: str | None) -> None:
        """Import everything; `path` is the peer's clone."""

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        self.options, self.folder = options, folder

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What both sides must agree on. `given` is the peer's answer, which is asked for first; the peer gets {}."""
        raise NotImplementedError

    def run(self, count: int) -> None:
        """The work that is timed, `count` times."""
        raise NotImplementedError

    def scale(self) -> float:
        """How often the timed work would have to be done; the seconds are multiplied by it."""
        return 1.0

    def flops(self) -> int | None:
        """Floating-point operations of one run; None: ask torch."""
        return None

    def facts(self) -> dict[str, Any]:
        """Anything else that belongs beside the ratio, such as the share of time spent waiting for data."""
        return {}


CASES: list[Case] = [
    Case(
        "loader", "dino", "500x375 JPEG files to model-ready crops, 2x224 + 8x96, all on one core", "loader",
        {"images": 128, "batch": 8, "photometric": True}, threads=1, minutes=1.1,
    ),
    Case(
        "loader-workers", "dino", "the workers' part alone: JPEG files to uint8 crops, on one core", "loader",
        {"images": 128, "batch": 8, "photometric": False}, threads=1, minutes=1.0,
    ),
    Case(
        "knn", "dino", "k-NN, bank 100,000 x 384, 2,000 queries, 1,000 classes, k = 10, 20, 100, 200", "knn",
        {"bank": 100_000, "queries": 2000, "width": 384, "classes": 1000, "k": [10, 20, 100, 200]}, minutes=3.0,
    ),
    Case(
        "knn-search", "faiss", "the same, all of it, against faiss's bare search (IndexFlatIP, k = 200)", "knn",
        {"bank": 100_000, "queries": 2000, "width": 384, "classes": 1000, "k": [10, 20, 100, 200]}, minutes=0.8,
    ),
    Case(
        "linear", "dino", "linear probe, ViT-S/16, 224 px, 13 learning rates x 2 poolings, images augmented each epoch",
        "linear", {"images": 16, "classes": 4, "rates": 13, "backbone": "vit_small_patch16_224", "size": 224}, minutes=1.5,
    ),
    Case(
        "linear-cached-10", "torch", "the same heads on cached features, 5,000 x 384, 10 classes", "linear_cached",
        {"images": 5000, "width": 384, "classes": 10, "rates": 13, "poolings": 2, "epochs": 1}, minutes=0.6,
    ),
    Case(
        "linear-cached-1000", "torch", "the same, 2,000 x 384, 1,000 classes", "linear_cached",
        {"images": 2000, "width": 384, "classes": 1000, "rates": 13, "poolings": 2, "epochs": 1}, minutes=1.0,
    ),
    Case(
        "features", "timm", "features of JPEG files, ViT-S/16, 224 px, batch 16, one loader worker", "features",
        {"images": 48, "batch": 16, "backbone": "vit_small_patch16_224", "size": 224, "workers": 1}, minutes=1.5,
    ),
    Case(
        "start", "dino", "start of the program to the end of its first step, ViT-Ti/16, K = 4,096, batch 4", "start",
        {"images": 128, "batch": 4, "out_dim": 4096}, minutes=5.0,
    ),
]  # fmt: skip
