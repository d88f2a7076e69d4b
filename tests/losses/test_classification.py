"""Losses on labels against loops over the formulas, torch and timm."""

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from selfsup.losses.classification import binary_cross_entropy, one_hot, smooth, soft_cross_entropy
from tests.losses.checks import check, check_large, draw, value_and_gradients

B, K = 5, 7
LABELS = torch.tensor([0, 3, 6, 3, 1])


def mixed() -> torch.Tensor:
    """Targets as of mixing: rows with two or three classes, of sum 1."""
    lam = torch.tensor([0.3, 0.8, 1.0, 0.55, 0.1], dtype=torch.float64)[:, None]
    return lam * one_hot(LABELS, K).double() + (1 - lam) * one_hot(LABELS.flip(0), K).double()


def probabilities(seed: int) -> torch.Tensor:
    return torch.softmax(draw((B, K), seed=seed)[0], -1)


def test_one_hot() -> None:
    assert torch.equal(one_hot(LABELS, K), F.one_hot(LABELS, K).float())
    assert one_hot(torch.tensor([-1, 2]), 4, 0.1).tolist()[0] == [0, 0, 0, 0]  # no label


@pytest.mark.parametrize("eps", [0.1, 0.5])
def test_both_forms_of_smoothing(eps: float) -> None:
    everyone, others = (one_hot(LABELS, K, eps, form).tolist() for form in ("all", "others"))
    for i, label in enumerate(LABELS.tolist()):
        for k in range(K):
            assert everyone[i][k] == pytest.approx((1 - eps if k == label else 0) + eps / K)
            assert others[i][k] == pytest.approx(1 - eps if k == label else eps / (K - 1))
    equal = smooth(one_hot(LABELS, K), eps * K / (K - 1), "all")
    torch.testing.assert_close(one_hot(LABELS, K, eps, "others"), equal)


@pytest.mark.parametrize("form", ["all", "others"])
def test_smoothing_of_mixed_targets_is_the_mixture(form: str) -> None:
    lam = torch.tensor([0.3, 0.8, 1.0, 0.55, 0.1], dtype=torch.float64)[:, None]
    a, b = (smooth(one_hot(labels, K).double(), 0.1, form) for labels in (LABELS, LABELS.flip(0)))
    found = smooth(mixed(), 0.1, form)
    torch.testing.assert_close(found, lam * a + (1 - lam) * b)
    torch.testing.assert_close(found.sum(-1), torch.ones(B, dtype=torch.float64))


def test_unknown_form() -> None:
    with pytest.raises(ValueError, match="neither 'all'"):
        one_hot(LABELS, K, 0.1, "both")


def cross_entropy_in_loops(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    total = z.new_zeros(())
    for i in range(z.shape[0]):
        partition = sum(z[i, k].exp() for k in range(z.shape[1]))
        for k in range(z.shape[1]):
            total = total - q[i, k] * (z[i, k].exp() / partition).log()
    return total / z.shape[0]


def test_soft_cross_entropy() -> None:
    check(soft_cross_entropy, cross_entropy_in_loops, *draw((B, K)), mixed())
    check_large(soft_cross_entropy, *draw((B, K)), probabilities(1) / 1e4)
    check(soft_cross_entropy, cross_entropy_in_loops, *draw((1, K)), mixed()[:1])


def equal(ours, theirs, z: torch.Tensor) -> None:
    (a, (ga,)), (b, (gb,)) = (value_and_gradients(f, (z,)) for f in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    torch.testing.assert_close(ga, gb, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_equals_torch_and_timm(eps: float) -> None:
    (z,) = draw((B, K), seed=3)
    ours = lambda x: soft_cross_entropy(x, one_hot(LABELS, K, eps))  # noqa: E731
    equal(ours, lambda x: F.cross_entropy(x, LABELS, label_smoothing=eps), z)
    equal(ours, lambda x: LabelSmoothingCrossEntropy(eps)(x, LABELS), z)
    targets = mixed()
    equal(lambda x: soft_cross_entropy(x, targets), lambda x: SoftTargetCrossEntropy()(x, targets), z)
    equal(
        lambda x: soft_cross_entropy(x, smooth(targets, eps)),
        lambda x: F.cross_entropy(x, targets, label_smoothing=eps),
        z,
    )


def binary_in_loops(z: torch.Tensor, q: torch.Tensor, scale: float) -> torch.Tensor:
    total = z.new_zeros(())
    for i in range(z.shape[0]):
        for k in range(z.shape[1]):
            p = 1 / (1 + (-z[i, k]).exp())
            total = total - q[i, k] * p.log() - (1 - q[i, k]) * (1 - p).log()
    return total / z.shape[0] * scale


@pytest.mark.parametrize("sums", [False, True])
def test_binary_cross_entropy(sums: bool) -> None:
    def loss(z: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy(z, q, sum_classes=sums)

    check(loss, lambda z, q: binary_in_loops(z, q, 1.0 if sums else 1 / K), *draw((B, K)), mixed())
    check_large(loss, *draw((B, K)), mixed() / 1e4)


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.2])
def test_binary_equals_timm(sums: bool, threshold: float | None) -> None:
    (z,) = draw((B, K), seed=4)
    targets = mixed()
    theirs = BinaryCrossEntropy(smoothing=0.1, target_threshold=threshold, sum_classes=sums)
    ours = lambda x, q: binary_cross_entropy(x, q, sum_classes=sums, threshold=threshold)  # noqa: E731
    equal(lambda x: ours(x, targets), lambda x: theirs(x, targets), z)
    equal(lambda x: ours(x, one_hot(LABELS, K, 0.1)), lambda x: theirs(x, LABELS), z)


def test_shapes_are_not_broadcast() -> None:
    for loss in (soft_cross_entropy, binary_cross_entropy):
        with pytest.raises(ValueError, match="different shapes"):
            loss(torch.zeros(3, 4), torch.zeros(1, 4))
