"""Linear probes on cached features: all heads in batched products, and torch's Linear, CrossEntropyLoss and SGD, one run
a setting. Same first weights, same order of images, same cosine: the trained weights agree."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.case import Timed
from benchmarks.linear import RATES

BATCH = 256


def inputs(options: dict[str, Any], folder: Path) -> None:
    """Features of two widths and labels that they say something about."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(options["classes"], (options["images"],), generator=draw)
    found = {"labels": labels}
    for i in range(options["poolings"]):
        width = options["width"] * (i + 1)
        centres = torch.randn(options["classes"], width, generator=draw)
        found[f"features{i}"] = 0.3 * centres[labels] + torch.randn(options["images"], width, generator=draw)
    save_file(found, folder / "features.safetensors")


class Cache(Timed):
    """Holds the features."""

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        from selfsup.eval.probe import Recipe

        super().__init__(options, folder)
        found = load_file(folder / "features.safetensors")
        self.labels = found["labels"]
        self.features = [found[f"features{i}"] for i in range(options["poolings"])]
        batch = min(BATCH, options["images"])
        self.recipe = Recipe(RATES[: options["rates"]], options["epochs"], batch, options["classes"])


class Ours(Cache):
    """probe.train_cached."""

    @staticmethod
    def imports(path: str | None) -> None:
        import selfsup.eval.probe  # noqa: F401

    def run(self, count: int) -> None:
        from selfsup.eval.probe import Cached, Probe, train_cached

        for _ in range(count):
            self.probe = Probe([x.shape[1] for x in self.features], self.recipe)
            arrays = [x.numpy() for x in self.features]
            data = Cached(arrays, self.labels.numpy(), None, torch.device("cpu"))
            train_cached(self.probe, data, np.arange(len(self.labels)))

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.run(1)
        found: dict[str, Tensor] = {}
        for width, heads in self.probe.heads.items():
            weights = heads.weight.view(len(heads.weight), width, heads.rates, -1)  # [F, D, L, C]
            for feature, members in zip(self.probe.groups[width], weights):
                found |= {f"{feature} {lr}": members[:, i].T for i, lr in enumerate(self.recipe.lrs)}
        return found


class Torch(Cache):
    """One nn.Linear after another."""

    disclosures = ("torch: nn.Linear, CrossEntropyLoss and SGD(momentum 0.9), a run a setting, features in memory",)

    @staticmethod
    def imports(path: str | None) -> None:
        import selfsup.eval.probe  # noqa: F401  (only the order of images and the first weights)

    def _setting(self, x: Tensor, start: Tensor, lr: float) -> Tensor:
        from selfsup.eval.probe import order

        recipe = self.recipe
        head = nn.Linear(x.shape[1], recipe.classes)
        with torch.no_grad():
            head.weight.copy_(start)
            head.bias.zero_()
        peak = lr * recipe.batch / 256
        optimizer, loss = torch.optim.SGD(head.parameters(), peak, momentum=recipe.momentum), nn.CrossEntropyLoss()
        steps = math.ceil(len(x) / recipe.batch)
        for epoch in range(recipe.epochs):
            shuffled = torch.from_numpy(order(len(x), epoch, recipe.seed))
            for i, rows in enumerate(shuffled.split(recipe.batch)):
                progress = (epoch * steps + i) / (recipe.epochs * steps)
                optimizer.param_groups[0]["lr"] = peak * 0.5 * (1 + math.cos(math.pi * progress))
                optimizer.zero_grad()
                loss(head(x[rows]), self.labels[rows]).backward()
                optimizer.step()
        return head.weight.detach()

    def run(self, count: int) -> None:
        from selfsup.eval.probe import Probe

        for _ in range(count):
            self.found: dict[str, Tensor] = {}
            for i, x in enumerate(self.features):
                first = Probe([x.shape[1]], self.recipe).heads[x.shape[1]].weight[0, :, : self.recipe.classes].T
                self.found |= {f"{i} {lr}": self._setting(x, first, lr) for lr in self.recipe.lrs}

    def answer(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.run(1)
        return self.found


def differ(options: dict[str, Any], ours: dict[str, Tensor], peer: dict[str, Tensor]) -> str:
    """The trained weights of every head."""
    if ours.keys() != peer.keys():
        return f"heads of one side only: {sorted(ours.keys() ^ peer.keys())[:3]}"
    for name, theirs in peer.items():
        off = float((ours[name] - theirs).norm() / theirs.norm())
        if off > 1e-4:
            return f"the head {name} is off by {off:.1e}"
    return ""


SIDES: dict[str, type[Timed]] = {"ours": Ours, "torch": Torch}
