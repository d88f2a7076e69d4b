"""Colour jitter, grey, blur, solarization, normalisation and erasing of a batch of crops on the training device.

Each operation gives what PIL gives, as torchvision's transforms and DINO's code call it, whole 8-bit levels included: values
stay integers in 0..255 (held as float32) until the normalisation. The parameters stay on the CPU; what the device has
to know is computed there and sent along, so that nothing waits for the device.

Order, as in DINO: jitter (four operations in the drawn order), grey, blur, solarization; then light, a shift of each
channel that is not cut to levels, normalisation, random erasing and Cutout. Operations on colour (saturation, hue, grey,
light) apply to three channels; the others to any number.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from selfsup.data.blur import blurred, box_taps, matrices
from selfsup.data.colour import luma, turn_hue
from selfsup.data.erasing import ZERO, erase
from selfsup.data.photometric_rows import few_at_a_time, shifts
from selfsup.data.rows import on_rows, send
from selfsup.data.views import COLUMN, CUTOUT, ERASE, LIGHT, ORDERS, P
from selfsup.errors import UserError

_FEW = 48 * 48 * 3
"""On a CPU images of so many values or more are not done as one batch: then what is done to one stays in the cache."""


@torch.no_grad()
def apply(
    crops: Tensor,
    params: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    frames: int = 1,
) -> Tensor:
    """uint8 crops [V,B,C,S,S] and their parameters [V,B,P] (on the CPU) -> normalised images [V,B,C,S,S] on `device`.

    mean, std: C numbers, of values in [0, 1]. The device is never waited for. frames: of clips [V,B,T*C,S,S], frame after
    frame: the parameters are those of every frame, and none sees another.
    """
    if frames > 1:
        apart = crops.unflatten(2, (frames, -1)).flatten(1, 2)  # [V,B*T,C,S,S]
        out = apply(apart, params.repeat_interleave(frames, dim=1), mean, std, device, dtype)
        return out.reshape(crops.shape)
    views, batch, channels, height, width = crops.shape
    if params.shape != (views, batch, P) or params.device.type != "cpu":
        raise ValueError(
            f"params must be [{views},{batch},{P}] on the CPU; seen {list(params.shape)} on {params.device}"
        )
    if len(mean) != channels or len(std) != channels:
        raise UserError(
            f"data.mean and data.std need {channels} values for {channels} channels; seen {len(mean)}, {len(std)}"
        )
    device = torch.device(device)
    p = params.reshape(views * batch, P).numpy()
    x = crops.to(device, non_blocking=True).flatten(0, 1)  # [N,C,S,S], N = V*B
    scale = np.array([1 / (255 * s) for s in std], dtype=np.float32)
    shift = np.array([-m / s for m, s in zip(mean, std, strict=True)], dtype=np.float32)
    if device.type == "cpu" and channels * height * width >= _FEW:
        x = few_at_a_time(x, p, scale, shift, dtype)
    else:
        x = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        x = together(x, p)
        affine = send(np.stack([scale, shift]), device)[:, :, None, None]  # [2,C,1,1]
        if channels == 3 and p[:, LIGHT].any():
            x = torch.addcmul(send(shifts(p, scale, shift), device)[:, :, None, None], x, affine[0])
        else:
            x = torch.addcmul(affine[1], x, affine[0])
        x = x.to(dtype)
    x = erase(x, p[:, ERASE], p[:, COLUMN["erase_fill"]])
    x = erase(x, p[:, CUTOUT], np.full(len(p), ZERO, np.float32))
    return x.view(views, batch, channels, height, width)


def together(x: Tensor, p: np.ndarray) -> Tensor:
    """Each operation on all images that have it: x [N,C,S,S] of levels, which is overwritten, and p [N,P] -> levels."""
    x = _jitter(x, p)
    if x.shape[1] == 3:
        x = on_rows(x, np.flatnonzero(p[:, COLUMN["gray"]] > 0), lambda rows: luma(rows).repeat(1, 3, 1, 1))
    x = _blur(x, p[:, COLUMN["sigma"]])
    return _solarize(x, p[:, COLUMN["solarize"]])


# ------------------------------------------------------------------------------------------------------------ jitter


def _jitter(x: Tensor, p: np.ndarray) -> Tensor:
    """Brightness, contrast, saturation and hue in each row's own order. x: [N,C,S,S], p: [N,P]."""
    channels = x.shape[1]
    number = p[:, COLUMN["order"]].astype(np.int64)
    orders = np.where(number[:, None] >= 0, np.array(ORDERS)[number], -1)  # [N,4]
    factors = p[:, COLUMN["brightness"] : COLUMN["hue"] + 1]  # [N,4]
    idle = np.array([1.0, 1.0, 1.0, 0.0], dtype=np.float32)
    for slot in range(4):
        op = orders[:, slot]
        factor = np.take_along_axis(factors, np.maximum(op, 0)[:, None], 1)[:, 0]
        live = (op >= 0) & (factor != idle[op])
        blend = live & (op <= (1 if channels != 3 else 2))
        if blend.any():
            x = _blend(x, np.where(blend, op, 0), np.where(blend, factor, np.float32(1)))
        if channels == 3:
            x = on_rows(x, np.flatnonzero(live & (op == 3)), turn_hue, factor)
    return x


def _blend(x: Tensor, op: np.ndarray, factor: np.ndarray) -> Tensor:
    """PIL's ImageEnhance: factor * x + (1 - factor) * (black, the mean grey level, or grey) by op 0, 1, 2; cut to levels."""
    rest = 1 - factor
    sent = send(np.stack([factor, rest * (op == 1), rest * (op == 2)])[:, :, None, None, None], x.device)  # [3,N,1,1,1]
    out = x * sent[0]
    if op.any():
        gray = luma(x) if x.shape[1] == 3 else x  # [N,1|C,S,S]
        if (op == 1).any():
            level = gray.mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_()
            out.addcmul_(level, sent[1])
        if (op == 2).any():
            out.addcmul_(gray, sent[2])
    return out.clamp_(0, 255).floor_()


# -------------------------------------------------------------------------------------------- blur and solarization


def _blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """PIL's GaussianBlur of each row with its own sigma [N] (0: none): two batched products with banded matrices."""
    if not sigma.any():
        return x
    rows = np.flatnonzero(sigma > 0)
    matrix = matrices(send(box_taps(sigma[rows]), x.device), x.shape[-1])[:, None]  # [M,1,S,S]
    if rows.size == len(x):
        return blurred(x, matrix)
    index = send(rows, x.device)
    return x.index_copy_(0, index, blurred(x.index_select(0, index), matrix))


def _solarize(x: Tensor, threshold: np.ndarray) -> Tensor:
    rows = np.flatnonzero(threshold >= 0)
    return on_rows(x, rows, lambda selected, limit: torch.where(selected >= limit, 255 - selected, selected), threshold)
