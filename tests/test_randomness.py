"""Keyed random numbers: pure functions of their key, spread as they should be, and no one else's generator touched."""

import numpy as np
import torch

from selfsup.randomness import generator, keyed_integers, keyed_normal, keyed_uniform, mix


def test_mix_is_fixed() -> None:
    """Written out again with plain integers: a change would silently make every resumed run another one."""

    def expected(*parts: int) -> int:
        h = 0x9E3779B97F4A7C15
        for part in parts:
            h = ((h ^ (part % 2**64)) * 0xBF58476D1CE4E5B9) % 2**64
            h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) % 2**64
            h = h ^ (h >> 31)
        return h

    for key in [(), (0,), (0, 0), (1, 2, 3), (-1,), (2**63, 2**64 - 1), (2**70,)]:
        assert mix(*key) == expected(*key)
        assert 0 <= mix(*key) < 2**64


def test_mix_depends_on_order_number_and_every_part() -> None:
    keys = [mix(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    assert len(set(keys)) == 1000
    assert mix(1, 2) != mix(2, 1) and mix(0) != mix(0, 0) != mix()
    bits = np.array([[(mix(i) ^ mix(i + 1)) >> b & 1 for b in range(64)] for i in range(500)])
    assert abs(bits.mean() - 0.5) < 0.02  # neighbours differ in half of the bits
    assert (abs(bits.mean(0) - 0.5) < 0.12).all()


def test_generator_is_a_function_of_its_key() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    a, b, c = generator(1, 2), generator(1, 2), generator(2, 1)
    x, y, z = a.random(100), b.random(100), c.random(100)
    assert (x == y).all() and not (x == z).any()
    assert (np.random.get_state()[1] == before).all()


def test_keyed_uniform_equals_plain_integers() -> None:
    """int64 tensors wrap around; Python's integers do not: the same hash, step by step."""

    def expected(key: int, index: int) -> float:
        h = (index + key) * 0x9E3779B97F4A7C15 % 2**64
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB % 2**64
        h = h ^ (h >> 31)
        return (h >> 40) / 2**24

    indices = [0, 1, 2, 12345, 2**31, 2**62, -1, -(2**63)]
    for key in (0, 1, mix(3), 2**64 - 1):
        found = keyed_uniform(key, torch.tensor(indices))
        assert found.dtype == torch.float32
        assert found.tolist() == [expected(key, i) for i in indices]


def test_keyed_uniform_is_uniform() -> None:
    n = 200_000
    u = keyed_uniform(mix(7), torch.arange(n)).double()
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    chi2 = ((counts - n / 50) ** 2 / (n / 50)).sum()
    assert chi2 < 90  # 49 degrees of freedom: 99.97 %
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.01
    other = keyed_uniform(mix(8), torch.arange(n)).double()
    assert abs(torch.corrcoef(torch.stack([u, other]))[0, 1]) < 0.01


def test_keyed_uniform_does_not_depend_on_the_batch() -> None:
    """Any shape, any split: the number of an index is its own; torch's generator is left alone."""
    before = torch.get_rng_state()
    index = torch.arange(1000)
    whole = keyed_uniform(5, index)
    assert torch.equal(torch.cat([keyed_uniform(5, part) for part in index.split(7)]), whole)
    assert torch.equal(keyed_uniform(5, index.reshape(10, 100)).reshape(-1), whole)
    assert torch.equal(keyed_uniform(5, index.flip(0)).flip(0), whole)
    assert torch.equal(torch.get_rng_state(), before)


def test_keyed_integers() -> None:
    """The 48 upper bits of the same hash, modulo the number of values."""
    index = torch.arange(1000).reshape(10, 100)
    bits = keyed_integers(5, index, 1 << 48)
    assert bits.dtype == torch.int64 and bits.min() >= 0
    assert torch.equal((bits >> 24).float() / (1 << 24), keyed_uniform(5, index))
    assert torch.equal(keyed_integers(5, index, 1_281_167), bits % 1_281_167)


def test_keyed_normal() -> None:
    """Standard normal, finite, a function of key and index."""
    x = keyed_normal(7, torch.arange(200_000))
    assert x.dtype == torch.float32 and x.isfinite().all() and torch.equal(x[5:9], keyed_normal(7, torch.arange(5, 9)))
    assert abs(x.mean()) < 0.01 and abs(x.var() - 1) < 0.02 and abs((x**4).mean() - 3) < 0.1
    assert abs((x.abs() > 1.96).float().mean() - 0.05) < 0.003
    assert not torch.equal(x, keyed_normal(8, torch.arange(200_000)))
