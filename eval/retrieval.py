"""`selfsup eval retrieval`: do the images of a query's class come first? Mean average precision, and hits among the first."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup import dist
from selfsup.errors import UserError

from . import results
from .datasets import labelled_only, open_pair
from .features import extract, transform_for
from .poolings import Request
from .progress import Progress
from .settings import resolve
from .settings_scores import RetrievalSettings
from .targets import open_target

_FIRST = (1, 5, 10)
_BYTES = 256 << 20


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Print the result, write it to `out` or RUN/eval/retrieval.json."""
    settings = resolve("retrieval", overrides)
    assert isinstance(settings, RetrievalSettings)
    results.check_destination(out)
    opened = open_target(target, device=settings.device)
    pair, left_out = labelled_only(open_pair(opened, settings))
    request = Request(settings.pooling, settings.layer)
    transform = transform_for(opened, pair.train, settings)
    gallery = extract(opened, pair.train, settings, [request], transform, what="gallery features")
    queries = extract(opened, pair.val, settings, [request], transform, what="query features")
    if not dist.is_main():
        return {}
    readable = gallery.readable(request), queries.readable(request)
    metrics, without = measure(
        np.asarray(gallery.array(request))[readable[0]], pair.train_labels[readable[0]],
        np.asarray(queries.array(request))[readable[1]], pair.val_labels[readable[1]],
    )  # fmt: skip
    protocol = {
        "ranking": "cosine, of equal ones the lower index first; the whole gallery is ranked",
        "metric": "map: mean over queries of the average precision; hit_k: an image of the class among the first k",
        "queries_without_a_match": without,
        "pooling": request.pooling,
        "layer": request.layer,
        "unlabelled_left_out": left_out,
        "unreadable_left_out": {"train": int((~readable[0]).sum()), "val": int((~readable[1]).sum())},
        **gallery.protocol,
        **pair.protocol,
        "seed": settings.seed,
        "versions": results.versions(),
    }
    result = results.result("retrieval", opened, metrics, protocol)
    results.save(result, opened, out)
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
