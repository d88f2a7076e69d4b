"""SIGReg: algorithm 1 of LeJEPA in complex numbers, lightly's module, the exact integral, and what the statistic tells apart."""

import math

import pytest
import torch
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss

from selfsup.losses.sigreg import sigreg, view_invariance
from tests.losses.checks import check, draw

V, B, D, M = 3, 6, 5, 4


def unit_columns(dim: int = D, count: int = M) -> torch.Tensor:
    (a,) = draw((dim, count), seed=9)
    return a / a.norm(dim=0)


def algorithm_1(z: torch.Tensor, directions: torch.Tensor, points: int, t_max: float) -> torch.Tensor:
    """Balestriero & LeCun, 2025: the whole domain, complex exponentials, a sample a view."""
    t = torch.linspace(-t_max, t_max, points, dtype=z.dtype)
    gauss = torch.exp(-0.5 * t**2)
    values = []
    for view in z:
        for a in directions.t():
            phi = torch.exp(1j * (view @ a)[:, None] * t).mean(0)
            values.append(torch.trapezoid((phi - gauss).abs() ** 2 * gauss, t) * len(view))
    return torch.stack(values).mean()


@pytest.mark.parametrize(("points", "t_max"), [(17, 5.0), (33, 3.0), (3, 1.0)])
def test_algorithm_1(points: int, t_max: float) -> None:
    (z,) = draw((V, B, D))
    a = unit_columns()
    check(
        lambda x: sigreg(x, a if x.dtype == a.dtype else a.float(), B, points=points, t_max=t_max),
        lambda x: algorithm_1(x, a, points, t_max),
        z,
    )


def test_equals_lightly() -> None:
    """Which has 17 knots on half of [-3, 3]: 33 here."""
    (z,) = draw((V, 64, D))
    a = unit_columns().float()
    theirs = SIGReg(num_vectors=M)
    theirs._generate_unit_vectors = lambda *_: a
    ours, other = (z.float().requires_grad_() for _ in range(2))
    expected = theirs(other)
    expected.backward()
    value = sigreg(ours, a, 64, points=33, t_max=3.0)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert (ours.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max()


def test_exact_integral() -> None:
    """The closed form of the statistic (Epps & Pulley, 1983; the kernel MMD of section 5.2) with a wide and fine rule."""
    (x,) = draw((1, 20, 1))
    y = x[0, :, 0]
    # integral of exp(i t d) exp(-t^2 / 2) = sqrt(2 pi) exp(-d^2 / 2), and with exp(-t^2), exp(-3 t^2 / 2)
    pairs = math.sqrt(2 * math.pi) * torch.exp(-((y[:, None] - y) ** 2) / 2).mean()
    cross = math.sqrt(math.pi) * torch.exp(-(y**2) / 4).mean()
    expected = 20 * (pairs - 2 * cross + math.sqrt(2 * math.pi / 3))
    value = sigreg(x, torch.ones(1, 1, dtype=torch.float64), 20, points=801, t_max=12.0)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_tells_a_gaussian_from_others() -> None:
    (z,) = draw((1, 512, 8))
    a = unit_columns(8, 64)
    gaussian = sigreg(z, a, 512)
    for other in (z * 0, z + 2, z * 2, z[..., :1].expand_as(z)):
        assert sigreg(other, a, 512) > 5 * gaussian


def test_parts_of_a_batch() -> None:
    """The mean of the parts' characteristic functions is that of the whole: what `reduce` is for."""
    (z,) = draw((V, B, D))
    seen: list[torch.Tensor] = []
    for part in z.split(B // 2, dim=1):
        sigreg(part, unit_columns(), B, reduce=lambda x: (seen.append(x), x)[1])
    whole = sigreg(z, unit_columns(), B, reduce=lambda x: (seen.append(x), x)[1])
    torch.testing.assert_close((seen[0] + seen[1]) / 2, seen[2], rtol=1e-12, atol=1e-12)
    again = sigreg(z.split(B // 2, dim=1)[0], unit_columns(), B, reduce=lambda _: seen[2])
    torch.testing.assert_close(again, whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("targets", [1, 2, 3])
def test_invariance(targets: int) -> None:
    (z,) = draw((V, B, D))

    def loops(x: torch.Tensor) -> torch.Tensor:
        centre = sum(x[t] for t in range(targets)) / targets
        return torch.stack([((x[v] - centre) ** 2).mean() for v in range(V)]).mean()

    check(lambda x: view_invariance(x, targets), loops, z)
    theirs = lejepa_invariance_loss(all_proj=z, global_proj=z[:targets])
    torch.testing.assert_close(view_invariance(z, targets), theirs, rtol=1e-12, atol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="odd number"):
        sigreg(torch.zeros(2, 4, 3), torch.ones(3, 1), 4, points=16)
    with pytest.raises(ValueError, match="too few"):
        view_invariance(torch.zeros(1, 4, 3), 1)
