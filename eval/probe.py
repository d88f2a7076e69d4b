"""Many linear classifiers trained at once on frozen features: every learning rate x feature in one batched product.

SGD with momentum on the cross-entropy, cosine to 0, no warm-up, weights from N(0, 0.01) and biases 0: the linear
evaluation of DINO (`eval_linear.py`, Caron et al., 2021). Each head is exactly what torch.optim.SGD would make of it
alone; heads share nothing but the images of a batch. The gradient of the cross-entropy is written out, so that a step is two
batched matrix products per feature width.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfsup import dist
from selfsup.randomness import generator

_STREAM = 0x11EA  # keeps the probe's draws apart from other uses of the same seed


@dataclass(frozen=True)
class Recipe:
    """How the heads are trained. `lrs` are at a batch of 256 and scale with `batch`."""

    lrs: tuple[float, ...]
    epochs: int
    batch: int
    classes: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    seed: int = 0

    def scaled(self) -> list[float]:
        """Peak learning rates as they are used."""
        return [lr * self.batch / 256 for lr in self.lrs]


class Heads:
    """L linear heads on each of F features of one width: weights [F, D, L*C], biases [F, 1, L*C]."""

    def __init__(self, features: int, width: int, recipe: Recipe, device: torch.device) -> None:
        self.recipe = recipe
        self.rates = len(recipe.lrs)
        # every learning rate of a feature starts from the same weights
        rng = torch.Generator().manual_seed(recipe.seed)
        one = torch.randn(features, width, recipe.classes, generator=rng) * 0.01
        self.weight = one.repeat(1, 1, self.rates).to(device)  # [F, D, L*C]
        self.bias = torch.zeros(features, 1, self.rates * recipe.classes, device=device)
        self.momenta = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self.lr = torch.tensor(recipe.scaled()).repeat_interleave(recipe.classes).to(device)  # [L*C]

    def logits(self, x: Tensor) -> Tensor:
        """x [F, B, D] -> [F, B, L, C]."""
        out = torch.baddbmm(self.bias, x, self.weight)  # [F, B, L*C]
        return out.view(*out.shape[:2], self.rates, self.recipe.classes)

    def step(self, x: Tensor, labels: Tensor, count: int, decay: float) -> None:
        """One SGD step on x [F, B, D], labels [B]; `count` images in the batch of all ranks, `decay` x peak rate."""
        gradient = self.logits(x).softmax(dim=-1)  # [F, B, L, C]; d CE / d logits = softmax - onehot
        index = labels[None, :, None, None].expand(*gradient.shape[:3], 1)
        gradient.scatter_add_(3, index, gradient.new_full((1,), -1.0).expand(index.shape))
        gradient = gradient.flatten(2).div_(count)  # [F, B, L*C]
        gradients = [torch.bmm(x.transpose(1, 2), gradient), gradient.sum(dim=1, keepdim=True)]
        for value, buffer, g in zip((self.weight, self.bias), self.momenta, gradients):
            dist.all_reduce_(g)
            if self.recipe.weight_decay:
                g.add_(value, alpha=self.recipe.weight_decay)
            buffer.mul_(self.recipe.momentum).add_(g)
            value.sub_(buffer * (self.lr * decay))


class Probe:
    """Heads on features of any widths, grouped so that each width is one batched product."""

    def __init__(self, widths: Sequence[int], recipe: Recipe, device: str | torch.device = "cpu") -> None:
        self.recipe = recipe
        self.device = torch.device(device)
        self.groups = {w: [i for i, width in enumerate(widths) if width == w] for w in dict.fromkeys(widths)}
        self.heads = {w: Heads(len(members), w, recipe, self.device) for w, members in self.groups.items()}

    def step(self, features: Sequence[Tensor], labels: Tensor, count: int, progress: float) -> None:
        """features: one [B, D_f] a feature; `progress` in [0, 1) is the part of training that is done."""
        decay = 0.5 * (1 + math.cos(math.pi * progress))
        for width, members in self.groups.items():
            self.heads[width].step(torch.stack([features[i] for i in members]), labels, count, decay)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[Sequence[Tensor], Tensor]]) -> dict[str, Tensor]:
        """Every head on (features, labels) batches -> top1, top5, loss, float64 [F, L]; diverged: top1 0, loss inf."""
        shape = (sum(len(m) for m in self.groups.values()), len(self.recipe.lrs))
        sums = {name: torch.zeros(shape, dtype=torch.float64) for name in ("top1", "top5", "loss")}
        total = 0
        for features, labels in batches:
            total += len(labels)
            for width, members in self.groups.items():
                logits = self.heads[width].logits(torch.stack([features[i] for i in members])).float()  # [F, B, L, C]
                truth = labels[None, :, None, None].expand(*logits.shape[:3], 1)
                own = logits.gather(3, truth)  # [F, B, L, 1]
                lower = torch.arange(logits.shape[3], device=logits.device) < truth
                # of equal logits the lower class ranks first, so rank = larger ones + equal ones of a lower class
                rank = ((logits > own) | ((logits == own) & lower)).sum(dim=3)  # [F, B, L]
                finite = logits.isfinite().all(dim=3)
                loss = logits.logsumexp(dim=3) - own[..., 0]
                loss = torch.where(finite, loss, loss.new_full((), math.inf))
                sums["top1"][members] += ((rank < 1) & finite).sum(dim=1).double().cpu()
                sums["top5"][members] += ((rank < 5) & finite).sum(dim=1).double().cpu()
                sums["loss"][members] += loss.double().sum(dim=1).cpu()
        return {name: value / max(total, 1) for name, value in sums.items()}


def order(n: int, epoch: int, seed: int) -> np.ndarray:
    """The order of n images in an epoch: a pure function of (seed, epoch)."""
    return generator(_STREAM, seed, epoch).permutation(n)


def my_part(indices: np.ndarray) -> np.ndarray:
    """This rank's images of a batch."""
    return indices[dist.rank() :: dist.world()]


class Cached:
    """Feature arrays read in batches: standardised, on the device; held there whole if they fit in `budget` bytes."""

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        labels: np.ndarray,
        statistics: Sequence[tuple[Tensor, Tensor]] | None,
        device: torch.device,
        budget: int = 2 << 30,
    ) -> None:
        self.arrays, self.device = arrays, device
        self.statistics = statistics
        self.labels = torch.from_numpy(labels)
        whole = sum(a.shape[0] * a.shape[1] * 4 for a in arrays) <= budget
        self.held = [self._prepare(f, np.asarray(a)) for f, a in enumerate(arrays)] if whole else None

    def _prepare(self, feature: int, rows: np.ndarray) -> Tensor:
        x = torch.tensor(rows, dtype=torch.float32).to(self.device)
        if self.statistics is not None:
            mean, scale = self.statistics[feature]
            x.sub_(mean).mul_(scale)
        return x

    def take(self, indices: np.ndarray) -> tuple[list[Tensor], Tensor]:
        """Rows [B] -> one [B, D_f] a feature, and labels [B]."""
        rows = torch.from_numpy(indices)
        labels = self.labels[rows].to(self.device)
        if self.held is not None:
            rows = rows.to(self.device)
            return [h[rows] for h in self.held], labels
        by_place = np.sort(indices)  # read a memory-mapped file front to back, then put the rows in order
        back = torch.from_numpy(np.argsort(np.argsort(indices, kind="stable"), kind="stable"))
        return [
            self._prepare(f, np.asarray(a[by_place]))[back.to(self.device)] for f, a in enumerate(self.arrays)
        ], labels

    def batches(self, indices: np.ndarray, batch: int = 4096) -> Iterator[tuple[list[Tensor], Tensor]]:
        """All of `indices` in order."""
        for start in range(0, len(indices), batch):
            yield self.take(indices[start : start + batch])


def statistics(array: np.ndarray, indices: np.ndarray, chunk: int = 16_384) -> tuple[Tensor, Tensor]:
    """(mean [D], 1 / standard deviation [D]) over the rows `indices` of [N, D], in float64; constant columns scale by 0."""
    indices = np.sort(indices)
    parts = [indices[i : i + chunk] for i in range(0, len(indices), chunk)]
    mean = sum(np.asarray(array[p], dtype=np.float64).sum(axis=0) for p in parts) / len(indices)
    variance = sum(np.square(np.asarray(array[p], dtype=np.float64) - mean).sum(axis=0) for p in parts) / len(indices)
    std = np.sqrt(variance)
    flat = std <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
    scale = np.where(flat, 0.0, 1.0 / np.where(flat, 1.0, std))
    return torch.from_numpy(np.asarray(mean)).float(), torch.from_numpy(scale).float()


def steps_of(recipe: Recipe, images: int) -> int:
    """Steps of a training on cached features."""
    return recipe.epochs * math.ceil(images / recipe.batch)


def train_cached(probe: Probe, data: Cached, indices: np.ndarray, tick: Callable[[int], object] | None = None) -> None:
    """Train on cached features in a seeded order. The last batch of an epoch may be smaller. tick(1) is called each step."""
    recipe = probe.recipe
    per_epoch = math.ceil(len(indices) / recipe.batch)
    for epoch in range(recipe.epochs):
        shuffled = indices[order(len(indices), epoch, recipe.seed)]
        for i in range(per_epoch):
            batch = shuffled[i * recipe.batch : (i + 1) * recipe.batch]
            features, labels = data.take(my_part(batch))
            probe.step(features, labels, len(batch), (epoch * per_epoch + i) / steps_of(recipe, len(indices)))
            if tick is not None:
                tick(1)
