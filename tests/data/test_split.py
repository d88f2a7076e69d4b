"""The seeded stratified split."""

import numpy as np
import pytest

from selfsup.data.split import split
from selfsup.errors import UserError

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [100, 50, 10, 2]))


def test_every_class_is_split_alike():
    train, val = split(LABELS, 0.2, seed=0)
    assert sorted([*train, *val]) == list(range(len(LABELS)))
    assert np.bincount(LABELS[val]).tolist() == [20, 10, 2, 0, 0, 1]
    assert (np.diff(train) > 0).all() and (np.diff(val) > 0).all() and train.dtype == np.int64


def test_depends_on_the_seed_alone():
    again = split(LABELS.copy(), 0.2, seed=0)
    assert all((a == b).all() for a, b in zip(split(LABELS, 0.2, seed=0), again, strict=True))
    assert not np.array_equal(split(LABELS, 0.2, seed=1)[1], again[1])


def test_small_classes_and_unlabelled_images():
    train, val = split(np.array([0, 0, 1, -1, 2, 2, 2]), 0.2)
    assert 3 not in train and 3 not in val
    assert 2 in train  # the only one of its class
    assert len(val) == 2


def test_mistakes():
    with pytest.raises(UserError, match=r"fraction=1\.5"):
        split(LABELS, 1.5)
    with pytest.raises(UserError, match="cannot be split"):
        split(np.array([0, 1, 2]))
    with pytest.raises(UserError, match="cannot be split"):
        split(np.full(5, -1))
