"""Candidates for exact nearest neighbours from bfloat16 products, where a CPU does those much faster than float32.

Every row that may belong to a query's k nearest is found, with proof: the k-th largest of the maxima of blocks of scores is
at most the k-th largest score, and a score is at most `error` away from its cosine. So what scores more than two errors
below cannot be among the k nearest. The candidates are measured in float64 by `search`; the result is the same to the last
bit as without this module, which is why it may be chosen by a stopwatch.
"""

import time
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
"""Rows of the bank that give one maximum."""

_QUERIES = 256
_PIECE = 1024
_SEEN = 4
"""A query may have so many times `most` candidates before the last part of the bank has raised its limit."""
_PAYS = 1.5
_MANTISSA = 2.0**-9  # bfloat16 rounds by at most this part


class Candidates(NamedTuple):
    """Rows of the bank that may be among the k nearest."""

    indices: Tensor
    """int64 [Q, W], ascending; filled up with -1."""
    complete: Tensor
    """bool [Q]: False where there would be more than W."""


@lru_cache(maxsize=4)
def pays(threads: int) -> bool:
    """Whether bfloat16 matrix products take at most 1 / 1.5 of the time of float32 here. A few milliseconds, once."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(256, 384, dtype=dtype), torch.ones(384, 4096, dtype=dtype)
        best = float("inf")
        for _ in range(4):
            began = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - began)
            if best > 0.1:  # no kernel of its own
                break
        seconds[dtype] = best
    return seconds[torch.bfloat16] * _PAYS <= seconds[torch.float32]


def enough(rows: int, k: int) -> bool:
    """Whether a bank is large enough for the maxima of its blocks to tell anything about its k largest scores."""
    return rows >= 4 * k * BLOCK


def candidates(parts: Iterator[tuple[int, Tensor]], queries: Tensor, k: int, most: int) -> Candidates:
    """At most `most` candidates for the k nearest of each query.

    parts: (first row, rows of length 1, float32 [n, D]) in order; the first holds at least k blocks. queries: [Q, D] of length 1.
    """
    q = queries.bfloat16()
    q_off = (queries - q.float()).norm(dim=1)  # [Q]
    top = torch.full((len(q), k), -torch.inf)
    low, bank_off = torch.empty(len(q)), torch.zeros(())
    count = torch.zeros(len(q), dtype=torch.int64)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, rows in parts:
        b, off = _rounded(rows)
        # |<q, b> - <q', b'>| <= |q - q'| |b| + |q'| |b - b'|, then sums of D products in float32, and the result's rounding
        bank_off = torch.maximum(bank_off, off)
        error = 1.01 * (q_off + bank_off) + (rows.shape[1] + 32) * 2.0**-23  # [Q]
        for place in range(0, len(q), _QUERIES):
            here = slice(place, place + _QUERIES)
            score = q[here] @ b.T  # [q, n]
            best = torch.cat([top[here], _maxima(score).float()], dim=1)
            top[here] = best.topk(k, dim=1, sorted=False).values
            kth = top[here].amin(1)
            low[here] = kth - 2 * (error[here] + 1.01 * _MANTISSA * kth.abs())
            flat = np.flatnonzero(_at_least(score, low[here]).numpy())
            query, row = np.divmod(flat, len(b))
            count[here] += torch.from_numpy(np.bincount(query, minlength=len(score)))
            if bool((count[here] > _SEEN * most).any()):  # all alike, as of a collapsed backbone: not held in memory
                few = (count[here] <= _SEEN * most).numpy()[query]
                flat, query, row = flat[few], query[few], row[few]
            reached = score.view(-1)[torch.from_numpy(flat)].float()
            found.append((torch.from_numpy(query + place), torch.from_numpy(row + start), reached))
    return _table(found, low, count <= _SEEN * most, most)


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """bfloat16 [n, D], and how far the row that lost most was moved; in pieces that stay in a cache."""
    out, off = torch.empty(rows.shape, dtype=torch.bfloat16), torch.zeros(())
    for x, y in zip(rows.split(_PIECE), out.split(_PIECE)):
        y.copy_(x)
        off = torch.maximum(off, (x - y).norm(dim=1).max())
    return out, off


def _maxima(score: Tensor) -> Tensor:
    """Of blocks of the columns of [q, n]: a block is every whole-th column; the columns that are left over are blocks."""
    whole = score.shape[1] // BLOCK
    x = score[:, : whole * BLOCK].view(len(score), BLOCK, whole)
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = torch.maximum(x[:, :half], x[:, half:])
    return torch.cat([x[:, 0], score[:, whole * BLOCK :]], dim=1)


def _at_least(score: Tensor, low: Tensor) -> Tensor:
    """bool [q, n]: bfloat16 scores [q, n] at or above float32 limits [q], or a little below."""
    limit = torch.nextafter(low.bfloat16(), torch.tensor(-torch.inf, dtype=torch.bfloat16))[:, None]
    if bool((limit > 0).all()):  # then the bits are in the order of the numbers, and whole numbers compare faster
        return score.view(torch.int16) >= limit.view(torch.int16)
    return score >= limit


def _table(found: list[tuple[Tensor, Tensor, Tensor]], low: Tensor, held: Tensor, most: int) -> Candidates:
    """Those that still reach the final limits, a row a query."""
    query, row, score = (torch.cat([piece[i] for piece in found]) for i in range(3))
    kept = score >= low[query]
    query, row = query[kept], row[kept]
    query, order = query.sort(stable=True)  # pieces come in the order of the bank, so rows ascend
    row = row[order]
    count = torch.bincount(query, minlength=len(low))
    place = torch.arange(len(query)) - (count.cumsum(0) - count)[query]
    complete = held & (count <= most)
    width = int(count[complete].max()) if bool(complete.any()) else 1
    fits = complete[query]
    indices = torch.full((len(low), width), -1)
    indices[query[fits], place[fits]] = row[fits]
    return Candidates(indices, complete)
