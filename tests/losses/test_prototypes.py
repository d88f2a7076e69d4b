"""The loss over prototypes in one function, against the plain formula: logits by weight normalisation, then `dino_loss`."""

import pytest
import torch
import torch.nn.functional as F

from selfsup.losses.dino import dino_loss, teacher_probabilities
from selfsup.losses.prototypes import prototype_loss

VIEWS, BATCH, DIM = 5, 6, 24


def draw(k: int, targets: int = 2, dtype: torch.dtype = torch.float32):
    """(x, v, g, teacher's probabilities)."""
    r = torch.Generator().manual_seed(k)
    x = F.normalize(torch.randn(VIEWS, BATCH, DIM, generator=r, dtype=torch.float64), dim=-1)
    v = torch.randn(k, DIM, generator=r, dtype=torch.float64)
    g = 0.5 + torch.rand(k, 1, generator=r, dtype=torch.float64)
    q = teacher_probabilities(torch.randn(targets, BATCH, k, generator=r, dtype=torch.float64), torch.zeros(k), 0.2)
    return (*(t.to(dtype).requires_grad_() for t in (x, v, g)), q.to(dtype))


def plain(
    x: torch.Tensor, v: torch.Tensor, g: torch.Tensor, q: torch.Tensor, temperature: float, same_view: bool = False
) -> torch.Tensor:
    return dino_loss(F.linear(x, v * (g / v.norm(dim=1, keepdim=True))), q, temperature, same_view)


def both(inputs, temperature: float = 0.1, same_view: bool = False):
    """[(loss, gradients of x, v, g)] of the function and of the plain formula; upstream gradient 0.7."""
    found = []
    for loss in (prototype_loss, plain):
        value = loss(*inputs, temperature, same_view)
        found.append((value, torch.autograd.grad(0.7 * value, [t for t in inputs[:3] if t.requires_grad])))
    return found


@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("k", [7, 4096, 65536])
def test_equals_the_plain_formula(k: int, targets: int) -> None:
    (loss, grads), (expected, references) = both(draw(k, targets))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for a, b in zip(grads, references, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_float64_is_exact() -> None:
    (loss, grads), (expected, references) = both(draw(64, dtype=torch.float64))
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    for a, b in zip(grads, references, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize(("views", "targets"), [(1, 1), (2, 2), (VIEWS, 2)])
def test_same_views(views: int, targets: int) -> None:
    """As a student is trained on a frozen teacher's prototypes, which get no gradient; and with its own."""
    x, v, g, q = draw(64, targets, torch.float64)
    x = x.detach()[:views].requires_grad_()
    for inputs in ((x, v, g, q), (x, v.detach(), g.detach(), q)):
        (loss, grads), (expected, references) = both(inputs, same_view=True)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        for a, b in zip(grads, references, strict=True):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_gradcheck() -> None:
    x, v, g, q = draw(9, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *w: prototype_loss(*w, q, 0.5), (x, v, g))


def test_frozen_prototypes() -> None:
    """The same loss and the same gradient for the embeddings; none for the prototypes."""
    x, v, g, q = draw(64)
    (loss, (gx,)), _ = both((x, v.detach(), g.detach(), q))
    (free, grads), _ = both((x, v, g, q))
    assert torch.equal(loss, free) and torch.equal(gx, grads[0])


def test_large_logits() -> None:
    """Where exp of a logit overflows float32, and rounding is large, ours is no further from float64 than the formula."""
    inputs = draw(512)
    exact = [t.detach().double().requires_grad_() for t in inputs[:3]]
    _, (expected, references) = both((*exact, inputs[3].double()), temperature=0.004)
    ours, theirs = both(inputs, temperature=0.004)
    torch.testing.assert_close(ours[0].double(), expected, rtol=1e-6, atol=0)
    for a, b, reference in zip(ours[1], theirs[1], references, strict=True):
        assert (a - reference).norm() <= 1.5 * (b - reference).norm() + 1e-7 * reference.norm()


def test_autocast() -> None:
    """In bfloat16 the gradients are as near to float32's as those of the plain formula are."""
    inputs = draw(65536)  # with few prototypes, single ones that round up or down decide
    _, (expected, references) = both(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = both(inputs)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], expected, rtol=2e-3, atol=0)
    for a, b, exact in zip(ours[1], theirs[1], references, strict=True):
        assert a.dtype == torch.float32
        off, allowed = (1 - F.cosine_similarity(t.flatten().double(), exact.flatten().double(), dim=0) for t in (a, b))
        assert off <= 1.2 * allowed + 1e-9


def test_repeats_bit_for_bit() -> None:
    inputs = draw(4096)
    first, second = both(inputs)[0], both(inputs)[0]
    assert torch.equal(first[0], second[0]) and all(map(torch.equal, first[1], second[1]))


def test_nothing_is_kept_of_the_inputs() -> None:
    inputs = draw(64)
    before = [t.detach().clone() for t in inputs]
    both(inputs)
    assert all(map(torch.equal, inputs, before))


def test_too_few_views() -> None:
    x, v, g, q = draw(8)
    with pytest.raises(ValueError, match="different views"):
        prototype_loss(x[:1], v, g, q, 0.1)
