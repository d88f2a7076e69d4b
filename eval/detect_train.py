"""Training of a detector, on a frozen trunk or with it, and what it finds in an image.

torchvision's detectors look at their tensors on the host in every step (which places have an object), so that a step waits for
the device; that is theirs, and the recipes' steps do not.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfsup.config import OptimizerConfig
from selfsup.data.workers import items
from selfsup.errors import UserError
from selfsup.optim import clip_gradients, create_optimizer, parameter_groups, set_hyperparameters
from selfsup.schedules import Plan, learning_rate

from .detect_data import Batches, fit
from .detect_settings import DetectSettings
from .progress import Progress
from .segment_crops import resized


def steps_of(settings: DetectSettings, images: int) -> int:
    """As given, else 24 epochs and at least 300 steps."""
    if settings.steps is not None:
        return settings.steps
    epochs = settings.epochs if settings.epochs is not None else 24
    least = 1 if settings.epochs is not None else 300
    return max(least, round(epochs * images / settings.batch))


def first_label(settings: DetectSettings) -> int:
    """The label of class 0: torchvision's Faster R-CNN has the background as 0."""
    return 1 if settings.detector == "fasterrcnn" else 0


def as_images(pixels: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """uint8 [h, w, C] each -> float32 [C, h, w] from 0 to 1 on the device."""
    return [x.to(device).permute(2, 0, 1).float() / 255 for x in pixels]


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Those that are trained. Only the trunk's names hold 'backbone.', which is what layer-wise decay goes by."""
    own = [(name.removeprefix("backbone."), p) for name, p in model.named_parameters() if p.requires_grad]
    assert all(("backbone." in name) == name.startswith("pyramid.") for name, _ in own)
    return own


def train_detector(
    model: nn.Module, batches: Batches, settings: DetectSettings, device: torch.device
) -> dict[str, Any]:
    """Train in place; returns what a result says of it. Raises UserError if the loss is not finite."""
    steps = steps_of(settings, len(batches.pictures))
    frozen = settings.trunk == "frozen"
    peak = settings.lr or (1e-3 if frozen else 1e-4)
    config = OptimizerConfig(
        lr=peak, min_lr=0.0, warmup=settings.warmup, weight_decay=settings.weight_decay, weight_decay_end=None
    )
    named = named_parameters(model)
    groups = parameter_groups(named, layer_decay=1.0 if frozen else settings.layer_decay)
    optimizer = create_optimizer(config, groups, peak)
    rate = learning_rate(config, peak, Plan(steps, len(batches.pictures), settings.batch))
    progress = Progress(steps, f"training detector={settings.detector}, steps")
    losses: list[float] = []
    shift = first_label(settings)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)  # dropout, and which proposals are sampled
        model.train()
        with closing(items(batches, 0, steps, workers=settings.workers)) as made:
            for step, batch in enumerate(made):
                images = as_images([pixels for pixels, _, _ in batch], device)
                targets = [{"boxes": b.to(device), "labels": k.to(device) + shift} for _, b, k in batch]
                parts = model(images, targets)
                loss = torch.stack(list(parts.values())).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                clip_gradients([p for _, p in named], settings.clip, "global")
                set_hyperparameters(optimizer, rate(step), settings.weight_decay)
                optimizer.step()
                if step % 10 == 0 or step == steps - 1:
                    losses.append(float(loss.detach()))
                    if not np.isfinite(losses[-1]):
                        said = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in parts.items())
                        raise UserError(
                            f"step {step}: the loss is {losses[-1]} ({said}); try a smaller lr (it is {peak:g})"
                        )
                progress.advance(1, f"loss {losses[-1]:.4f}")
    progress.close(f"loss {losses[-1]:.4f}")
    model.eval()
    last = {name: round(float(value.detach()), 5) for name, value in parts.items()}
    return {"steps": steps, "lr": peak, "final_loss": round(losses[-1], 5), "final_parts": last}


@torch.no_grad()
def detect(model: nn.Module, pixels: np.ndarray, short: int, long: int, settings: DetectSettings) -> dict[str, Tensor]:
    """boxes float32 [N, 4] in the image's own pixels, scores [N], labels int64 [N] from 0, on the CPU; best first.

    Images go through one by one.
    """
    device = next(model.parameters()).device
    height, width = pixels.shape[:2]
    high, wide = fit((height, width), short, long)
    found = model(as_images([torch.from_numpy(resized(pixels, (high, wide)).copy())], device))[0]
    boxes = found["boxes"].float().cpu() * torch.tensor([width / wide, height / high] * 2)
    order = torch.argsort(found["scores"].cpu(), descending=True, stable=True)
    return {
        "boxes": boxes[order],
        "scores": found["scores"].float().cpu()[order],
        "labels": found["labels"].cpu()[order] - first_label(settings),
    }
