"""Distillation from logits: loops over the papers' formulas, identities between the losses, timm's tasks."""

import pytest
import torch
from timm.task import LogitDistillationTask, TokenDistillationTask
from torch import nn

from selfsup.losses.logits import (
    decoupled_distillation,
    dist_loss,
    hard_distillation,
    keep_top,
    soft_distillation,
    topk_distillation,
)
from tests.losses.checks import check, check_large, draw, value_and_gradients

B, K = 4, 6
LABELS = torch.tensor([0, 5, 2, 2])


def row(z: torch.Tensor, temperature: float) -> list[torch.Tensor]:
    """softmax(z / T) of one image, class by class."""
    e = [(x / temperature).exp() for x in z]
    return [x / sum(e) for x in e]


def kl(q: list[torch.Tensor], p: list[torch.Tensor]) -> torch.Tensor:
    return sum(a * (a / b).log() for a, b in zip(q, p, strict=True))


def soft(z: torch.Tensor, r: torch.Tensor, t: float) -> torch.Tensor:
    return sum(t * t * kl(row(r[i], t), row(z[i], t)) for i in range(len(z))) / len(z)


@pytest.mark.parametrize("t", [1.0, 4.0, 20.0])
def test_soft(t: float) -> None:
    """At T = 20 the divergence is 1e-3, from logarithms near -ln 6."""

    def loss(z: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return soft_distillation(z, r, t)

    for batch in (B, 1):
        inputs = draw((batch, K), (batch, K), seed=batch)
        check(loss, lambda z, r: soft(z, r, t), *inputs, rounding=5e-7 * t * t)
        check_large(loss, *inputs)


def test_soft_of_a_confident_teacher() -> None:
    """Probabilities that are 0 in float32 on either side."""
    z = torch.tensor([[0.0, 200.0, -200.0]], requires_grad=True)
    loss = soft_distillation(z, torch.tensor([[300.0, 0.0, -300.0]]), 1.0)
    loss.backward()
    assert loss == 200 and torch.equal(z.grad, torch.tensor([[-1.0, 1.0, 0.0]]))
    same = soft_distillation(z, z.detach(), 1.0)
    assert same == 0


def hard(z: torch.Tensor, r: torch.Tensor, eps: float) -> torch.Tensor:
    total = z.new_zeros(())
    for i in range(len(z)):
        best = max(range(K), key=lambda k: r[i, k].item())
        for k, p in enumerate(row(z[i], 1.0)):
            total = total - ((1 - eps) * (k == best) + eps / K) * p.log()
    return total / len(z) + 0 * r.sum()


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_hard(eps: float) -> None:
    check(lambda z, r: hard_distillation(z, r, eps), lambda z, r: hard(z, r, eps), *draw((B, K), (B, K)))
    check_large(lambda z, r: hard_distillation(z, r, eps), *draw((B, K), (B, K)))


def dkd(z: torch.Tensor, r: torch.Tensor, labels: torch.Tensor, alpha: float, beta: float, t: float) -> torch.Tensor:
    total = z.new_zeros(())
    for i, y in enumerate(labels.tolist()):
        p, q = row(z[i], t), row(r[i], t)
        target = kl([q[y], 1 - q[y]], [p[y], 1 - p[y]])
        others = [k for k in range(K) if k != y]
        total = (
            total + alpha * target + beta * kl([q[k] / (1 - q[y]) for k in others], [p[k] / (1 - p[y]) for k in others])
        )
    return t * t * total / len(z)


@pytest.mark.parametrize(("alpha", "beta", "t"), [(1.0, 8.0, 4.0), (0.5, 1.0, 1.0), (1.0, 0.0, 2.0), (0.0, 1.0, 2.0)])
def test_decoupled(alpha: float, beta: float, t: float) -> None:
    check(
        lambda z, r, y: decoupled_distillation(z, r, y, alpha, beta, t),
        lambda z, r, y: dkd(z, r, y, alpha, beta, t),
        *draw((B, K), (B, K)),
        LABELS,
    )
    check_large(lambda z, r, y: decoupled_distillation(z, r, y, alpha, beta, t), *draw((B, K), (B, K)), LABELS)


def test_decoupled_is_soft_with_the_teachers_weight() -> None:
    """Equation 6: alpha = 1, beta = 1 - the teacher's probability of the true class, image by image."""
    z, r = draw((1, K), (1, K), seed=2)
    beta = 1 - torch.softmax(r / 3, -1)[0, 4].item()
    found = decoupled_distillation(z, r, torch.tensor([4]), 1.0, beta, 3.0)
    torch.testing.assert_close(found, soft_distillation(z, r, 3.0), rtol=1e-12, atol=0)


def test_decoupled_near_certainty() -> None:
    """The mass of the others is 1e-9: 1 - p is 0 in float32, its logarithm is not lost."""
    z = torch.tensor([[20.0, 0.0, -1.0]], dtype=torch.float64)
    r = torch.tensor([[22.0, 1.0, -1.0]], dtype=torch.float64)
    args = (torch.tensor([0]), 1.0, 1.0, 1.0)
    exact = decoupled_distillation(z, r, *args)
    torch.testing.assert_close(decoupled_distillation(z.float(), r.float(), *args).double(), exact, rtol=1e-5, atol=0)


def pearson(a: list[torch.Tensor], b: list[torch.Tensor], eps: float) -> torch.Tensor:
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    product = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return product / (sum((x - ma) ** 2 for x in a).sqrt() * sum((y - mb) ** 2 for y in b).sqrt() + eps)


def dist(z: torch.Tensor, r: torch.Tensor, beta: float, gamma: float, t: float, eps: float) -> torch.Tensor:
    p, q = ([row(x, t) for x in rows] for rows in (z, r))
    inter = sum(1 - pearson(a, b, eps) for a, b in zip(p, q, strict=True)) / len(z)
    intra = sum(1 - pearson([a[k] for a in p], [b[k] for b in q], eps) for k in range(K)) / K
    return t * t * (beta * inter + gamma * intra)


@pytest.mark.parametrize(("beta", "gamma", "t"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_dist(beta: float, gamma: float, t: float, eps: float) -> None:
    check(
        lambda z, r: dist_loss(z, r, beta, gamma, t, eps),
        lambda z, r: dist(z, r, beta, gamma, t, eps),
        *draw((B, K), (B, K)),
    )


def test_dist_at_the_edges() -> None:
    check_large(dist_loss, *draw((B, K), (B, K)))  # probabilities of exactly 0 and 1: classes without variance
    z, r = draw((B, K), (B, K))
    value, gradients = value_and_gradients(dist_loss, (torch.zeros_like(z), r))  # the same of all classes and images
    assert value.isfinite() and all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(dist_loss(z, z), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="at least 2 images"):
        dist_loss(z[:1], r[:1])


def topk(z: torch.Tensor, r: torch.Tensor, k: int, t: float) -> torch.Tensor:
    total = z.new_zeros(())
    for i in range(len(z)):
        p, q = row(z[i], t), row(r[i], t)
        top = sorted(range(K), key=lambda c: -r[i, c].item())[:k]
        left = [c for c in range(K) if c not in top]
        merged = [[x[c] for c in top] + ([sum(x[c] for c in left)] if left else []) for x in (q, p)]
        total = total + kl(*merged)
    return t * t * total / len(z) + 0 * r.sum()


def from_top(k: int, t: float):
    """The loss through what would be stored, which the teacher's gradient does not pass."""
    return lambda z, r: topk_distillation(z, *(x.detach() for x in keep_top(r, k, t)), t)


@pytest.mark.parametrize("k", [1, 3, K])
@pytest.mark.parametrize("t", [1.0, 4.0])
def test_topk(k: int, t: float) -> None:
    z, r = draw((B, K), (B, K))
    check(from_top(k, t), lambda z, r: topk(z, r.detach(), k, t) + 0 * r.sum(), z, r)
    check_large(from_top(k, t), z, r)
    full = soft_distillation(z, r, t)
    assert from_top(k, t)(z, r) <= full + 1e-12
    if k == K:
        torch.testing.assert_close(from_top(k, t)(z, r), full, rtol=1e-12, atol=0)


def test_topk_stored_in_half_precision() -> None:
    z, r = draw((64, 1000), (64, 1000))
    z, r = z.float(), (4 * r + 30).float()
    indices, values, rest = keep_top(r, 20, 2.0)
    assert (values[:, 0] == 0).all() and (values.diff(dim=1) <= 0).all()
    exact = topk_distillation(z, indices, values, rest, 2.0)
    torch.testing.assert_close(topk_distillation(z, indices, values.half(), rest.half(), 2.0), exact, rtol=1e-3, atol=0)


def test_topk_without_the_rest() -> None:
    """The teacher renormalised over its k, the student over all K."""
    z, r = draw((1, K), (1, K))
    indices, values, _ = keep_top(r, 2, 1.0)
    a, b = indices[0].tolist()
    q = [r[0, c].exp() / (r[0, a].exp() + r[0, b].exp()) for c in (a, b)]
    p = row(z[0], 1.0)
    found = topk_distillation(z, indices, values, None, 1.0)
    torch.testing.assert_close(found, kl(q, [p[a], p[b]]), rtol=1e-12, atol=0)


def test_shapes() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(3, 1)
    for loss in (soft_distillation, hard_distillation, dist_loss):
        with pytest.raises(ValueError, match="different shapes"):
            loss(a, b)
    with pytest.raises(ValueError, match="different shapes"):
        decoupled_distillation(a, b, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="do not fit"):
        topk_distillation(a, torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2), None)


class Given(nn.Module):
    """A network of timm's kind that says what it was given."""

    pretrained_cfg = {"mean": (0.0,), "std": (1.0,)}  # noqa: RUF012
    num_classes, in_chans = K, 1

    def __init__(self, *logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def set_distilled_training(self, on: bool) -> None:
        pass

    def forward(self, x: torch.Tensor):
        return self.logits if len(self.logits) > 1 else self.logits[0]


@pytest.mark.parametrize("t", [1.0, 3.0])
def test_equals_timms_tasks(t: float) -> None:
    z, r = (x.float() for x in draw((B, K), (B, K)))
    images = torch.zeros(B, 1, 2, 2)

    def run(task_class, key: str, student: Given, **options) -> torch.Tensor:
        task = task_class(
            student,
            Given(r),
            criterion=nn.CrossEntropyLoss(),
            temperature=t,
            device=torch.device("cpu"),
            verbose=False,
            **options,
        )
        return task(images, LABELS)[key]

    cases = {
        soft_distillation: (
            lambda x: run(LogitDistillationTask, "kd_loss", Given(x)),
            lambda x: run(TokenDistillationTask, "distill_loss", Given(z, x), distill_type="soft"),
        ),
        hard_distillation: (lambda x: run(TokenDistillationTask, "distill_loss", Given(z, x), distill_type="hard"),),
    }
    for ours, others in cases.items():
        options = (t,) if ours is soft_distillation else ()
        value, (gradient,) = value_and_gradients(lambda x, f=ours, o=options: f(x, r, *o), (z,))
        for theirs in others:
            expected, (reference,) = value_and_gradients(theirs, (z,))
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
            torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-7)


def test_what_is_not_a_number_stays_so():
    """A batch that is broken must be seen in the loss, or its step would be taken."""
    good, bad = torch.randn(3, 5), torch.full((3, 5), torch.nan)
    for student, teacher in ((good, bad), (bad, good)):
        assert soft_distillation(student, teacher, 2.0).isnan()
