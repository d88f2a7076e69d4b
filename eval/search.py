"""Exact nearest neighbours by cosine similarity: the one module that imports faiss (after torch), or torch alone.

What "the k nearest" means is fixed, so that faiss, torch and a brute-force computation agree to the last neighbour:
similarities are cosines in float64, rounded to a multiple of 2^-32 (float32 resolves 2^-24); equal ones rank by lower
bank index. The search itself runs in float32 on a few more candidates than asked for (or, where a CPU is much faster at
that, in bfloat16 on as many as its rounding makes necessary: see `candidates`); those are measured again in float64. A query
whose extra candidates do not prove that nothing was missed (many duplicates at the edge) is searched again in float64.
"""

import contextlib
import importlib
import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfsup.errors import UserError

from .candidates import candidates, enough, pays

Backend = Literal["auto", "faiss", "torch"]

_ROUND = 2.0**32
_CANDIDATE_BYTES = 2 << 20  # about a second-level cache
_BANK_CHUNK = 65_536
_NORM_CHUNK = 256
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
    b, q = _tensor(bank), _tensor(queries)
    b_norms, q_norms = _norms(b, "bank"), _norms(q, "queries")
    unit_queries, parts = _unit(q, q_norms), _parts(b, b_norms)
    how = _resolve(backend, device, len(bank), k) if len(queries) else "torch"
    if how == "bfloat16":
        found, proven = candidates(parts, unit_queries, k, most=4 * k + 256)
        name = f"torch {torch.__version__}, candidates in bfloat16"
    else:
        wide = min(len(bank), k + max(16, k // 8))
        if how == "faiss":
            faiss = _faiss()
            scores, found = _search_faiss(faiss, parts, unit_queries, wide)
            name = f"faiss {faiss.__version__}"
        else:
            scores, found = _search_torch(parts, unit_queries, wide, torch.device(device))
            name = f"torch {torch.__version__}"
        found = found.sort(dim=1).values
    similarities, indices = _measure(b, b_norms, q, q_norms, found)
    if how != "bfloat16":
        # A row outside the candidates scored at most the last candidate; float32 is off by at most `slack`.
        slack = (bank.shape[1] + 8) * 2.0**-24
        proven = (
            scores[:, -1].double() + slack < similarities[:, k - 1]
            if wide < len(bank)
            else torch.ones(len(queries)) > 0
        )
    if similarities.shape[1] < k:  # no query's candidates are complete
        similarities, indices = similarities.new_zeros(len(queries), k), indices.new_zeros(len(queries), k)
    unproven = (~proven).nonzero()[:, 0]
    for rows in unproven.split(64) if len(unproven) else ():
        similarities[rows, :k], indices[rows, :k] = _search_float64(b, b_norms, q[rows], q_norms[rows], k)
    return Neighbours(similarities[:, :k].contiguous(), indices[:, :k].contiguous(), name, len(unproven))


def have_faiss() -> bool:
    """Whether faiss can be imported."""
    try:
        _faiss()
    except ImportError:
        return False
    return True


def _faiss() -> Any:
    return importlib.import_module("faiss")  # torch is imported above: that order is the safe one


def _resolve(backend: Backend, device: str | torch.device, rows: int, k: int) -> str:
    """'faiss', 'torch' or 'bfloat16': all of them give the same neighbours."""
    if backend == "faiss" and not have_faiss():
        raise UserError("backend=faiss: faiss cannot be imported; pip install faiss-cpu, or backend=torch")
    on_cpu = torch.device(device).type == "cpu"
    if backend != "faiss" and on_cpu and enough(min(rows, _BANK_CHUNK), k) and pays(torch.get_num_threads()):
        return "bfloat16"
    if backend == "auto":
        return "faiss" if on_cpu and have_faiss() else "torch"
    return backend


# ----------------------------------------------------------------------------------------------------------- length 1


def _tensor(array: np.ndarray) -> Tensor:
    """The same memory, which nobody writes to: a memory-mapped file may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))


def _norms(features: Tensor, what: str) -> Tensor:
    """float64 [N], at least 1e-12. Raises UserError for values that are not finite."""
    out = torch.empty(len(features), dtype=torch.float64)  # filled in place: small results between large ones hold memory
    for start in range(0, len(features), _NORM_CHUNK):
        out[start : start + _NORM_CHUNK] = _length(features[start : start + _NORM_CHUNK])
    if not out.isfinite().all():
        row = int((~out.isfinite()).nonzero()[0])
        raise UserError(f"features: row {row} of the {what} holds NaN or infinity; finite values are needed")
    return out


def _length(rows: Tensor) -> Tensor:
    return rows.double().square().sum(dim=-1).sqrt_().clamp_min_(1e-12)


def _unit(rows: Tensor, norms: Tensor) -> Tensor:
    """Rows scaled to length 1, float32."""
    if norms.numel() and norms.max() > 1e37:  # float32 has no such reciprocals
        return (rows.double() / norms[:, None]).float()
    return rows.float() * (1 / norms[:, None]).float()


def _parts(bank: Tensor, norms: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of length 1), chunk by chunk."""
    for start in range(0, len(bank), _BANK_CHUNK):
        here = slice(start, start + _BANK_CHUNK)
        yield start, _unit(bank[here], norms[here])


# -------------------------------------------------------------------------------------------------- float32 candidates


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


def _search_faiss(faiss: Any, parts: Iterator[tuple[int, Tensor]], queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    with _same_threads(faiss):
        index = faiss.IndexFlatIP(queries.shape[1])
        for _, part in parts:
            index.add(part.numpy())
        scores, found = index.search(queries.numpy(), k)
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


def _search_torch(
    parts: Iterator[tuple[int, Tensor]], queries: Tensor, k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The same without faiss: the bank passes once, a running top k [Q, k] is kept; memory is linear in N and in Q."""
    q = queries.to(device)
    best = torch.full((len(q), k), -math.inf, device=device)
    index = torch.zeros((len(q), k), dtype=torch.int64, device=device)
    with _full_float32():
        for start, part in parts:
            b = part.to(device)
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


def _measure(bank: Tensor, b_norms: Tensor, queries: Tensor, q_norms: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates [Q, m], ascending and filled up with -1, measured in float64 and put in order: similarity descending,
    then index ascending, then what was filled up."""
    similarities = torch.full(found.shape, -math.inf, dtype=torch.float64)
    chunk = max(1, torch.get_num_threads() * _CANDIDATE_BYTES // (12 * bank.shape[1] * max(1, found.shape[1])))
    count = (found >= 0).sum(dim=1)
    for some in count.argsort().split(chunk):  # queries with about as many candidates
        most = int(count[some[-1]]) if len(some) else 0
        rows = found[some, :most].clamp_min(0)  # [c, m]
        b = bank.index_select(0, rows.flatten()).double().view(*rows.shape, bank.shape[1])  # [c, m, D]
        # not a matrix product: row by row the same order of sums, so that equal images are equal to the last bit
        dots = b.mul_(queries[some].double()[:, None]).sum(dim=2)  # [c, m]
        similarities[some, :most] = _round(dots.div_(b_norms[rows]).div_(q_norms[some, None]))
    similarities.masked_fill_(found < 0, -math.inf)
    similarities, order = similarities.sort(dim=1, descending=True, stable=True)
    return similarities, found.gather(1, order)


def _search_float64(bank: Tensor, b_norms: Tensor, queries: Tensor, q_norms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every bank row in float64, for a few queries: a running top k by the rule of this module."""
    q = queries.double() / q_norms[:, None]
    best = torch.empty(len(q), 0, dtype=torch.float64)
    index = torch.empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(bank), _BANK_CHUNK):
        here = slice(start, start + _BANK_CHUNK)
        cosine = _round(q @ (bank[here].double() / b_norms[here, None]).T)  # [q, chunk]
        names = torch.arange(start, start + cosine.shape[1]).expand(len(q), -1)
        # earlier chunks come first and hold lower indices, so a stable sort keeps the rule
        best, order = torch.cat([best, cosine], dim=1).sort(dim=1, descending=True, stable=True)
        index = torch.cat([index, names], dim=1).gather(1, order)[:, :k]
        best = best[:, :k]
    return best, index
