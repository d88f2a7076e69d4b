"""Patches and their losses, in plain loops."""

import pytest
import torch

from selfsup.losses.reconstruction import normalise_patches, patchify, reconstruction_loss, unpatchify


def test_patchify_in_loops() -> None:
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for n in range(2):
        for row in range(2):
            for column in range(3):
                square = images[n, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                expected = [square[c, y, x] for y in range(2) for x in range(2) for c in range(3)]
                assert torch.equal(patches[n, 3 * row + column], torch.stack(expected))
    assert torch.equal(unpatchify(patches, (2, 3), 2), images)


def test_normalised_patches() -> None:
    x = torch.randn(3, 5, 12, dtype=torch.float64) * 4 + 2
    out = normalise_patches(x)
    for n in range(3):
        for t in range(5):
            patch = x[n, t]
            mean = patch.sum() / 12
            variance = ((patch - mean) ** 2).sum() / 11
            torch.testing.assert_close(out[n, t], (patch - mean) / (variance + 1e-6).sqrt(), rtol=1e-12, atol=1e-12)
    assert torch.isfinite(normalise_patches(torch.full((1, 12), 3.0))).all()


@pytest.mark.parametrize("distance", ["l2", "l1"])
def test_loss_and_gradient(distance: str) -> None:
    prediction = torch.randn(4, 3, 12, dtype=torch.float64, requires_grad=True)
    target = torch.randn(4, 3, 12, dtype=torch.float64)
    loss = reconstruction_loss(prediction, target, distance)
    total = 0.0
    for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist()):
        total += (p - t) ** 2 if distance == "l2" else abs(p - t)
    assert loss.item() == pytest.approx(total / 144, rel=1e-12)
    assert torch.autograd.gradcheck(lambda p: reconstruction_loss(p, target, distance), (prediction,))
    with pytest.raises(ValueError, match="different shapes"):
        reconstruction_loss(prediction, target[:1], distance)
    assert reconstruction_loss(prediction.bfloat16(), target.bfloat16(), distance).dtype == torch.float32
