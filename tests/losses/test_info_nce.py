"""Contrastive losses against loops as the papers write them, and against lightly's."""

import pytest
import torch
from lightly.loss import NTXentLoss

from selfsup.losses.info_nce import batch_info_nce, nt_xent, queue_info_nce
from selfsup.losses.numerics import unit
from tests.losses.checks import check, check_large, draw, value_and_gradients

V, B, D, K, TAU = 3, 4, 5, 7, 0.3
CLASSES = torch.tensor([2, 0, 2, 2])
EACH = torch.arange(B)


def embeddings(*shapes: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    return tuple(unit(x) for x in draw(*shapes, seed=seed))


def supcon_loops(z: torch.Tensor, things: list[int]) -> torch.Tensor:
    """Khosla et al., 2020, equation 2, with the mean over anchors instead of their sum."""
    flat = [(z[v, b], things[b]) for v in range(z.shape[0]) for b in range(z.shape[1])]
    total = z.new_zeros(())
    for i, (anchor, thing) in enumerate(flat):
        below = sum((anchor @ other / TAU).exp() for a, (other, _) in enumerate(flat) if a != i)
        partners = [other for p, (other, same) in enumerate(flat) if p != i and same == thing]
        total = total - sum(((anchor @ p / TAU).exp() / below).log() for p in partners) / len(partners)
    return total / len(flat)


@pytest.mark.parametrize("things", [EACH, CLASSES], ids=["simclr", "supcon"])
def test_nt_xent(things: torch.Tensor) -> None:
    (z,) = embeddings((V, B, D))
    check(lambda z: nt_xent(z, z, things, things, 0, TAU), lambda z: supcon_loops(z, things.tolist()), z)
    check_large(lambda z: nt_xent(z, z, things, things, 0, TAU), z)
    with pytest.raises(ValueError, match="two views"):
        nt_xent(z[:1], z[:1], things, things, 0, TAU)


def test_nt_xent_equals_lightly() -> None:
    """Of raw projections, which lightly normalises."""
    (z,) = draw((2, B, D))
    first = value_and_gradients(lambda z: nt_xent(unit(z), unit(z), EACH, EACH, 0, TAU), (z,))
    second = value_and_gradients(lambda z: NTXentLoss(temperature=TAU)(z[0], z[1]), (z,))
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("things", [EACH, CLASSES], ids=["simclr", "supcon"])
def test_parts_of_a_batch(things: torch.Tensor) -> None:
    """The mean over processes is the loss of the whole, and so are its gradients."""
    (z,) = embeddings((V, B, D))
    whole = value_and_gradients(lambda z: nt_xent(z, z, things, things, 0, TAU), (z,))

    def parts(z: torch.Tensor) -> torch.Tensor:
        halves = (0, 2)
        return sum(nt_xent(z[:, h : h + 2], z, things[h : h + 2], things, h, TAU) for h in halves) / 2

    torch.testing.assert_close(value_and_gradients(parts, (z,)), whole, rtol=1e-12, atol=1e-14)


def test_queue() -> None:
    def loops(q: torch.Tensor, keys: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
        total = q.new_zeros(())
        for v in range(V):
            for b in range(B):
                own = (q[v, b] @ keys[b] / TAU).exp()
                total = total - (own / (own + sum((q[v, b] @ k / TAU).exp() for k in queue))).log()
        return total / (V * B)

    inputs = embeddings((V, B, D), (B, D), (K, D))
    check(lambda *x: queue_info_nce(*x, TAU), loops, *inputs)
    check_large(lambda *x: queue_info_nce(*x, TAU), *inputs)


def test_queue_equals_lightly() -> None:
    """lightly's loss with a memory bank, whose rows are the queue."""
    q, k, queue = embeddings((1, B, D), (B, D), (K, D))
    theirs = NTXentLoss(temperature=TAU, memory_bank_size=(K, D))
    theirs.memory_bank.bank = queue.clone()
    found = queue_info_nce(q, k, queue, TAU)
    torch.testing.assert_close(found, theirs(q[0], k), rtol=1e-12, atol=0)


def test_batch() -> None:
    """Algorithm 1 of MoCo v3: with two views, ctr(q1, k2) + ctr(q2, k1), each 2 tau times a cross-entropy."""

    def ctr(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        rows = [(q[i] @ k[i] / TAU).exp() / sum((q[i] @ other / TAU).exp() for other in k) for i in range(B)]
        return -2 * TAU * torch.stack(rows).log().mean()

    queries, keys = embeddings((2, B, D), (2, B, D))
    check(lambda q, k: batch_info_nce(q, k, 0, TAU), lambda q, k: ctr(q[0], k[1]) + ctr(q[1], k[0]), queries, keys)
    check_large(lambda q, k: batch_info_nce(q, k, 0, TAU), queries, keys)
    more, keys = embeddings((V, B, D), (2, B, D), seed=1)
    pairs = [ctr(more[q], keys[k]) for q in range(V) for k in range(2) if q != k]
    torch.testing.assert_close(batch_info_nce(more, keys, 0, TAU), 2 * sum(pairs) / len(pairs), rtol=1e-12, atol=0)
    halves = [batch_info_nce(more[:, h : h + 2], keys, h, TAU) for h in (0, 2)]
    torch.testing.assert_close(sum(halves) / 2, batch_info_nce(more, keys, 0, TAU), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="too few"):
        batch_info_nce(more[:1], keys[:1], 0, TAU)
