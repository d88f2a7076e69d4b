"""Mixup, CutMix and RICAP: several images of a batch, and what their labels say, mixed into one.

mixup: Zhang et al., 2018, "mixup: Beyond Empirical Risk Minimization", equation 1: x = l x_i + (1 - l) x_j, l from Beta(a, a).
CutMix: Yun et al., 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", equations 1
and 2: a box of sqrt(1 - l) of each side, about any centre and cut at the borders, comes from the other image; labels are mixed
by the area that it then has, as in their code. RICAP: Takahashi et al., 2018, "RICAP: Random Image Cropping and Patching
Data Augmentation for Deep CNNs", section 3: four images, cropped at random to the four pieces about a boundary (w, h) whose
coordinates are fractions from Beta(b, b); labels are mixed by area.

Everything is drawn on the host, for all places of the global batch at once, from (seed, step): so that who computes which
part of it changes nothing, and the device is never waited for. Partners come from a random cycle through each group of
neighbouring places: no image is its own partner, and those of RICAP are four different ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfsup.config import MixConfig
from selfsup.data.rows import send
from selfsup.errors import UserError
from selfsup.randomness import generator
from selfsup.schedules import Plan, Schedule

_TAG = 0x31C5

Encode = Callable[[Tensor], Tensor]
"""Labels, int64 [B] -> what they say of each class, float [B,K]: one-hot or smoothed."""


@dataclass(frozen=True)
class Pairs:
    """mixup and CutMix of one micro-batch of B images."""

    sources: Tensor
    """int64 [B,2]: which images of the micro-batch, itself first."""
    weights: Tensor
    """float32 [B,2], of their labels; the sum is 1."""
    boxes: Tensor
    """int64 [B,4] top, left, bottom, right of what comes from the second image; empty where there is no CutMix."""
    shares: Tensor
    """float32 [B]: of the second image everywhere else."""

    def images(self, x: Tensor) -> Tensor:
        """x [...,B,C,S,S], which is left alone; several views of the images are mixed in the same way."""
        line = torch.arange(x.shape[-1], device=x.device)
        top, left, bottom, right = self.boxes.unbind(1)  # [B]
        rows = (line >= top[:, None]) & (line < bottom[:, None])  # [B,S]
        columns = (line >= left[:, None]) & (line < right[:, None])
        inside = (rows[:, :, None] & columns[:, None, :])[:, None]  # [B,1,S,S]
        share = torch.where(inside, 1.0, self.shares[:, None, None, None])  # [B,1,S,S]
        kind = torch.promote_types(x.dtype, torch.float32)
        other = x.index_select(-4, self.sources[:, 1])
        return torch.lerp(x.to(kind), other.to(kind), share.to(kind)).to(x.dtype)


@dataclass(frozen=True)
class Patches:
    """RICAP of one micro-batch of B images; pieces are upper left, upper right, lower left, lower right."""

    sources: Tensor
    """int64 [B,4]: which image of the micro-batch is in each piece."""
    weights: Tensor
    """float32 [B,4]: of their labels, which is the area; the sum is 1."""
    boundary: Tensor
    """int64 [B,2]: height and width of the upper left piece."""
    shift: Tensor
    """int64 [B,4,2]: what to add to a pixel's row and column to find it in the image that it comes from."""

    def images(self, x: Tensor) -> Tensor:
        """x [...,B,C,S,S], which is left alone; several views of the images are mixed in the same way."""
        size, batch = x.shape[-1], x.shape[-4]
        line = torch.arange(size, device=x.device)
        below = line >= self.boundary[:, 0, None]  # [B,S]
        beyond = line >= self.boundary[:, 1, None]
        piece = (2 * below[:, :, None] + beyond[:, None, :]).flatten(1)  # [B,S,S] -> [B,S*S]
        image = self.sources.gather(1, piece).view(batch, size, size)
        row = line[:, None] + self.shift[..., 0].gather(1, piece).view(batch, size, size)
        column = line + self.shift[..., 1].gather(1, piece).view(batch, size, size)
        channel = torch.arange(x.shape[-3], device=x.device)[:, None, None]  # [C,1,1]
        return x[..., image[:, None], channel, row[:, None], column[:, None]]


class Mixer:
    """What `mix` says: (images, labels, places in the global batch, step) -> mixed images and targets; a pure function."""

    def __init__(self, config: MixConfig, seed: int, global_batch: int) -> None:
        self.config, self.seed, self.global_batch = config, seed, global_batch

    def check(self, micro_batch: int) -> None:
        """Raises UserError if a micro-batch of so many images of one process does not hold whole groups."""
        name, group, least = self.config.name, self.config.group, self.config.images
        if name == "none" or micro_batch % group == 0:
            return
        held = (
            f"mix.group={group}: a process computes {micro_batch} images at a time, which is no whole number of groups"
        )
        fits = [n for n in range(least, min(group, micro_batch) + 1) if micro_batch % n == 0]
        if fits:
            raise UserError(
                f"{held}; use mix.group={fits[-1]}, or a global_batch that splits into multiples of {group}"
            )
        raise UserError(
            f"{held}, and mix.name={name} needs {least} or more images; "
            "lower accumulate or the number of processes, or raise global_batch"
        )

    def schedules(self, plan: Plan) -> dict[str, Schedule]:
        """'mix' is 1 until mix.until and then 0; nothing if that is null. What it gives is `on` of a call."""
        if self.config.name == "none" or self.config.until is None:
            return {}
        end = plan.steps_of(self.config.until)
        return {"mix": lambda step: float(step < end)}

    def __call__(
        self, images: Tensor, labels: Tensor, positions: Tensor, step: int, encode: Encode, on: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """images [...,B,C,S,S], labels int64 [B], positions int64 [B] -> mixed images and targets [B,K].

        positions are those of a `ViewBatch`: neighbours in the global batch. Several views are mixed in the same way.
        """
        said = encode(labels)
        mixture = self.at(positions, step, images.shape[-1], on)
        return (images, said) if mixture is None else (mixture.images(images), targets(mixture, said))

    def at(self, positions: Tensor, step: int, size: int, on: float = 1.0) -> Pairs | Patches | None:
        """What becomes of images of `size` pixels at these places in this step; None: they stay as they are."""
        if self.config.name == "none" or on <= 0:
            return None
        batch, device, group = len(positions), positions.device, self.config.group
        self.check(batch)
        if device.type == "cpu" and (int(positions[0]) % group or bool((positions.diff() != 1).any())):
            raise ValueError(f"positions must be whole groups of neighbours; seen {positions.tolist()[:8]} ...")
        random = generator(self.seed, _TAG, step)
        groups = self.global_batch // group
        draws = groups if self.config.mode == "group" else 1
        mixed = random.random(draws) < self.config.probability
        if not mixed.any():
            return None
        away = send(_partners(random.random((groups, group)), self.config.images), device)  # [N,images]
        sources = torch.arange(batch, device=device)[:, None] + away.index_select(0, positions)  # [B,images]
        kind: type[Pairs] | type[Patches] = Patches if self.config.name == "ricap" else Pairs
        draw = _draw_patches if kind is Patches else _draw_pairs
        drawn = draw(random, mixed, size, self.config)
        row = positions // group if draws == groups else torch.zeros_like(positions)
        return kind(sources, *(send(numbers, device).index_select(0, row) for numbers in drawn))


def targets(mixture: Pairs | Patches, said: Tensor) -> Tensor:
    """What the labels say [B,K] of the images of a micro-batch -> of what became of them [B,K]: the weighted mean."""
    each = said[mixture.sources]  # [B,images,K]
    return (each * mixture.weights[:, :, None].to(said.dtype)).sum(dim=1)


# ---------------------------------------------------------------------------------------------------- what is drawn, on the host


def _partners(u: np.ndarray, images: int) -> np.ndarray:
    """u [G,group] uniform -> int64 [G*group,images]: how far away in the batch the images are that go into each, itself first."""
    groups, group = u.shape
    cycle = u.argsort(axis=1)  # [G,group]: places of the group, in the order of the cycle
    found = np.empty((groups, group, images), np.int64)
    for k in range(images):
        np.put_along_axis(found[:, :, k], cycle, np.roll(cycle, -k, axis=1), axis=1)
    return (found - np.arange(group)[:, None]).reshape(-1, images)  # [G,group,images] -> [N,images]


def _draw_pairs(random: np.random.Generator, mixed: np.ndarray, size: int, config: MixConfig) -> tuple[np.ndarray, ...]:
    """weights [D,2], boxes [D,4] and shares [D] for D draws, of which `mixed` [D] says whether anything is."""
    draws = len(mixed)
    cut = random.random(draws) < {"mixup": 0.0, "cutmix": 1.0}.get(config.name, config.switch)
    of_mixup = random.beta(config.mixup_alpha, config.mixup_alpha, draws)
    of_cutmix = random.beta(config.cutmix_alpha, config.cutmix_alpha, draws)
    boxes = cutmix_boxes(of_cutmix, random.random((draws, 2)), size) * (cut & mixed)[:, None]
    top, left, bottom, right = boxes.T
    share = np.where(mixed & ~cut, 1 - of_mixup, 0.0)
    second = np.where(cut, (bottom - top) * (right - left) / size**2, share)
    return np.stack([1 - second, second], axis=1).astype(np.float32), boxes, share.astype(np.float32)


def cutmix_boxes(lam: np.ndarray, centre: np.ndarray, size: int) -> np.ndarray:
    """lam [D] and uniform centres [D,2] -> int64 [D,4] top, left, bottom, right."""
    half = np.floor(0.5 * np.sqrt(1 - lam) * size)[:, None]
    middle = np.floor(centre * size)  # [D,2]
    return np.concatenate([middle - half, middle + half], axis=1).clip(0, size).astype(np.int64)


def _draw_patches(
    random: np.random.Generator, mixed: np.ndarray, size: int, config: MixConfig
) -> tuple[np.ndarray, ...]:
    """weights [D,4], boundary [D,2] and shift [D,4,2] for D draws; where nothing is mixed, the first piece is the whole."""
    draws = len(mixed)
    beta = random.beta(config.ricap_alpha, config.ricap_alpha, (draws, 2))
    boundary = np.where(mixed[:, None], np.rint(beta * size), size).astype(np.int64)
    zero, (h, w) = np.zeros(draws, np.int64), boundary.T
    origin = np.stack([np.stack([zero, zero, h, h], 1), np.stack([zero, w, zero, w], 1)], axis=2)  # [D,4,2]
    extent = np.stack([np.stack([h, h, size - h, size - h], 1), np.stack([w, size - w, w, size - w], 1)], axis=2)
    start = np.floor(random.random((draws, 4, 2)) * (size - extent + 1)).astype(np.int64)
    return (extent.prod(axis=2) / size**2).astype(np.float32), boundary, start - origin
