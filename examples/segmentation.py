"""Semantic segmentation in plain torch: a frozen backbone and one linear layer.

python examples/segmentation.py RUN DATA [STEPS]    DATA/images/NAME.*, DATA/masks/NAME.png (class ids, 255 is ignored)
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import selfsup


def read(data: Path, model) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, C, H, W], normalised, and masks [N, H, W], at the size that the backbone was trained with."""
    (h, w), colours = model.image_size, "L" if model.in_chans == 1 else "RGB"
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (model.mean, model.std))
    images, masks = [], []
    for path in sorted((data / "images").iterdir()):
        pixels = np.array(Image.open(path).convert(colours).resize((w, h)), dtype=np.float32).reshape(h, w, -1)
        images.append((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)
        mask = Image.open(data / "masks" / f"{path.stem}.png").resize((w, h), Image.Resampling.NEAREST)
        masks.append(torch.from_numpy(np.array(mask, dtype=np.int64)))
    return torch.stack(images), torch.stack(masks)


def iou(predicted: torch.Tensor, masks: torch.Tensor, classes: int) -> float:
    """Mean over classes of intersection over union."""
    known, found = masks != 255, []
    for c in range(classes):
        a, b = (predicted == c) & known, masks == c
        found.append(float((a & b).sum() / (a | b).sum().clamp_min(1)))
    return sum(found) / classes


def main(run: str, data: str, steps: str = "300") -> None:
    torch.manual_seed(0)
    model = selfsup.load_backbone(run)
    images, masks = read(Path(data), model)
    with torch.no_grad():  # frozen: features are computed once
        maps = torch.cat([model.feature_maps(part, layers=[-1])[0] for part in images.split(32)])  # [N, D, h, w]
    classes, held = int(masks[masks != 255].max()) + 1, len(maps) // 4  # the last quarter is not trained on
    head = torch.nn.Sequential(torch.nn.BatchNorm2d(maps.shape[1]), torch.nn.Conv2d(maps.shape[1], classes, 1))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(int(steps)):
        rows = torch.randperm(len(maps) - held)[:16]
        logits = F.interpolate(head(maps[rows]), size=masks.shape[1:], mode="bilinear")  # [16, K, H, W]
        optimizer.zero_grad()
        F.cross_entropy(logits, masks[rows], ignore_index=255).backward()
        optimizer.step()
    with torch.no_grad():
        logits = F.interpolate(head.eval()(maps[-held:]), size=masks.shape[1:], mode="bilinear")
    print(f"mIoU {iou(logits.argmax(1), masks[-held:], classes):.4f} on {held} images, {classes} classes")


if __name__ == "__main__":
    main(*sys.argv[1:])
