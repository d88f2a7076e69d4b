"""I-JEPA's loss against its definition, in plain loops."""

import pytest
import torch

from selfsup.losses.latent import latent_loss, layer_normed
from tests.losses.checks import check, check_large, draw

SHAPE = (2, 2, 3, 4)  # images, blocks, patches, dimensions


def smooth(d: torch.Tensor) -> torch.Tensor:
    return d * d / 2 if d.abs() < 1 else d.abs() - 0.5


@pytest.mark.parametrize(("form", "term"), [("smooth_l1", smooth), ("l2", lambda d: d * d)])
def test_loss(form: str, term) -> None:
    predicted, targets = draw(SHAPE, SHAPE)

    def oracle(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        pairs = list(zip(z.flatten(), h.flatten(), strict=True))
        return sum(term(a - b) for a, b in pairs) / len(pairs)

    def ours(z: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return latent_loss(z, h, form)

    check(ours, oracle, predicted, targets)
    check_large(ours, predicted, targets)
    with pytest.raises(ValueError, match="different shapes"):
        latent_loss(predicted, targets[:1], form)


def test_layer_normed() -> None:
    """Mean 0 and (biased) variance 1 of each vector; in float32 also from bfloat16."""
    (x,) = draw(SHAPE)
    for vector, got in zip(x.flatten(0, 2), layer_normed(x).flatten(0, 2), strict=True):
        mean = sum(vector) / 4
        variance = sum((v - mean) ** 2 for v in vector) / 4
        torch.testing.assert_close(got, torch.stack([(v - mean) / (variance + 1e-5).sqrt() for v in vector]))
    assert layer_normed(x.bfloat16()).dtype == torch.float32
