"""Training of a segmentation head, on a frozen trunk or with it; stopped, it is gone on with as if nothing had been."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsup.data.workers import items
from selfsup.errors import EarlyStop, UserError
from selfsup.losses.segmentation import focal, pixel_cross_entropy, soft_dice
from selfsup.randomness import generator
from selfsup.signals import StopSignals

from .descent import Descent, steps_of
from .progress import Progress
from .segment_crops import Crops
from .segment_heads import Trunk
from .segment_settings import SegmentLoss, SegmentSettings
from .segment_state import TrainingState

EPOCHS = 40
"""Of a training whose length is not given; at least 300 steps."""

_CACHE_BYTES = 2 << 30
_DROPOUT = 0xD20905


class Segmenter(nn.Module):
    """A trunk and a head: normalised images [B, C, H, W] -> logits [B, K, h, w] of the head's own size."""

    def __init__(self, trunk: Trunk, head: nn.Module, frozen: bool) -> None:
        super().__init__()
        self.trunk, self.head, self.frozen = trunk, head, frozen
        self.trunk.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> "Segmenter":
        """A frozen trunk stays in eval mode: its batch statistics do not move."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the head reads."""
        with torch.no_grad() if self.frozen else contextlib.nullcontext():
            return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(images), images)


def segmentation_loss(logits: Tensor, masks: Tensor, loss: SegmentLoss, weights: Tensor | None) -> Tensor:
    """The weighted sum that `loss` says. logits [B, K, h, w] are interpolated to the masks int64 [B, H, W]."""
    logits = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
    total = logits.new_zeros(())
    if loss.ce:
        total = total + loss.ce * pixel_cross_entropy(logits, masks, weights)
    if loss.focal:
        total = total + loss.focal * focal(logits, masks, loss.gamma, weights)
    if loss.dice:
        total = total + loss.dice * soft_dice(logits, masks, weights)
    return total


def class_weights(settings: SegmentSettings, pixels: np.ndarray) -> Tensor | None:
    """float32 [K], or None. pixels: of each class in the training masks."""
    given = settings.class_weights
    if given == "none":
        return None
    if given == "balanced":
        share = pixels / pixels.sum()
        there = share[share > 0]
        return torch.tensor(np.where(share > 0, np.median(there) / np.maximum(share, 1e-12), 0.0), dtype=torch.float32)
    assert not isinstance(given, str)
    if len(given) != len(pixels):
        raise UserError(f"class_weights: {len(given)} for {len(pixels)} classes; give one a class, or 'balanced'")
    if not any(given):
        raise UserError("class_weights: all are 0")
    return torch.tensor(given, dtype=torch.float32)


class Normalise:
    """uint8 [B, H, W, C] -> float32 [B, C, H, W] on the device, as the backbone takes it."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
        self.device = device

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.device).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


def train_head(
    model: Segmenter, crops: Crops, settings: SegmentSettings, weights: Tensor | None, normalise: Normalise, state: TrainingState
) -> dict[str, Any]:  # fmt: skip
    """Train in place; returns what a result says of it.

    Raises UserError if the loss is not finite, EarlyStop after a signal to stop, when `state` is saved. What is drawn is a
    function of (seed, step), so a training that was stopped ends with the same weights as one that was not.
    """
    device = normalise.device
    count = len(crops.pairs)
    steps = steps_of(settings, count, EPOCHS)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    descend = Descent(named, settings, frozen=model.frozen, steps=steps, images=count)
    weights = None if weights is None else weights.to(device)
    first, said = state.load(model, descend.optimizer)
    cache = _cached(model, crops, settings, normalise) if model.frozen and not settings.augment else None
    source = (
        _from_cache(crops, cache, first, steps, normalise)
        if cache
        else _from_files(crops, settings, first, steps, normalise)
    )
    amp = torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16")
    progress = Progress(steps - first, f"training head={settings.head}, steps")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), StopSignals() as signals:
        model.train()
        for step, (images, maps, masks) in enumerate(source, start=first):
            torch.manual_seed(int(generator(_DROPOUT, settings.seed, step).integers(2**62)))
            with amp:
                logits = model(images) if maps is None else model.head(maps, images)
            loss = segmentation_loss(logits, masks, settings.loss, weights)
            descend(loss, step)
            said = said if (value := descend.looked_at(loss, step)) is None else value
            progress.advance(1, f"loss {said:.4f}")
            stop = signals.agreed() and step + 1 < steps
            if stop or state.due(step + 1):
                state.save(model, descend.optimizer, step + 1, said)
            if stop:
                kept = f"the same command goes on from {state.path}" if state.path else "nothing is kept without --out"
                raise EarlyStop(f"stopped at step {step + 1} of {steps}; {kept}")
    progress.close(f"loss {said:.4f}")
    model.eval()
    return {"steps": steps, "lr": descend.peak, "final_loss": round(said, 5), "cached_features": cache is not None}


Batch = tuple[Tensor, list[Tensor] | None, Tensor]


def _from_files(
    crops: Crops, settings: SegmentSettings, first: int, steps: int, normalise: Normalise
) -> Iterator[Batch]:
    with closing(items(crops, first, steps, workers=settings.workers)) as made:
        for pixels, masks in made:
            yield normalise(pixels), None, masks.to(normalise.device).long()


@torch.no_grad()
def _cached(
    model: Segmenter, crops: Crops, settings: SegmentSettings, normalise: Normalise
) -> list[tuple[Tensor, list[Tensor], Tensor]] | None:
    """(pixels, maps, mask) of every image, since without augmentation each step sees the same; None if that is too much."""
    out: list[tuple[Tensor, list[Tensor], Tensor]] = []
    progress = Progress(len(crops.pairs), "features of training images")
    model.eval()
    for first in range(0, len(crops.pairs), settings.batch):
        rows = range(first, min(first + settings.batch, len(crops.pairs)))
        made = [crops.one(0, i) for i in rows]
        pixels = torch.from_numpy(np.stack([m[0] for m in made]))
        maps = [m.cpu() for m in model.maps(normalise(pixels))]
        size = sum(m[0].numel() * m.element_size() for m in maps)
        if size * len(crops.pairs) > _CACHE_BYTES:
            return None
        out += [(pixels[k], [m[k].clone() for m in maps], torch.from_numpy(made[k][1])) for k in range(len(made))]
        progress.advance(len(made))
    progress.close()
    return out


def _from_cache(
    crops: Crops, cache: list[tuple[Tensor, list[Tensor], Tensor]], first: int, steps: int, normalise: Normalise
) -> Iterator[Batch]:
    for step in range(first, steps):
        rows = [cache[i] for i in crops.numbers(step)]
        maps = [torch.stack(level).to(normalise.device) for level in zip(*(row[1] for row in rows))]
        masks = torch.stack([row[2] for row in rows]).to(normalise.device).long()
        yield normalise(torch.stack([row[0] for row in rows])), maps, masks
