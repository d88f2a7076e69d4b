"""Detection with torchvision: Faster R-CNN on a feature pyramid that is made of one map of a frozen backbone.

python examples/detection.py RUN DATA [STEPS]    DATA as for segmentation.py; the box of an image is that of its mask
"""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from segmentation import read
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou, masks_to_boxes

import selfsup

WIDTH = 64


class Pyramid(nn.Module):
    """Maps of 4, 2, 1 and 1/2 times the resolution of the backbone's last one (Li et al., 2022, "ViTDet", section 3)."""

    out_channels = WIDTH

    def __init__(self, model) -> None:
        super().__init__()
        d = model.feature_maps(torch.zeros(1, model.in_chans, *model.image_size), layers=[-1])[0].shape[1]
        self.model = model.requires_grad_(False)
        twice = [
            nn.ConvTranspose2d(d, d // 2, 2, 2),
            nn.GroupNorm(1, d // 2),
            nn.GELU(),
            nn.ConvTranspose2d(d // 2, d // 4, 2, 2),
        ]
        ups = [nn.Sequential(*twice), nn.ConvTranspose2d(d, d // 2, 2, 2), nn.Identity(), nn.MaxPool2d(2)]
        sizes = (d // 4, d // 2, d, d)
        self.levels = nn.ModuleList(
            nn.Sequential(up, nn.Conv2d(size, WIDTH, 1), nn.GroupNorm(1, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
            for up, size in zip(ups, sizes)
        )

    def train(self, mode: bool = True) -> "Pyramid":
        super().train(mode)
        self.model.eval()  # its statistics and its dropout are left alone
        return self

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        with torch.no_grad():
            last = self.model.feature_maps(images, layers=[-1])[0]  # [B, D, h, w]
        return OrderedDict((str(i), level(last)) for i, level in enumerate(self.levels))


def detector(model, classes: int) -> FasterRCNN:
    """classes: with the background. Images come normalised and at the backbone's size, and stay so."""
    size = model.image_size
    anchors = AnchorGenerator(tuple((max(size) * share,) for share in (0.1, 0.25, 0.5, 0.9)), ((0.5, 1.0, 2.0),) * 4)
    return FasterRCNN(
        Pyramid(model), classes, rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=7, sampling_ratio=2),
        rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=100, box_batch_size_per_image=32,  # one object, small images
        image_mean=[0.0] * model.in_chans, image_std=[1.0] * model.in_chans, fixed_size=size[::-1], size_divisible=model.stride,
    )  # fmt: skip


def main(run: str, data: str, steps: str = "60") -> None:
    torch.manual_seed(0)
    model = selfsup.load_backbone(run)
    images, masks = read(Path(data), model)
    boxes = masks_to_boxes((masks > 0) & (masks != 255))  # [N, 4]: x0, y0, x1, y1
    boxes[:, 2:] += 1
    labels = torch.stack([mask[(mask > 0) & (mask != 255)].mode().values for mask in masks])
    net, held = detector(model, int(labels.max()) + 1), len(images) // 4
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-4)
    for _ in range(int(steps)):
        rows = torch.randperm(len(images) - held)[:8].tolist()
        targets = [{"boxes": boxes[i : i + 1], "labels": labels[i : i + 1]} for i in rows]
        losses = net(list(images[rows]), targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    with torch.no_grad():
        found = net.eval()(list(images[-held:]))
    best = [
        float(box_iou(f["boxes"][:1], b[None]).sum()) for f, b in zip(found, boxes[-held:])
    ]  # 0 where nothing is found
    print(f"IoU of the best box {sum(best) / held:.4f} on {held} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
