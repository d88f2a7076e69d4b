"""A U-Net decoder, a loss and a metric of segmentation-models-pytorch on our backbone, fine-tuned together.

python examples/smp_decoder.py RUN DATA [STEPS]    DATA as for segmentation.py
"""

import sys
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from segmentation import read
from segmentation_models_pytorch.base import SegmentationHead
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import nn

import selfsup

SCALES = (1, 2, 4, 8)
"""Strides of the maps that the decoder is given."""


class Segmenter(nn.Module):
    """images [B, C, H, W] -> logits [B, K, H, W]."""

    def __init__(self, model, classes: int) -> None:
        super().__init__()
        layers = len(model.model.feature_info)
        self.layers = (
            [-1] * len(SCALES)
            if layers < len(SCALES)
            else [layers * (i + 1) // len(SCALES) - 1 for i in range(len(SCALES))]
        )
        self.backbone = model
        with torch.no_grad():
            maps = model.feature_maps(
                torch.zeros(1, model.in_chans, *model.image_size), layers=sorted(set(self.layers))
            )
        sizes = {layer: m.shape[1] for layer, m in zip(sorted(set(self.layers)), maps)}
        self.narrow = nn.ModuleList(nn.Conv2d(sizes[layer], 32 * scale, 1) for layer, scale in zip(self.layers, SCALES))
        self.decoder = UnetDecoder([model.in_chans, *(32 * s for s in SCALES)], (128, 64, 32, 16), n_blocks=4)
        self.head = SegmentationHead(16, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        order = sorted(set(self.layers))
        maps = dict(zip(order, self.backbone.feature_maps(images, layers=order)))
        features = [images]
        for layer, scale, narrow in zip(self.layers, SCALES, self.narrow):  # to strides 1, 2, 4, 8
            size = [max(1, side // scale) for side in images.shape[-2:]]
            features.append(F.interpolate(narrow(maps[layer]), size=size, mode="bilinear"))
        return self.head(self.decoder(features))


def main(run: str, data: str, steps: str = "60") -> None:
    torch.manual_seed(0)
    model = selfsup.load_backbone(run)
    images, masks = read(Path(data), model)
    classes, held = int(masks[masks != 255].max()) + 1, len(images) // 4
    net = Segmenter(model, classes).train()
    rates = [{"params": net.backbone.parameters(), "lr": 1e-5}]  # what is trained already moves little
    rates.append({"params": [p for name, p in net.named_parameters() if not name.startswith("backbone.")], "lr": 1e-3})
    optimizer = torch.optim.AdamW(rates)
    dice = smp.losses.DiceLoss("multiclass", ignore_index=255)
    for _ in range(int(steps)):
        rows = torch.randperm(len(images) - held)[:8]
        logits = net(images[rows])
        optimizer.zero_grad()
        (dice(logits, masks[rows]) + F.cross_entropy(logits, masks[rows], ignore_index=255)).backward()
        optimizer.step()
    with torch.no_grad():
        predicted = net.eval()(images[-held:]).argmax(1)
    counts = smp.metrics.get_stats(predicted, masks[-held:], mode="multiclass", num_classes=classes, ignore_index=255)
    print(f"mIoU {float(smp.metrics.iou_score(*(c.sum(0) for c in counts), reduction='macro')):.4f} on {held} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
