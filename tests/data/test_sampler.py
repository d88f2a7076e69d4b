"""The order of samples: complete, random, known anywhere; and how a batch is divided."""

import numpy as np
import pytest

from selfsup.data.sampler import Order, step_positions
from selfsup.errors import UserError


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 100, 255, 256, 257, 5000])
def test_each_epoch_visits_everything_once(n):
    epochs, indices = Order(n, seed=3).at(np.arange(3 * n))
    assert (epochs == np.repeat([0, 1, 2], n)).all()
    for epoch in range(3):
        assert sorted(indices[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_looked_up_alone_or_together_in_any_order():
    order = Order(1000, seed=5)
    p = np.random.default_rng(0).permutation(3000)
    together = order.at(p)
    alone = [order.at(np.array([q])) for q in p[:200]]
    assert [int(e[0]) for e, _ in alone] == together[0][:200].tolist()
    assert [int(i[0]) for _, i in alone] == together[1][:200].tolist()
    assert (order.at(p.reshape(3, -1))[1] == together[1].reshape(3, -1)).all()


def test_epochs_and_seeds_differ():
    n = 2000
    first, second = Order(n, 0).at(np.arange(2 * n))[1].reshape(2, n)
    other = Order(n, 1).at(np.arange(n))[1]
    for a, b in ((first, second), (first, other)):
        assert (a == b).sum() < 12  # expected 1 fixed point; Poisson
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.1  # neighbours are not neighbours


@pytest.mark.parametrize("n", [3, 7, 50])
def test_every_place_is_uniform(n):
    """Chi-square of (place, index) counts over many epochs."""
    epochs = 4000
    indices = Order(n, seed=11).at(np.arange(n * epochs))[1].reshape(epochs, n)
    counts = np.zeros((n, n))
    for place in range(n):
        counts[place] = np.bincount(indices[:, place], minlength=n)
    chi = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
    freedom = (n - 1) ** 2
    assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom) + 5


def test_all_orders_of_three_occur_equally():
    """The permutation as a whole, not only each place."""
    perms = Order(3, seed=2).at(np.arange(3 * 6000))[1].reshape(-1, 3)
    counts = np.unique(perms @ [9, 3, 1], return_counts=True)[1]
    assert len(counts) == 6 and np.abs(counts - 1000).max() < 150


def test_a_hundred_million_images_need_no_list():
    n = 100_000_007
    epochs, indices = Order(n, 0).at(np.array([0, 1, n - 1, n, 50 * n]))
    assert epochs.tolist() == [0, 0, 0, 1, 50]
    assert ((indices >= 0) & (indices < n)).all() and len(set(indices.tolist())) == 5


def test_empty_is_refused():
    with pytest.raises(UserError, match="0 images"):
        Order(0, 0)


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (1, 4), (4, 2), (3, 2)])
def test_parts_make_the_batch(world, accumulate):
    parts = [
        step_positions(9, micro, rank, global_batch=24, accumulate=accumulate, world=world)
        for micro in range(accumulate)
        for rank in range(world)
    ]
    assert np.concatenate(parts).tolist() == list(range(24))
    assert {len(p) for p in parts} == {24 // (world * accumulate)}


def test_a_world_that_does_not_divide_the_batch():
    with pytest.raises(UserError, match=r"global_batch=10 .* 4 rank.* multiple of 4, such as 8"):
        step_positions(0, 0, 0, global_batch=10, accumulate=1, world=4)
    with pytest.raises(UserError, match="such as 16"):
        step_positions(0, 0, 0, global_batch=10, accumulate=2, world=8)
