"""Style transfer by the statistics of features, through any backbone that can be loaded.

The pixels of an image are changed until its features have the style image's mean and standard deviation in every channel of
some layers, while those of the last one stay where they were: the losses of Huang & Belongie, 2017, equations 12 and 13,
minimised over pixels as Gatys et al., 2016, "Image Style Transfer Using Convolutional Neural Networks", do, and not by a trained
decoder, since there is none for a backbone of one's own. That takes a backward pass a step, so it is for writing data sets.

Each image's loss is its own, so that the others of a batch do not matter, up to rounding. What the style of a backbone is
depends on what it has learned: one whose early layers see colour and texture gives the most.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from selfsup.backbones import load_backbone
from selfsup.backbones.backbone import Backbone
from selfsup.errors import UserError

_RATE = 0.02
_SMOOTH = 2.0  # weight of the total variation, which keeps single pixels from standing out
_EPS = 1e-5


class Transfer:
    """contents, styles [M,C,H,W] in [0, 1] -> contents in the style of their styles."""

    def __init__(
        self, target: str, channels: int, steps: int, weight: float, layers: Sequence[int] | None, device: torch.device
    ) -> None:
        backbone = load_backbone(target)
        if backbone.in_chans != channels and channels != 1:
            raise UserError(
                f"transfer={target} takes {backbone.in_chans} channels and the images have {channels}; "
                f"use channels={backbone.in_chans} or another backbone"
            )
        depth = len(getattr(backbone.model, "feature_info", None) or [])
        self.layers = list(layers) if layers is not None else spread(depth)
        self.backbone: Backbone = backbone.to(device).requires_grad_(False)
        self.steps, self.weight, self.device = steps, weight, device
        shape = [-1, 1, 1]
        self._mean, self._std = (torch.tensor(v, device=device).view(shape) for v in (backbone.mean, backbone.std))
        try:
            self.features(torch.zeros(1, channels, *backbone.image_size, device=device))
        except UserError as error:  # layers that there are not
            text = str(error)
            raise UserError(
                f"transfer_{text}" if text.startswith("layers=") else f"transfer={target}: {text}"
            ) from None

    def features(self, x: Tensor) -> list[Tensor]:
        """[M,C,H,W] in [0, 1] -> maps [M,D,h,w] of the layers; images are fitted to sizes that the backbone takes."""
        height, width = x.shape[-2:]
        stride = self.backbone.stride
        size = max(stride, round(height / stride) * stride), max(stride, round(width / stride) * stride)
        size = self.backbone.image_size if self.backbone.fixed_size else size
        if size != (height, width):
            x = interpolate(x, size=size, mode="bilinear", align_corners=False)
        if x.shape[1] != self.backbone.in_chans:
            x = x.expand(-1, self.backbone.in_chans, -1, -1)
        return self.backbone.feature_maps((x - self._mean) / self._std, layers=self.layers, norm=False)

    def __call__(self, contents: Tensor, styles: Tensor, look: Callable[[], None] = lambda: None) -> Tensor:
        """`look` is called before every step, and may raise."""
        contents, styles = contents.to(self.device), styles.to(self.device)
        with torch.no_grad():
            kept = self.features(contents)[-1]
            wanted = [statistics(f) for f in self.features(styles)]
        x = contents.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([x], lr=_RATE)
        with torch.enable_grad():
            for _ in range(self.steps):
                look()
                loss = self.loss(x, kept, wanted)
                (x.grad,) = torch.autograd.grad(loss, x)
                optimizer.step()
                with torch.no_grad():
                    x.clamp_(0, 1)
        return x.detach().cpu()

    def loss(self, x: Tensor, kept: Tensor, wanted: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The sum over images; both parts relative to how far the features spread, so that layers and backbones compare."""
        found = self.features(x)
        content = ((found[-1] - kept) ** 2).mean((1, 2, 3)) / (kept.var((1, 2, 3)) + _EPS)
        style = torch.zeros_like(content)
        for maps, (mean, std) in zip(found, wanted, strict=True):
            m, s = statistics(maps)
            scale = (std**2).mean(1) + mean.var(1) + _EPS
            style = style + (((m - mean) ** 2).mean(1) + ((s - std) ** 2).mean(1)) / scale / len(wanted)
        rough = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)) + (x[..., 1:, :] - x[..., :-1, :]).abs().mean(
            (1, 2, 3)
        )
        return (content + self.weight * style + _SMOOTH * rough).sum()


def statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """[M,D,h,w] -> mean and standard deviation of each channel [M,D]."""
    mean = maps.mean((2, 3))
    return mean, ((maps - mean[:, :, None, None]) ** 2).mean((2, 3)).add(_EPS).sqrt()


def spread(depth: int, most: int = 4) -> list[int]:
    """At most four of `depth` layers, the last among them."""
    count = min(depth, most)
    return [round((k + 1) * depth / count) - 1 for k in range(count)]
