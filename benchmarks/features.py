"""Features of JPEG files by a frozen ViT: our extraction into memory-mapped files, and the plain loop over a timm model."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import photographs
from benchmarks.case import Timed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def inputs(options: dict[str, Any], folder: Path) -> None:
    """Photographs and weights."""
    import timm

    photographs.write(folder / "images", options["images"])
    torch.manual_seed(0)
    model = timm.create_model(options["backbone"], num_classes=0)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder / "weights.safetensors")


class Ours(Timed):
    """features.extract without a cache, for the pooled output."""

    disclosures = (
        "features: both sides read, decode and resize in one worker process that they start and end each time; "
        "data-wait is the share of our time spent waiting for batches after the first",
    )

    @staticmethod
    def imports(path: str | None) -> None:

        import selfsup.eval.features  # noqa: F401

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        import numpy as np

        from selfsup.backbones import create_backbone
        from selfsup.config import BackboneConfig
        from selfsup.data.sources import open_source
        from selfsup.eval import features
        from selfsup.eval.datasets import Images
        from selfsup.eval.settings import FeatureSettings
        from selfsup.eval.targets import Target

        super().__init__(options, folder)
        size = options["size"]
        backbone = create_backbone(BackboneConfig(name=options["backbone"]), mean=MEAN, std=STD, input_size=size)
        backbone.model.load_state_dict(load_file(folder / "weights.safetensors"))
        backbone.eval().requires_grad_(False)
        self.target = Target("benchmark", "backbone", backbone, "benchmark", torch.device("cpu"))
        self.settings = FeatureSettings(
            batch_size=options["batch"], workers=options["workers"], cache=False, device="cpu"
        )
        source = open_source(str(folder / "images"), channels=3)
        self.images = Images(source, np.arange(len(source)), str(folder))
        self.transform = features.Transform(size, size * 256 // 224, "bicubic", MEAN, STD)
        self.waited = self.total = 0.0
        made = features._batches

        def watched(*a: Any, **k: Any) -> Iterator[Any]:
            for n, (item, seconds) in enumerate(timed(made(*a, **k))):
                self.waited += seconds if n else 0.0
                yield item

        features._batches = watched

    def _extract(self) -> Any:
        from selfsup.eval.features import extract
        from selfsup.eval.poolings import Request

        request = Request("pooled")
        began = time.perf_counter()
        found = extract(
            self.target, self.images, self.settings, [request], self.transform, scratch=self.folder, quiet=True
        )
        self.total += time.perf_counter() - began
        return found, found.array(request)

    def run(self, count: int) -> None:
        for _ in range(count):
            self._extract()

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        _, array = self._extract()
        return {"features": torch.tensor(array)}

    def facts(self) -> dict[str, Any]:
        return {"data_wait": self.waited / self.total}


def timed(iterator: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Items, and the seconds that each was waited for."""
    while True:
        began = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - began


class Timm(Timed):
    """create_model, create_transform, ImageFolder, DataLoader, a loop under no_grad."""

    disclosures = (
        "timm: create_model and create_transform (crop_pct 224/256), torchvision's ImageFolder, torch's DataLoader",
    )

    @staticmethod
    def imports(path: str | None) -> None:
        import torchvision.datasets  # noqa: F401

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        import timm
        import timm.data
        from torchvision import datasets

        super().__init__(options, folder)
        self.model: Any = timm.create_model(options["backbone"], num_classes=0).eval()
        self.model.load_state_dict(load_file(folder / "weights.safetensors"))
        transform = timm.data.create_transform(
            input_size=(3, options["size"], options["size"]),
            interpolation="bicubic",
            mean=MEAN,
            std=STD,
            crop_pct=224 / 256,
        )
        self.dataset = datasets.ImageFolder(str(folder / "images"), transform=transform)

    def run(self, count: int) -> None:
        for _ in range(count):
            loader = torch.utils.data.DataLoader(
                self.dataset, batch_size=self.options["batch"], num_workers=self.options["workers"]
            )
            with torch.no_grad():
                self.found = torch.cat([self.model(x) for x, _ in loader])

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.run(1)
        return {"features": self.found}


def differ(options: dict[str, Any], ours: dict[str, Tensor], peer: dict[str, Tensor]) -> str:
    """The features, in order."""
    a, b = ours["features"], peer["features"]
    if a.shape != b.shape:
        return f"features of shape {list(a.shape)}, timm's {list(b.shape)}"
    off = float((a - b).norm() / b.norm())
    return f"features are off by {off:.1e}" if off > 1e-4 else ""


SIDES: dict[str, type[Timed]] = {"ours": Ours, "timm": Timm}
