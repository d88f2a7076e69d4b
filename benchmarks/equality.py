"""Do two sides compute the same step? Loss and gradients, compared before anything is timed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.protocol import RTOL

BF16_LOSS = 5e-3
BF16_GRADIENT = 5e-2
BF16_DISTANCE = 1.2
"""Our distance (1 - cosine) from the fp32 gradients may be at most this much of the peer's."""


@dataclass(frozen=True)
class Equality:
    """Relative differences of two sides' first step."""

    loss: float
    """|a - b| / |b|."""
    gradient: float
    """l2 norm of the difference of all gradients, over the l2 norm of the peer's."""
    worst: float
    """Largest difference in any one tensor, over that tensor's own largest gradient."""
    worst_name: str
    distance: float | None = None
    """Rows below fp32: 1 - cosine of our gradients and those of fp32."""
    peer_distance: float | None = None

    def within(self, dtype: str) -> bool:
        """Whether the two are the same step at this dtype."""
        if dtype == "fp32":
            return self.loss <= RTOL and self.gradient <= RTOL and self.worst <= 10 * RTOL
        if self.distance is None or self.peer_distance is None:
            return False
        near = self.distance <= BF16_DISTANCE * self.peer_distance
        return near and self.loss <= BF16_LOSS and self.gradient <= BF16_GRADIENT

    def __str__(self) -> str:
        if self.distance is not None and self.peer_distance is not None:
            fp32 = f"; 1 - cosine with the fp32 gradients {self.distance:.1e}, the peer's {self.peer_distance:.1e}"
        else:
            fp32 = ""
        return (
            f"relative differences: loss {self.loss:.1e}, gradients {self.gradient:.1e}, "
            f"worst tensor {self.worst:.1e} ({self.worst_name}){fp32}"
        )


def without_key_bias(name: str, gradient: Tensor) -> Tensor:
    """The gradient of a fused qkv bias without its key third, which is zero but for rounding: softmax ignores it."""
    if not name.endswith("attn.qkv.bias"):
        return gradient
    q, _, v = gradient.chunk(3)
    return torch.cat([q, v])


def compare(loss_a: float, a: dict[str, Tensor], loss_b: float, b: dict[str, Tensor]) -> Equality:
    """Compare by name; raises ValueError when one side has a gradient that the other has not."""
    if a.keys() != b.keys():
        raise ValueError(f"gradients of one side only: {', '.join(sorted(a.keys() ^ b.keys())[:6])}")
    difference = total = worst = 0.0
    worst_name = ""
    for name in a:
        x, y = without_key_bias(name, a[name]).double(), without_key_bias(name, b[name]).double()
        delta = x - y
        difference += float(delta.square().sum())
        total += float(y.square().sum())
        relative = float(delta.abs().max() / y.abs().max().clamp_min(1e-30))
        if relative >= worst:
            worst, worst_name = relative, name
    return Equality(abs(loss_a - loss_b) / abs(loss_b), (difference / total) ** 0.5, worst, worst_name)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """1 - cosine of two sets of gradients, each as one long vector."""
    dot = aa = bb = 0.0
    for name in a:
        x, y = without_key_bias(name, a[name]).double(), without_key_bias(name, b[name]).double()
        dot, aa, bb = dot + float((x * y).sum()), aa + float(x.square().sum()), bb + float(y.square().sum())
    return 1 - dot / (aa * bb) ** 0.5
