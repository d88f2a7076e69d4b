"""Exact nearest neighbours by cosine similarity: the one module that imports faiss (after torch), or torch alone.

What "the k nearest" means is fixed, so that faiss, torch and a brute-force computation agree to the last neighbour:
similarities are cosines in float64, rounded to a multiple of 2^-32 (float32 resolves 2^-24); equal ones rank by lower
bank index. The search itself runs in float32 on a few more candidates than asked for; those are measured again in
float64. A query whose extra candidates do not prove that nothing was missed (many duplicates at the edge) is searched
again in float64.
"""

import contextlib
import importlib
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsup.errors import UserError

Backend = Literal["auto", "faiss", "torch"]

_ROUND = 2.0**32
_CANDIDATE_BYTES = 16 << 20
_BANK_CHUNK = 65_536
_QUERY_CHUNK = 1_024


class Neighbours(NamedTuple):
    """The nearest bank rows of every query, nearest first."""

    similarities: Tensor
    """Cosines, float64 [Q, k]."""
    indices: Tensor
    """Rows of the bank, int64 [Q, k]."""
    backend: str
    """What searched: 'faiss <version>' or 'torch <version>'."""
    repeated: int
    """Queries that had to be searched again in float64."""


def neighbours(
    bank: np.ndarray, queries: np.ndarray, k: int, *, backend: Backend = "auto", device: str | torch.device = "cpu"
) -> Neighbours:
    """The k nearest rows of `bank` [N, D] for each row of `queries` [Q, D], both float32 (memory-mapped or not).

    k is clipped to N. A row of zeros has similarity 0 to everything. `auto` is torch on an accelerator and faiss on a
    CPU if it is installed. Raises UserError for an empty bank, other widths, or values that are not finite.
    """
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise UserError(f"features: bank and queries of one width are needed; seen {bank.shape} and {queries.shape}")
    if len(bank) == 0:
        raise UserError("features: the bank holds no image; at least one labelled training image is needed")
    if k < 1:
        raise UserError(f"k={k}: at least 1 neighbour is needed")
    k = min(k, len(bank))
    wide = min(len(bank), k + max(16, k // 8))
    unit_queries = np.concatenate([part for _, part in _unit(queries, "queries")] or [queries.astype(np.float32)])
    if _resolve(backend, device) == "faiss":
        faiss = _faiss()
        scores, found = _search_faiss(faiss, bank, unit_queries, wide)
        name = f"faiss {faiss.__version__}"
    else:
        scores, found = _search_torch(bank, unit_queries, wide, torch.device(device))
        name = f"torch {torch.__version__}"
    similarities, indices = _measure(bank, queries, found)
    repeated = 0
    if wide < len(bank):
        # A row outside the candidates scored at most the last candidate; float32 is off by at most `slack`.
        slack = (bank.shape[1] + 8) * 2.0**-24
        unproven = (scores[:, -1].double() + slack >= similarities[:, k - 1]).nonzero()[:, 0]
        repeated = len(unproven)
        for rows in unproven.split(64):
            similarities[rows, :k], indices[rows, :k] = _search_float64(bank, queries[rows.numpy()], k)
    return Neighbours(similarities[:, :k].contiguous(), indices[:, :k].contiguous(), name, repeated)


def have_faiss() -> bool:
    """Whether faiss can be imported."""
    try:
        _faiss()
    except ImportError:
        return False
    return True


def _faiss() -> Any:
    return importlib.import_module("faiss")  # torch is imported above: that order is the safe one


def _resolve(backend: Backend, device: str | torch.device) -> str:
    if backend == "faiss" and not have_faiss():
        raise UserError("backend=faiss: faiss cannot be imported; pip install faiss-cpu, or backend=torch")
    if backend == "auto":
        return "faiss" if torch.device(device).type == "cpu" and have_faiss() else "torch"
    return backend


# -------------------------------------------------------------------------------------------------- float32 candidates


def _unit(features: np.ndarray, what: str, chunk: int = _BANK_CHUNK) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows scaled to length 1 as float32), chunk by chunk."""
    for start in range(0, len(features), chunk):
        part = np.asarray(features[start : start + chunk], dtype=np.float64)
        norms = np.linalg.norm(part, axis=1, keepdims=True)
        if not np.isfinite(norms).all():
            row = start + int(np.flatnonzero(~np.isfinite(norms[:, 0]))[0])
            raise UserError(f"features: row {row} of the {what} holds NaN or infinity; finite values are needed")
        yield start, np.ascontiguousarray(part / np.maximum(norms, 1e-12), dtype=np.float32)


@contextlib.contextmanager
def _same_threads(faiss: Any) -> Iterator[None]:
    """faiss on as many threads as torch has, and both counts as before afterwards: they share OpenMP's setting."""
    torch_threads, faiss_threads = torch.get_num_threads(), faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch_threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(faiss_threads)
        torch.set_num_threads(torch_threads)


def _search_faiss(faiss: Any, bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    with _same_threads(faiss):
        index = faiss.IndexFlatIP(bank.shape[1])
        for _, part in _unit(bank, "bank"):
            index.add(part)
        if len(queries) == 0:
            return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
        scores, found = index.search(queries, k)
    return torch.from_numpy(scores), torch.from_numpy(found)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TF32 or bf16 inside float32 matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _search_torch(bank: np.ndarray, queries: np.ndarray, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same without faiss: the bank passes once, a running top k [Q, k] is kept; memory is linear in N and in Q."""
    q = torch.from_numpy(queries).to(device)
    best = torch.full((len(q), k), -math.inf, device=device)
    index = torch.zeros((len(q), k), dtype=torch.int64, device=device)
    with _full_float32():
        for start, part in _unit(bank, "bank"):
            b = torch.from_numpy(part).to(device)
            for rows in torch.arange(len(q), device=device).split(_QUERY_CHUNK):
                score, place = (q[rows] @ b.T).topk(min(k, len(b)), dim=1)
                both = torch.cat([best[rows], score], dim=1)  # [q, k + k]
                names = torch.cat([index[rows], place + start], dim=1)
                best[rows], order = both.topk(k, dim=1)
                index[rows] = names.gather(1, order)
    return best.cpu(), index.cpu()


# ------------------------------------------------------------------------------------------------------------- float64


def _round(similarities: Tensor) -> Tensor:
    return (similarities * _ROUND).round_() / _ROUND


def _norms(rows: Tensor) -> Tensor:
    return rows.norm(dim=-1).clamp_min(1e-12)


def _measure(bank: np.ndarray, queries: np.ndarray, found: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates [Q, m] measured in float64 and put in order: similarity descending, then index ascending."""
    found = found.sort(dim=1).values  # so that a stable sort below leaves equal ones by index
    similarities = torch.empty(found.shape, dtype=torch.float64)
    chunk = max(1, _CANDIDATE_BYTES // (12 * bank.shape[1] * max(1, found.shape[1])))
    for start in range(0, len(queries), chunk):
        rows = found[start : start + chunk]
        q = torch.from_numpy(np.asarray(queries[start : start + chunk], dtype=np.float64))  # [c, D]
        b = torch.from_numpy(np.asarray(bank[rows.numpy()])).double()  # [c, m, D]
        norms = _norms(b)
        # not a matrix product: row by row the same order of sums, so that equal images are equal to the last bit
        cosine = b.mul_(q[:, None]).sum(dim=2) / norms / _norms(q)[:, None]  # [c, m]
        similarities[start : start + chunk] = _round(cosine)
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return similarities, found.gather(1, order)


def _search_float64(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """Every bank row in float64, for a few queries: a running top k by the rule of this module."""
    q = torch.from_numpy(np.asarray(queries, dtype=np.float64))
    q = q / _norms(q)[:, None]
    best = torch.empty(len(q), 0, dtype=torch.float64)
    index = torch.empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(bank), _BANK_CHUNK):
        b = torch.from_numpy(np.asarray(bank[start : start + _BANK_CHUNK], dtype=np.float64))
        cosine = _round(q @ (b / _norms(b)[:, None]).T)  # [q, chunk]
        names = torch.arange(start, start + len(b)).expand(len(q), -1)
        # earlier chunks come first and hold lower indices, so a stable sort keeps the rule
        best, order = torch.cat([best, cosine], dim=1).sort(dim=1, descending=True, stable=True)
        index = torch.cat([index, names], dim=1).gather(1, order)[:, :k]
        best = best[:, :k]
    return best, index
