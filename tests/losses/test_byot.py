"""BYOT's loss against the paper's equations written out number by number, in float64."""

import math

import pytest
import torch

from selfsup.losses.byot import byot_loss

EXITS, BATCH, CLASSES, WIDTH = 3, 5, 4, 6
OPTIONS = {"alpha": 0.3, "temperature": 2.5, "feature_weight": 0.07}
SMOOTHING = 0.1


def draw(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(BATCH, CLASSES, generator=g, dtype=torch.float64) for _ in range(EXITS)]
    features = [torch.randn(BATCH, WIDTH, generator=g, dtype=torch.float64) for _ in range(EXITS)]
    labels = torch.randint(0, CLASSES, (BATCH,), generator=g)
    targets = (1 - SMOOTHING) * torch.eye(CLASSES, dtype=torch.float64)[labels] + SMOOTHING / CLASSES
    return [z.requires_grad_() for z in logits], [f.requires_grad_() for f in features], targets


def softmax(row: list[float], temperature: float) -> list[float]:
    """Equation 1."""
    powers = [math.exp(v / temperature) for v in row]
    return [p / sum(powers) for p in powers]


def expected(logits: list[torch.Tensor], features: list[torch.Tensor], targets: torch.Tensor) -> dict[str, float]:
    """Equations 5 to 8, image by image, class by class."""
    o = OPTIONS
    sums = {"label": 0.0, "kl": 0.0, "feature": 0.0, "loss": 0.0}
    for b in range(BATCH):
        y = targets[b].tolist()
        soft = softmax(logits[-1][b].tolist(), o["temperature"])
        for i in range(EXITS):
            deepest = i == EXITS - 1
            q = softmax(logits[i][b].tolist(), 1.0)
            ce = -sum(y[k] * math.log(q[k]) for k in range(CLASSES))
            mine = softmax(logits[i][b].tolist(), o["temperature"])
            kl = sum(soft[k] * math.log(soft[k] / mine[k]) for k in range(CLASSES)) * o["temperature"] ** 2
            hint = sum((u - v) ** 2 for u, v in zip(features[i][b].tolist(), features[-1][b].tolist()))
            sums["label"] += ce
            sums["kl"] += 0 if deepest else kl
            sums["feature"] += 0 if deepest else hint
            sums["loss"] += ce if deepest else (1 - o["alpha"]) * ce + o["alpha"] * kl + o["feature_weight"] * hint
    return {name: value / BATCH for name, value in sums.items()}


def test_equals_the_equations() -> None:
    logits, features, targets = draw()
    found = byot_loss(logits, features, targets, **OPTIONS)
    assert found.keys() == {"loss", "label", "kl", "feature"}
    for name, value in expected(logits, features, targets).items():
        assert found[name].item() == pytest.approx(value, rel=1e-12), name


def test_the_deepest_is_a_teacher_and_learns_from_labels_alone() -> None:
    logits, features, targets = draw()
    byot_loss(logits, features, targets, **OPTIONS)["loss"].backward()
    alone = logits[-1].detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(alone, targets).backward()
    torch.testing.assert_close(logits[-1].grad, alone.grad, rtol=1e-12, atol=0)
    assert features[-1].grad is None
    assert all(z.grad.abs().max() > 0 and f.grad.abs().max() > 0 for z, f in zip(logits[:-1], features[:-1]))


def test_gradients() -> None:
    logits, features, targets = draw(1)
    deep_logits, deep_feature = logits[-1].detach(), features[-1].detach()

    def loss(*given: torch.Tensor) -> torch.Tensor:
        shallow, hints = list(given[: EXITS - 1]), list(given[EXITS - 1 :])
        return byot_loss([*shallow, deep_logits], [*hints, deep_feature], targets, **OPTIONS)["loss"]

    assert torch.autograd.gradcheck(loss, (*logits[:-1], *features[:-1]))


def test_half_precision_is_computed_in_float32() -> None:
    logits, features, targets = draw(3)
    low = [[x.detach().bfloat16() for x in some] for some in (logits, features)]
    targets = targets.float()
    found = byot_loss(*low, targets, **OPTIONS)["loss"]
    exact = byot_loss(*[[x.float() for x in some] for some in low], targets, **OPTIONS)["loss"]
    assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_one_exit_is_supervised_training() -> None:
    logits, features, targets = draw(4)
    found = byot_loss(logits[-1:], features[-1:], targets, alpha=0.5, temperature=2, feature_weight=1.0)
    torch.testing.assert_close(found["loss"], torch.nn.functional.cross_entropy(logits[-1], targets))
    assert found["kl"] == found["feature"] == 0
