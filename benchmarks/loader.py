"""JPEG files to model-ready crops on one core: our loader, and dino's transform under torchvision's ImageFolder.

The sides agree when our code, given the very boxes, factors and orders that dino's transform drew, makes its crops.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers_dino, photographs
from benchmarks.case import Timed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEWS = 10
WORST, USUAL = 1.0, 0.5
"""Levels of 255 that a crop, and all crops, may differ on average from dino's: a bicubic kernel that rounds elsewhere."""


def inputs(options: dict[str, Any], folder: Path) -> None:
    """The photographs."""
    photographs.write(folder / "images", options["images"])


class Ours(Timed):
    """The loader, as training uses it without worker processes; with `photometric`, also what the trainer then does."""

    disclosures = (
        "loader: batches of one size on both sides (dino's by DataLoader and default_collate), no worker processes",
    )

    @staticmethod
    def imports(path: str | None) -> None:
        import selfsup.data.loader
        import selfsup.data.photometric
        import selfsup.data.sources  # noqa: F401

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        from selfsup.config import Config
        from selfsup.data.loader import Loader
        from selfsup.data.sources import open_source
        from selfsup.data.views import multicrop

        super().__init__(options, folder)
        source = open_source(str(folder / "images"), channels=3)
        self.loader = Loader(source, multicrop(Config().views), seed=0, global_batch=options["batch"])
        self.stream = self.loader.stream(0, 10**9)

    def run(self, count: int) -> None:
        from selfsup.data import photometric

        for _ in range(count):
            (batch,) = next(self.stream)
            if self.options["photometric"]:
                for crops, params in zip(batch.crops, batch.params):
                    photometric.apply(crops, params, MEAN, STD, "cpu")

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Crops for the draws in `given`."""
        from selfsup.data import photometric
        from selfsup.data.views import crops_of, prepare

        source = self.loader.make.source
        out = {}
        for kind, size in (("global", 224), ("local", 96)):
            params = given[f"{kind}_params"]  # [B,V,P]
            made = []
            for i, rows in enumerate(params):
                image = prepare(source.read(i))
                crops = torch.from_numpy(crops_of([image] * len(rows), rows.numpy(), size, "bicubic"))
                x = photometric.apply(crops.permute(0, 3, 1, 2)[None], rows[None], MEAN, STD, "cpu")
                made.append(x[0])
            out[kind] = torch.stack(made)
        return out

    def flops(self) -> int:
        return 0


class Dino(Timed):
    """DataAugmentationDINO with the defaults of main_dino.py, through ImageFolder and DataLoader as main_dino builds them."""

    disclosures = (peers_dino.NO_NETWORK,)

    @staticmethod
    def imports(path: str | None) -> None:
        peers_dino.load(path, "main_dino")

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        import main_dino
        from torchvision import datasets

        super().__init__(options, folder)
        transform = main_dino.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), VIEWS - 2)
        self.dataset = datasets.ImageFolder(str(folder / "images"), transform=transform)
        self.batches = self._forever()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from torch.utils.data.DataLoader(
                self.dataset, batch_size=self.options["batch"], shuffle=True, drop_last=True
            )

    def run(self, count: int) -> None:
        for _ in range(count):
            next(self.batches)

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Crops of the first images, and what was drawn for each."""
        random.seed(0)
        torch.manual_seed(0)
        found: dict[str, list[Tensor]] = {k: [] for k in ("global", "local", "global_params", "local_params")}
        for i in range(min(8, len(self.dataset))):
            with recorded() as draws:
                crops, _ = self.dataset[i]
            rows = torch.from_numpy(np.stack([packed(draw) for draw in draws]))
            for kind, part in (("global", slice(0, 2)), ("local", slice(2, None))):
                found[kind].append(torch.stack(crops[part]))
                found[f"{kind}_params"].append(rows[part])
        return {k: torch.stack(v) for k, v in found.items()}

    def flops(self) -> int:
        return 0


@contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """What torchvision's transforms and dino's are called with meanwhile: one dictionary a crop."""
    import torchvision.transforms.functional as functional
    import utils

    draws: list[dict[str, Any]] = []
    jitter = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    places = [(functional, name) for name in ("resized_crop", "hflip", "rgb_to_grayscale", *jitter)]
    places += [(utils.ImageFilter, "GaussianBlur"), (utils.ImageOps, "solarize")]
    before = [(place, name, getattr(place, name)) for place, name in places]

    def note(name: str, original: Any) -> Any:
        def called(*a: Any, **k: Any) -> Any:
            if name == "resized_crop":
                draws.append({"box": a[1:5], "jitter": []})
            elif name in jitter:
                draws[-1]["jitter"].append((jitter.index(name), float(a[1])))
            else:
                draws[-1][name] = k.get("radius", True)
            return original(*a, **k)

        return called

    for place, name, original in before:
        setattr(place, name, note(name, original))
    try:
        yield draws
    finally:
        for place, name, original in before:
            setattr(place, name, original)


def packed(draw: dict[str, Any]) -> np.ndarray:
    """A recorded draw as selfsup's row of parameters."""
    from selfsup.data.views import ORDERS, ViewParams

    top, left, height, width = draw["box"]
    factors = dict(draw["jitter"])
    order = ORDERS.index(tuple(op for op, _ in draw["jitter"])) if factors else -1
    return ViewParams(
        x=left, y=top, w=width, h=height, hflip=float("hflip" in draw), vflip=0, order=order,
        brightness=factors.get(0, 1.0), contrast=factors.get(1, 1.0), saturation=factors.get(2, 1.0),
        hue=factors.get(3, 0.0), gray=float("rgb_to_grayscale" in draw), sigma=draw.get("GaussianBlur", 0.0),
        solarize=128 if "solarize" in draw else -1,
    ).pack()  # fmt: skip


def differ(options: dict[str, Any], ours: dict[str, Tensor], peer: dict[str, Tensor]) -> str:
    """Mean difference of the crops in levels of 255."""
    std = torch.tensor(STD).view(3, 1, 1)
    each = []
    for kind in ("global", "local"):
        if ours[kind].shape != peer[kind].shape:
            return f"{kind} crops of shape {list(ours[kind].shape)}, dino's {list(peer[kind].shape)}"
        each.append(((ours[kind] - peer[kind]) * std * 255).abs().mean(dim=(2, 3, 4)).flatten())
    levels = torch.cat(each)
    if levels.max() > WORST or levels.mean() > USUAL:
        return f"crops of the same draws differ by {levels.mean():.2f} levels on average, {levels.max():.2f} at worst"
    return ""


SIDES: dict[str, type[Timed]] = {"ours": Ours, "dino": Dino}
