"""Do two sides compute the same step? Loss and gradients, compared before anything is timed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.protocol import RTOL

BF16_LOSS = 5e-3
BF16_GRADIENT = 5e-2


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

    def within(self, dtype: str) -> bool:
        """Whether the two are the same step at this dtype."""
        if dtype == "fp32":
            return self.loss <= RTOL and self.gradient <= RTOL and self.worst <= 10 * RTOL
        return self.loss <= BF16_LOSS and self.gradient <= BF16_GRADIENT

    def __str__(self) -> str:
        return (
            f"relative differences: loss {self.loss:.1e}, gradients {self.gradient:.1e}, "
            f"worst tensor {self.worst:.1e} ({self.worst_name})"
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
