"""`selfsup eval retrieval`: do the images of a query's class come first? Mean average precision, and hits among the first."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup import dist
from selfsup.errors import UserError

from . import results
from .labelled import labelled_features
from .progress import Progress
from .settings import resolve
from .settings_scores import RetrievalSettings

_FIRST = (1, 5, 10)
_BYTES = 256 << 20


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Print the result, write it to `out` or RUN/eval/retrieval.json."""
    settings = resolve("retrieval", overrides)
    assert isinstance(settings, RetrievalSettings)
    found = labelled_features(target, settings, out, ("gallery", "query"))
    if not dist.is_main():
        return {}
    metrics, without = measure(*found.arrays())
    protocol = {
        "ranking": "cosine, of equal ones the lower index first; the whole gallery is ranked",
        "metric": "map: mean over queries of the average precision; hit_k: an image of the class among the first k",
        "queries_without_a_match": without,
        **found.protocol(settings.seed),
    }
    result = results.result("retrieval", found.target, metrics, protocol)
    results.save(result, found.target, out)
    results.show(result, out)
    return result


def measure(
    gallery: np.ndarray, labels: np.ndarray, queries: np.ndarray, truth: np.ndarray
) -> tuple[dict[str, float], int]:
    """({"map", "hit_1", ...}, queries left out because no image of the gallery [N, D] has their class)."""
    keep = np.isin(truth, labels)
    if not keep.any():
        raise UserError(f"retrieval: none of {len(truth)} queries has a class that the gallery holds")
    g = torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(gallery)), dim=1)
    q = torch.nn.functional.normalize(torch.from_numpy(np.ascontiguousarray(queries[keep])), dim=1)
    names, wanted = torch.from_numpy(labels), torch.from_numpy(truth[keep])
    precision, hits = [], []
    progress = Progress(len(q), "ranked queries")
    for some in torch.arange(len(q)).split(max(1, _BYTES // (24 * len(g)))):
        order = (q[some] @ g.T).sort(dim=1, descending=True, stable=True).indices
        right = names[order] == wanted[some, None]  # [q, N]
        precision.append(average_precision(right))
        hits.append(torch.stack([right[:, :k].any(dim=1) for k in _FIRST], dim=1))
        progress.advance(len(some))
    progress.close()
    shares = torch.cat(hits).double().mean(dim=0).tolist()
    metrics = {"map": float(torch.cat(precision).mean()), **{f"hit_{k}": share for k, share in zip(_FIRST, shares)}}
    return metrics, int((~keep).sum())


def average_precision(right: Tensor) -> Tensor:
    """float64 [Q] of rankings bool [Q, N] with at least one hit each: the mean precision at the places of the hits."""
    found = right.double().cumsum(dim=1)
    places = torch.arange(1, right.shape[1] + 1)
    return (found / places * right).sum(dim=1) / found[:, -1]
