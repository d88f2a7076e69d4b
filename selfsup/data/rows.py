"""Some rows of a batch on the training device, without waiting for it."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """A small array of the host on `device`."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def on_rows(x: Tensor, rows: np.ndarray, function: Callable[..., Tensor], *arguments: np.ndarray) -> Tensor:
    """`function` of the selected rows of x [N,...] and of the same rows of each argument [N]; the others stay."""
    if rows.size == 0:
        return x
    sent = [send(a[rows].reshape(-1, *[1] * (x.dim() - 1)), x.device) for a in arguments]
    if rows.size == len(x):
        return function(x, *sent)
    index = send(rows, x.device)
    return x.index_copy_(0, index, function(x.index_select(0, index), *sent))
