"""Projection heads."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """A linear layer without bias whose weight is g * v / |v| row by row (weight normalisation, Salimans & Kingma, 2016).

    With `normalised` the scale g stays 1 and is not trained, so that each row is a prototype on the unit sphere.
    Parameter names are those of DINO's published checkpoints.
    """

    def __init__(self, in_dim: int, out_dim: int, normalised: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not normalised)
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # nn.Linear's own, as in the published code

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """x [..., in_dim] -> [..., out_dim]. frozen: no gradient for the prototypes (there is one for x)."""
        v, g = self.parts(frozen)
        return (
            F.linear(x, v) * (g / v.norm(dim=1, keepdim=True)).t()
        )  # columns scaled: v is much larger than the output

    def parts(self, frozen: bool = False) -> tuple[Tensor, Tensor]:
        """(v [out_dim, in_dim], g [out_dim, 1]); the weight is g v / |v|, row by row."""
        return (self.weight_v.detach(), self.weight_g.detach()) if frozen else (self.weight_v, self.weight_g)


def mlp(dims: Sequence[int], batch_norm: bool) -> nn.Sequential:
    """Linear layers from dims[0] to dims[-1] with GELU between them, and batch norm before it if asked for."""
    modules: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(dims), start=2):
        linear = nn.Linear(a, b)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        modules.append(linear)
        if i < len(dims):
            if batch_norm:
                modules.append(nn.BatchNorm1d(b))
            modules.append(nn.GELU())
    return nn.Sequential(*modules)


class DINOHead(nn.Module):
    """MLP with GELU, a bottleneck that is l2-normalised, and prototypes (Caron et al., 2021, section 3.2 and appendix C)."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.mlp = mlp([in_dim] + [hidden_dim] * (layers - 1) + [bottleneck_dim], batch_norm)
        self.last_layer = Prototypes(bottleneck_dim, out_dim, normalised=norm_last_layer)

    def forward(self, x: Tensor, frozen_prototypes: bool = False) -> Tensor:
        """x [N, in_dim] -> logits [N, out_dim]."""
        return self.last_layer(self.bottleneck(x), frozen=frozen_prototypes)

    def bottleneck(self, x: Tensor) -> Tensor:
        """x [N, in_dim] -> what is compared with the prototypes: [N, bottleneck_dim], of length 1."""
        x = self.mlp(x)
        return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def batch_norm_mlp(*dims: int, bias: bool = False, last: nn.Module | None = None) -> nn.Module:
    """Linear layers with batch norm and ReLU between them, from dims[0] to dims[-1] features: lightly's `ProjectionHead`.

    A bias in front of a batch norm would do nothing and has none. bias: of the last layer; last: a norm after it.
    """
    from lightly.models.modules.heads import ProjectionHead  # only where it is used: it takes torchvision with it

    hidden: list[Any] = [(a, b, nn.BatchNorm1d(b), nn.ReLU(), False) for a, b in itertools.pairwise(dims[:-1])]
    return ProjectionHead([*hidden, (*dims[-2:], last, None, bias)])
