"""Batch norm over all processes, on any device.

torch's SyncBatchNorm raises on a CPU; this one sums through whatever process group there is, so that a run on two
processes computes what one process computes. At world size 1, and in eval mode, the layers stay torch's own.
"""

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from selfsup import dist


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Mixed into an existing batch norm by `synchronise`; parameters, buffers and their names stay as they are."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"batch norm needs [N, C, ...], seen {tuple(x.shape)}")

    def _normalise(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> same, with mean and variance over N and space of every rank (equal N on all)."""
        if not self.training or dist.world() == 1:
            return nn.modules.batchnorm._BatchNorm.forward(self, x)
        work = x if x.dtype == torch.float64 else x.float()
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.numel() // x.shape[1] * dist.world()
        mean = all_reduce(work.sum(dims), td.ReduceOp.SUM) / count  # [C]
        centred = work - mean.reshape(shape)
        var = all_reduce(centred.square().sum(dims), td.ReduceOp.SUM) / count  # [C]
        out = centred * torch.rsqrt(var + self.eps).reshape(shape)
        if self.affine:
            out = out * self.weight.reshape(shape) + self.bias.reshape(shape)
        if self.track_running_stats:
            self._track(mean.detach(), var.detach() * (count / max(1, count - 1)))
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # a cumulative average
            weight: float | Tensor = 1.0 / self.num_batches_tracked.to(mean.dtype)
        else:
            weight = self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), weight)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; then what timm's fused layers (BatchNormAct2d) add: drop and activation."""
        out = self._normalise(x)
        for extra in ("drop", "act"):
            if isinstance(layer := getattr(self, extra, None), nn.Module):
                out = layer(out)
        return out


def synchronise(module: nn.Module) -> int:
    """Make every batch norm inside `module` use the statistics of all ranks; returns how many there are.

    The class of each layer is changed to a subclass of both, so that `isinstance` and state dicts keep working.
    """
    found = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in found:
        if not isinstance(layer, SyncedBatchNorm):
            kind = type(layer)
            layer.__class__ = type(
                f"Synced{kind.__name__}", (SyncedBatchNorm, kind), {"forward": SyncedBatchNorm.forward}
            )
    return len(found)
