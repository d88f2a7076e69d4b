"""Position embeddings at other sizes."""

import math

import pytest
import torch

from selfsup.backbones.positions import resample_grid, resample_tokens, resize_matrix

MODES = ("size", "timm", "dino")
SHAPES = [((14, 14), (6, 6)), ((14, 14), (7, 21)), ((4, 4), (9, 4)), ((3, 5), (12, 7)), ((37, 37), (16, 16))]
SHAPES += [((1, 3), (1, 5)), ((4, 1), (9, 1)), ((4, 4), (9, 1))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_matrices_are_the_interpolation(mode, old, new):
    grid = torch.randn(1, *old, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_torch = resample_grid(grid, new, mode)
    by_matrix = resample_grid(grid, new, mode, by_matrix=True)
    assert by_torch.shape == (1, *new, 5)
    assert torch.allclose(by_torch, by_matrix, atol=1e-12)
    single = resample_grid(grid.float(), new, mode, by_matrix=True)
    assert torch.allclose(single.double(), by_torch, atol=1e-5)


def keys(x: float) -> float:
    """Keys' cubic kernel with a = -0.75, as torch uses it."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize("mode", ["size", "dino"])
@pytest.mark.parametrize(("old", "new"), [(14, 6), (14, 20), (5, 3)])
def test_matrix_against_the_formula(mode, old, new):
    """Output row i samples the input at (i + 1/2) / s - 1/2; DINO's s is (new + 0.1) / old, not new / old."""
    scale = (new + 0.1) / old if mode == "dino" else new / old
    expected = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) / scale - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            expected[i, min(max(tap, 0), old - 1)] += keys(centre - tap)
    assert torch.allclose(resize_matrix(old, new, mode), expected, atol=1e-9)


def test_antialiasing_widens_the_kernel():
    assert (resize_matrix(14, 4, "timm")[1] != 0).sum() > (resize_matrix(14, 4, "size")[1] != 0).sum() == 4
    for mode in MODES:
        assert torch.allclose(resize_matrix(14, 5, mode).sum(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_native_size_and_prefix_are_untouched(mode):
    pos = torch.randn(1, 2 + 12, 8)
    assert resample_tokens(pos, (3, 4), (3, 4), mode, prefix=2) is pos
    out = resample_tokens(pos, (3, 4), (4, 3), mode, prefix=2)  # as many tokens, another shape
    assert torch.equal(out[:, :2], pos[:, :2]) and not torch.allclose(out[:, 2:], pos[:, 2:])


@pytest.mark.systems("Position embeddings at any size, timm's, by size, and DINO's own resampling")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["vit", "registers", "distilled", "vit_avg"])
def test_models_use_their_mode(kind, mode, small):
    """Against the same net with a position embedding that was resampled by hand."""
    backbone = small(kind, pos_interp=mode)
    p, s = backbone.patch_size, backbone.input_size
    h, w = s + 2 * p, s - p
    images = torch.randn(2, 3, h, w)
    with torch.no_grad():
        found = backbone(images).pooled
        model = backbone.model
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        pos = resample_tokens(model.pos_embed, (s // p, s // p), (h // p, w // p), mode, prefix)
        model.pos_embed = torch.nn.Parameter(pos)
        model.patch_embed.grid_size = (h // p, w // p)
        assert torch.equal(backbone(images).pooled, found)


def test_modes_differ_and_timm_is_timm(small):
    images = torch.randn(2, 3, 48, 24)
    with torch.no_grad():
        outputs = [small("vit", pos_interp=mode)(images).pooled for mode in MODES]
        bare = small("vit").model
        bare.__class__ = type(bare).__mro__[2]  # timm's own class
        assert bare.__class__.__module__.startswith("timm")
        assert torch.equal(bare(images), outputs[1])
    assert not torch.allclose(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("mode", MODES)
def test_training_matches_evaluation_and_has_gradients(mode, small):
    backbone = small("vit", pos_interp=mode)
    images = torch.randn(2, 3, 48, 24)
    evaluated = backbone(images).pooled
    trained = backbone.train()(images).pooled
    assert torch.allclose(trained, evaluated, atol=2e-5)
    (slow,) = torch.autograd.grad(evaluated.square().sum(), backbone.model.pos_embed)
    (fast,) = torch.autograd.grad(trained.square().sum(), backbone.model.pos_embed)
    assert torch.allclose(fast, slow, atol=1e-4 * slow.abs().max().item())


def test_autocast_leaves_positions_in_float32():
    grid = torch.randn(1, 14, 14, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = resample_grid(grid, (6, 6), "timm", by_matrix=True)
    assert out.dtype == torch.float32
    assert torch.equal(out, resample_grid(grid, (6, 6), "timm", by_matrix=True))
