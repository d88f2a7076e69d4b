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

from selfsup.data.workers import items

from .descent import Descent, steps_of
from .detect_data import Batches, fit
from .detect_settings import DetectSettings
from .progress import Progress
from .segment_crops import resized

EPOCHS = 24
"""Of a training whose length is not given; at least 300 steps."""


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
    pictures = len(batches.pictures)
    steps = steps_of(settings, pictures, EPOCHS)
    frozen = settings.trunk == "frozen"
    descend = Descent(named_parameters(model), settings, frozen=frozen, steps=steps, images=pictures)
    progress = Progress(steps, f"training detector={settings.detector}, steps")
    said = 0.0
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
                descend(loss, step)
                if (value := descend.looked_at(loss, step, parts)) is not None:
                    said = value
                progress.advance(1, f"loss {said:.4f}")
    progress.close(f"loss {said:.4f}")
    model.eval()
    last = {name: round(float(value.detach()), 5) for name, value in parts.items()}
    return {"steps": steps, "lr": descend.peak, "final_loss": round(said, 5), "final_parts": last}


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
