"""What does not move pixels: jitter, grey, blur, solarization, light, noise, salt and pepper, for whole images of any shape."""

import numpy as np
import torch
from PIL import Image, ImageFilter

from selfsup.data import noise, photometric
from selfsup.data.threads import one_thread
from selfsup.data.views import COLUMN, LIGHT, NOISE

_LARGE = 512
"""Pixels of the longer side from which on PIL blurs, which `photometric` equals: its products grow with the side."""


@torch.no_grad()
@one_thread()
def coloured(image: np.ndarray, row: np.ndarray) -> np.ndarray:
    """uint8 [H,W,C] with the parameters [P] of its copy, in the order of `photometric`; whole levels."""
    p = row[None].copy()
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].to(torch.float32).contiguous()  # [1,C,H,W]
    sigma, channels = float(row[COLUMN["sigma"]]), image.shape[2]
    if sigma and max(image.shape[:2]) > _LARGE:
        before, after = p.copy(), p.copy()
        before[:, COLUMN["sigma"]], before[:, COLUMN["solarize"]] = 0, -1
        after[:, COLUMN["order"]], after[:, COLUMN["gray"]], after[:, COLUMN["sigma"]] = -1, 0, 0
        x = photometric.together(_blurred(photometric.together(x, before), sigma), after)
    else:
        x = photometric.together(x, p)
    if channels == 3:
        x = x + torch.from_numpy(p[0, LIGHT])[:, None, None]
    x = noise.add(x, p[:, NOISE], np.ones(channels, np.float32), np.zeros(channels, np.float32))
    return np.ascontiguousarray(x[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


def _blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """[1,C,H,W] of whole levels, a channel at a time."""
    planes = [Image.fromarray(plane.to(torch.uint8).numpy()).filter(ImageFilter.GaussianBlur(sigma)) for plane in x[0]]
    return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))[None].to(torch.float32)
