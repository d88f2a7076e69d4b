"""RankMe: against its definition, and where its value is known."""

import numpy as np
import pytest

from selfsup.eval.rank import rankme


def test_definition() -> None:
    z = np.random.default_rng(0).normal(size=(200, 24)).astype(np.float32) * np.linspace(0.01, 2, 24, dtype=np.float32)
    s = np.linalg.svd(z.astype(np.float64), compute_uv=False)
    p = s / s.sum() + 1e-7
    assert rankme(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    assert rankme(z[:10]) == pytest.approx(rankme(z[:10].T), rel=1e-6) and rankme(z[:10]) <= 10.01


def test_known_values() -> None:
    assert rankme(np.eye(16, dtype=np.float32)) == pytest.approx(16, rel=1e-4)
    assert rankme(np.ones((100, 16), dtype=np.float32)) == pytest.approx(1, abs=1e-3)
    assert rankme(np.zeros((100, 16), dtype=np.float32)) == 1


def test_a_part_of_many() -> None:
    z = np.random.default_rng(1).normal(size=(4000, 8)).astype(np.float32)
    assert rankme(z, most=500) == pytest.approx(rankme(z), rel=0.01)
