"""Colour jitter, grey, blur, solarization and normalisation of a batch of crops on the training device.

Each operation gives what PIL gives, as torchvision's transforms and DINO's code call it, whole 8-bit levels included: values
stay integers in 0..255 (held as float32) until the normalisation. The parameters stay on the CPU; what the device has
to know is computed there and sent along, so that nothing waits for the device.

Order, as in DINO: jitter (four operations in the drawn order), grey, blur, solarization. Operations on colour
(saturation, hue, grey) apply to three channels; the others to any number.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from selfsup.data.views import ORDERS, P, ViewParams
from selfsup.errors import UserError

_COLUMN = {name: i for i, name in enumerate(ViewParams._fields)}
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as PIL's "L"
_PASSES = 3  # of the box filter, as PIL's GaussianBlur


@torch.no_grad()
def apply(
    crops: Tensor,
    params: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 crops [V,B,C,S,S] and their parameters [V,B,P] (on the CPU) -> normalised images [V,B,C,S,S] on `device`.

    mean, std: C numbers, of values in [0, 1]. The device is never waited for.
    """
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
    x = x.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    x = _jitter(x, p)
    if channels == 3:
        x = _on_rows(x, np.flatnonzero(p[:, _COLUMN["gray"]] > 0), lambda rows: _luma(rows).repeat(1, 3, 1, 1))
    x = _blur(x, p[:, _COLUMN["sigma"]])
    x = _solarize(x, p[:, _COLUMN["solarize"]])
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    affine = _send(np.array([scale, shift], dtype=np.float32), device)[:, :, None, None]  # [2,C,1,1]
    x = torch.addcmul(affine[1], x, affine[0])
    return x.to(dtype).view(views, batch, channels, height, width)


def _send(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _on_rows(x: Tensor, rows: np.ndarray, function: Callable[..., Tensor], *arguments: np.ndarray) -> Tensor:
    """`function` of the selected rows of x [N,...] and of the same rows of each argument [N]; the others stay."""
    if rows.size == 0:
        return x
    sent = [_send(a[rows].reshape(-1, *[1] * (x.dim() - 1)), x.device) for a in arguments]
    if rows.size == len(x):
        return function(x, *sent)
    index = _send(rows, x.device)
    return x.index_copy_(0, index, function(x.index_select(0, index), *sent))


# ------------------------------------------------------------------------------------------------------------ jitter


def _jitter(x: Tensor, p: np.ndarray) -> Tensor:
    """Brightness, contrast, saturation and hue in each row's own order. x: [N,C,S,S], p: [N,P]."""
    channels = x.shape[1]
    number = p[:, _COLUMN["order"]].astype(np.int64)
    orders = np.where(number[:, None] >= 0, np.array(ORDERS)[number], -1)  # [N,4]
    factors = p[:, _COLUMN["brightness"] : _COLUMN["hue"] + 1]  # [N,4]
    idle = np.array([1.0, 1.0, 1.0, 0.0], dtype=np.float32)
    for slot in range(4):
        op = orders[:, slot]
        factor = np.take_along_axis(factors, np.maximum(op, 0)[:, None], 1)[:, 0]
        live = (op >= 0) & (factor != idle[op])
        blend = live & (op <= (1 if channels != 3 else 2))
        if blend.any():
            x = _blend(x, np.where(blend, op, 0), np.where(blend, factor, np.float32(1)))
        if channels == 3:
            x = _on_rows(x, np.flatnonzero(live & (op == 3)), _hue, factor)
    return x


def _blend(x: Tensor, op: np.ndarray, factor: np.ndarray) -> Tensor:
    """PIL's ImageEnhance: factor * x + (1 - factor) * (black, the mean grey level, or grey) by op 0, 1, 2; cut to levels."""
    rest = 1 - factor
    sent = _send(
        np.stack([factor, rest * (op == 1), rest * (op == 2)])[:, :, None, None, None], x.device
    )  # [3,N,1,1,1]
    out = x * sent[0]
    if op.any():
        gray = _luma(x) if x.shape[1] == 3 else x  # [N,1|C,S,S]
        if (op == 1).any():
            level = gray.mean(dim=(1, 2, 3), keepdim=True).add_(0.5).floor_()
            out.addcmul_(level, sent[1])
        if (op == 2).any():
            out.addcmul_(gray, sent[2])
    return out.clamp_(0, 255).floor_()


def _luma(x: Tensor) -> Tensor:
    """[N,3,S,S] -> [N,1,S,S], whole levels."""
    red, green, blue = _LUMA
    return (x[:, 0:1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:3], alpha=blue).add_(0.5).floor_()


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of [N,3,S,S] by `turn` [N,1,1,1], through HSV in 256 levels as torchvision does with PIL images."""
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    span = value - low
    safe = span.clamp(min=1)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )  # in sixths of a turn, -1..5
    part = sector.div_(6)
    hue = part.add_(part < 0).mul_(255).floor_().add_(torch.trunc(turn * 255))  # -127..382, then modulo 256
    hue.sub_(torch.floor(hue / 256), alpha=256)
    saturation = torch.floor(255 * span / value.clamp(min=1)) / 255
    corner = torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)  # red, green, blue
    k = corner + hue.mul_(6 / 255)  # [N,3,S,S], 1..11, then modulo 6
    k.add_(k >= 6, alpha=-6)
    ramp = torch.minimum(k, 4 - k).clamp_(0, 1)
    return ramp.mul_(value * saturation).neg_().add_(value).round_()


# -------------------------------------------------------------------------------------------- blur and solarization


def _blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """PIL's GaussianBlur of each row with its own sigma [N] (0: none): two batched products with banded matrices."""
    if not sigma.any():
        return x
    rows = np.flatnonzero(sigma > 0)
    taps = _box_taps(sigma[rows])  # [M,2R+1]
    size = x.shape[-1]
    box = _send(taps, x.device) @ _shifts(taps.shape[1] // 2, size, x.device)  # [M,S*S]
    box = box.view(-1, size, size)
    matrix = (box @ box @ box)[:, None]  # [M,1,S,S]: three passes, the edge pixel repeated in each
    if rows.size == len(x):
        return _separable(x, matrix)
    index = _send(rows, x.device)
    return x.index_copy_(0, index, _separable(x.index_select(0, index), matrix))


def _separable(x: Tensor, matrix: Tensor) -> Tensor:
    """The same matrix along both axes of [M,C,S,S], to whole levels."""
    return (matrix @ x @ matrix.transpose(-1, -2)).round_()


def _box_taps(sigma: np.ndarray) -> np.ndarray:
    """One pass of the extended box filter whose threefold use approximates a Gaussian: float32 [M,2R+1].

    Gwosdek et al., 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", section 3.
    """
    variance = sigma.astype(np.float64) ** 2 / _PASSES  # of one pass
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # full taps on either side
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))  # of the next
    reach = int(whole.max()) + 1
    distance = np.abs(np.arange(-reach, reach + 1))
    taps = np.where(distance <= whole[:, None], 1.0, np.where(distance == whole[:, None] + 1, part[:, None], 0.0))
    return (taps / taps.sum(1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=32)
def _shifts(reach: int, size: int, device: torch.device) -> Tensor:
    """float32 [2R+1, S*S]: row d moves a line by d - R pixels and repeats its ends."""
    line = torch.arange(size, device=device)
    source = (line + torch.arange(-reach, reach + 1, device=device)[:, None]).clamp_(0, size - 1)  # [2R+1,S]
    return (source[:, :, None] == line).to(torch.float32).flatten(1)


def _solarize(x: Tensor, threshold: np.ndarray) -> Tensor:
    rows = np.flatnonzero(threshold >= 0)
    return _on_rows(
        x, rows, lambda selected, limit: torch.where(selected >= limit, 255 - selected, selected), threshold
    )
