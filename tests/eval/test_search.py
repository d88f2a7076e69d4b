"""Exact neighbours: faiss and torch against brute force, ties, odd sizes, threads, import orders."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from selfsup.errors import UserError
from selfsup.eval import search
from selfsup.eval.search import neighbours

_spec = importlib.util.spec_from_file_location("brute_force", Path(__file__).with_name("brute_force.py"))
brute_force = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(brute_force)

BACKENDS = ["faiss", "torch"]


def expected(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [brute_force.nearest(bank, q, k) for q in queries]
    return torch.tensor(np.stack([p[0] for p in pairs])), torch.tensor(np.stack([p[1] for p in pairs]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 10, 20, 200, 600])
def test_golden(backend: str, k: int):
    golden = np.load(Path(__file__).with_name("golden_features.npz"))
    found = neighbours(golden["bank"], golden["queries"], k, backend=backend)
    similarities, indices = expected(golden["bank"], golden["queries"], k)
    assert torch.equal(found.indices, indices)
    assert (found.similarities - similarities).abs().max() <= 2.0**-31


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 17, 99, 100])
def test_tiny_banks(backend: str, n: int):
    rng = np.random.default_rng(n)
    bank, queries = rng.normal(size=(n, 5)).astype("f"), rng.normal(size=(4, 5)).astype("f")
    found = neighbours(bank, queries, 200, backend=backend)
    similarities, indices = expected(bank, queries, n)
    assert torch.equal(found.indices, indices) and (found.similarities - similarities).abs().max() <= 2.0**-31


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_features(backend: str):
    """A collapsed backbone: every similarity is a tie, so the first k rows are the neighbours."""
    found = neighbours(np.full((500, 8), 0.37, dtype="f"), np.full((70, 8), 0.37, dtype="f"), 20, backend=backend)
    assert torch.equal(found.indices, torch.arange(20).expand(70, -1))
    assert found.repeated == 70
    assert (found.similarities - 1).abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_chunks(backend: str, monkeypatch: pytest.MonkeyPatch):
    """A bank and queries of several chunks, with duplicates that lie in different ones."""
    for name, value in (("_BANK_CHUNK", 37), ("_QUERY_CHUNK", 5), ("_CANDIDATE_BYTES", 3000)):
        monkeypatch.setattr(search, name, value)
    rng = np.random.default_rng(0)
    bank = np.round(rng.normal(size=(400, 6)) * 4).astype("f")
    bank[100:160] = bank[7]
    queries = np.concatenate([bank[::20], np.round(rng.normal(size=(13, 6)) * 4).astype("f")])
    found = neighbours(bank, queries, 30, backend=backend)
    assert torch.equal(found.indices, expected(bank, queries, 30)[1])
    assert found.repeated > 0


def test_memory_mapped_and_no_queries(tmp_path: Path):
    bank = np.random.default_rng(0).normal(size=(50, 4)).astype("f")
    np.save(tmp_path / "bank.npy", bank)
    mapped = np.load(tmp_path / "bank.npy", mmap_mode="r")
    assert torch.equal(neighbours(mapped, mapped[:9], 5).indices, neighbours(bank, bank[:9], 5).indices)
    for backend in BACKENDS:
        assert neighbours(mapped, mapped[:0], 5, backend=backend).indices.shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_near_ties(backend: str):
    """Similarities that float32 cannot tell apart are ordered as float64 orders them."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=(1, 64))
    bank = (base + 2e-4 * rng.normal(size=(3000, 64))).astype("f")
    queries = (base + 2e-4 * rng.normal(size=(3, 64))).astype("f")
    found = neighbours(bank, queries, 20, backend=backend)
    assert torch.equal(found.indices, expected(bank, queries, 20)[1])


def test_refusals():
    good = np.ones((3, 4), dtype="f")
    bad = good.copy()
    bad[1, 2] = np.nan
    for bank, queries, k, words in [
        (good[:0], good, 1, "no image"),
        (good, good[:, :3], 1, "one width"),
        (good, good, 0, "k=0"),
        (bad, good, 1, "row 1 of the bank"),
        (good, bad, 1, "row 1 of the queries"),
    ]:
        with pytest.raises(UserError, match=words):
            neighbours(bank, queries, k)


def test_without_faiss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # an import of it now fails
    bank = np.eye(6, dtype="f")
    assert neighbours(bank, bank, 2).backend.startswith("torch")
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        neighbours(bank, bank, 2, backend="faiss")


_THREADS = """
{imports}
import numpy as np
from selfsup.eval.search import neighbours
torch.set_num_threads(2)
before = torch.get_num_threads(), faiss.omp_get_max_threads()
rng = np.random.default_rng(0)
found = neighbours(rng.normal(size=(3000, 32)).astype("f"), rng.normal(size=(100, 32)).astype("f"), 20, backend="faiss")
assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == before and before[0] == 2, before
x = torch.randn(64, 64, requires_grad=True)
(x @ x).sum().backward()
print(found.indices.sum().item(), found.backend)
"""


@pytest.mark.parametrize("imports", ["import torch\nimport faiss", "import faiss\nimport torch"])
def test_import_orders_and_threads(imports: str):
    """Both orders work in a fresh process, and a search leaves both thread counts alone."""
    code = _THREADS.format(imports=imports)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "faiss" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_cuda():
    golden = np.load(Path(__file__).with_name("golden_features.npz"))
    before = torch.get_float32_matmul_precision()
    found = neighbours(golden["bank"], golden["queries"], 200, device="cuda")
    assert torch.equal(found.indices, expected(golden["bank"], golden["queries"], 200)[1])
    assert found.backend.startswith("torch") and torch.get_float32_matmul_precision() == before


@pytest.fixture
def half(monkeypatch: pytest.MonkeyPatch):
    """bfloat16 candidates wherever the bank is large enough, with blocks that small banks have enough of."""
    from selfsup.eval import candidates

    monkeypatch.setattr(search, "pays", lambda threads: True)
    monkeypatch.setattr(candidates, "BLOCK", 4)


@pytest.mark.parametrize("chunk", [64, 333, 65_536])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_half_precision_candidates_are_exact(half, monkeypatch: pytest.MonkeyPatch, chunk: int, k: int):
    """Clustered features, duplicates and a shared mean: the same neighbours and bits as float32 candidates give."""
    monkeypatch.setattr(search, "_BANK_CHUNK", max(chunk, 16 * k))
    rng = np.random.default_rng(chunk + k)
    centres = rng.normal(size=(9, 48))
    bank = (centres[rng.integers(9, size=2000)] + 0.3 * rng.normal(size=(2000, 48)) + 0.5).astype("f") * 7
    bank[500:540] = bank[3]
    bank[77] = 0
    queries = np.concatenate([bank[:60], rng.normal(size=(40, 48)).astype("f"), np.zeros((1, 48), "f")])
    found = neighbours(bank, queries, k)
    assert found.backend.endswith("bfloat16")
    other = neighbours(bank, queries, k, backend="faiss")
    assert torch.equal(found.indices, other.indices) and torch.equal(found.similarities, other.similarities)
    assert torch.equal(found.indices, expected(bank, queries, k)[1])


def test_half_precision_with_too_many_candidates(half):
    """A collapsed backbone: every row is a candidate, and the queries are searched in float64."""
    found = neighbours(np.full((500, 8), 0.37, dtype="f"), np.full((7, 8), 0.37, dtype="f"), 5)
    assert found.repeated == 7 and torch.equal(found.indices, torch.arange(5).expand(7, -1))


def test_a_collapsed_backbone_is_not_held_in_memory(half, monkeypatch: pytest.MonkeyPatch):
    """Of queries that every row is as near to, only as many candidates are kept as there may be; the others are exact."""
    from selfsup.eval import candidates

    rng = np.random.default_rng(0)
    rows = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(4000, 16))).float(), dim=1)
    rows[1000:] = rows[0]
    kept = []
    table = candidates._table
    monkeypatch.setattr(candidates, "_table", lambda found, *rest: kept.append(found) or table(found, *rest))
    monkeypatch.setattr(candidates, "_SEEN", 2)
    parts = [(start, rows[start : start + 500]) for start in range(0, 4000, 500)]
    found = candidates.candidates(iter(parts), torch.stack([rows[0], rows[500]]), 5, most=300)
    assert not found.complete[0] and sum(len(query) for query, _, _ in kept[0]) < 1500
    assert found.complete[1] and set((rows @ rows[500]).topk(5).indices.tolist()) <= set(found.indices[1].tolist())


def test_a_candidate_within_the_error_is_kept(half):
    """Rows whose order bfloat16 turns round are all candidates; without the two errors some of the nearest are lost."""
    from selfsup.eval.candidates import candidates

    rng = np.random.default_rng(0)
    base = rng.normal(size=(1, 64))
    rows = torch.from_numpy(base + 0.02 * rng.normal(size=(900, 64))).float()
    rows = torch.nn.functional.normalize(rows, dim=1)
    query = torch.nn.functional.normalize(torch.from_numpy(base).float(), dim=1)
    nearest = (rows.double() @ query[0].double()).topk(8).indices
    wrong = (rows.bfloat16() @ query[0].bfloat16()).float().topk(8).indices
    assert set(wrong.tolist()) != set(nearest.tolist())
    found = candidates(iter([(0, rows)]), query, 8, most=900)
    assert found.complete.all() and set(nearest.tolist()) <= set(found.indices[0].tolist())


def test_bfloat16_limits_are_never_above(half):
    """The limit in bfloat16 keeps every score at or above the one in float32, for either sign."""
    from selfsup.eval.candidates import _at_least

    score = torch.linspace(-1, 1, 4001).bfloat16()[None]
    for low in (-0.9, -0.3001, 0.0, 1e-3, 0.24999, 0.5, 0.7773):
        kept = _at_least(score, torch.tensor([low]))
        assert kept[score.float() >= low].all()
        assert not kept[score.float() < low - 0.01].any()
