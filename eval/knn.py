"""Weighted k-NN with DINO's vote (Wu et al., 2018, section 3.4; `eval_knn.py` of Caron et al., 2021).

Each of the k nearest bank images votes for its class with weight exp(cosine / T); the class with the most votes wins.
One exact search at the largest k serves every k and T.

Ties: neighbours of equal similarity rank by lower bank index (see `search`); votes are compared after rounding to
2^-30 of the largest, and of equal ones the lower class wins. A class without any vote is never a hit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup import dist
from selfsup.errors import UserError

from . import results
from .datasets import LabelledPair, labelled_only, open_pair
from .features import extract, transform_for
from .poolings import Request
from .rank import rankme
from .search import Backend, neighbours
from .settings import KnnSettings, resolve
from .targets import Target, open_target

_VOTE_ROUND = 2.0**30
_VOTE_BYTES = 64 << 20


def vote(similarities: Tensor, neighbour_labels: Tensor, classes: int, k: int, temperature: float) -> Tensor:
    """Classes in the order of their votes.

    similarities: float [Q, K] with K >= k, nearest first. neighbour_labels: int64 [Q, K] in 0..classes-1.
    Returns int64 [Q, min(5, classes)], best class first; -1 where fewer classes than that received a vote.
    Memory: chunks of queries by `classes`, so nothing grows with Q x classes.
    """
    sims = similarities[:, :k].double()
    names = neighbour_labels[:, :k]
    ranked = torch.empty(len(sims), min(5, classes), dtype=torch.int64, device=sims.device)
    chunk = max(1, _VOTE_BYTES // (8 * classes))
    for start in range(0, len(sims), chunk):
        s, n = sims[start : start + chunk], names[start : start + chunk]
        # exp((s - max) / T) differs from DINO's exp(s / T) by one factor a query: same order, no overflow at small T
        weights = ((s - s[:, :1]) / temperature).exp()
        votes = torch.zeros(len(s), classes, dtype=torch.float64, device=s.device).scatter_add_(1, n, weights)
        got = torch.zeros(len(s), classes, dtype=torch.bool, device=s.device).scatter_(1, n, True)
        rounded = votes.div_(votes.amax(dim=1, keepdim=True)).mul_(_VOTE_ROUND).round_().long()
        # one number for "more votes, then the lower class"; no two are equal, so a partial sort has one answer
        key = rounded.mul_(classes).add_(torch.arange(classes - 1, -1, -1, device=s.device)).masked_fill_(~got, -1)
        best = key.topk(ranked.shape[1], dim=1).values
        ranked[start : start + chunk] = (classes - 1 - best % classes).masked_fill_(best < 0, -1)
    return ranked


def accuracy(ranked: Tensor, labels: Tensor, k: int, classes: int) -> dict[str, float]:
    """top1, and with more than 5 classes top5 (the first min(5, k) classes, as in DINO), as fractions of 1."""
    hits = ranked == labels[:, None]
    metrics = {"top1": hits[:, 0].double().mean().item()}
    if classes > 5:
        metrics["top5"] = hits[:, : min(5, k)].any(dim=1).double().mean().item()
    return metrics


def classify(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    labels: np.ndarray,
    *,
    ks: Sequence[int] = (20,),
    temperatures: Sequence[float] = (0.07,),
    classes: int | None = None,
    backend: Backend = "auto",
    device: str | torch.device = "cpu",
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """k-NN accuracy for every k and T from one search.

    bank [N, D], queries [Q, D]: float32; labels: int64 [N], [Q]; rows with a negative label are left out. `classes`
    defaults to the largest label of both, plus one. Returns (settings, facts): one {"k", "temperature", "k_used",
    "top1", ...} for each pair, and what belongs in the protocol. Raises UserError if either side has no label.
    """
    bank, bank_labels, unlabelled_bank = _labelled(bank, bank_labels, "train")
    queries, labels, unlabelled = _labelled(queries, labels, "val")
    classes = classes or int(max(bank_labels.max(), labels.max())) + 1
    found = neighbours(bank, queries, max(ks), backend=backend, device=device)
    near = torch.from_numpy(bank_labels)[found.indices]  # [Q, k]
    truth = torch.from_numpy(labels)
    settings = []
    for k in ks:
        for temperature in temperatures:
            used = min(k, len(bank))
            ranked = vote(found.similarities, near, classes, used, temperature)
            row = {"k": k, "temperature": temperature, "k_used": used, **accuracy(ranked, truth, used, classes)}
            settings.append(row)
    facts = {
        "search": found.backend,
        "searched_again_in_float64": found.repeated,
        "bank_images": len(bank),
        "val_images": len(queries),
        "unlabelled_left_out": {"train": unlabelled_bank, "val": unlabelled},
        "classes": classes,
        "val_classes_not_in_train": len(np.setdiff1d(labels, bank_labels)),
    }
    clipped = [k for k in ks if k > len(bank)]
    if clipped:
        facts["note"] = f"k={', '.join(map(str, clipped))} clipped to the bank's {len(bank)} images"
    return settings, facts


def _labelled(features: np.ndarray, labels: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray, int]:
    labels = np.asarray(labels, dtype=np.int64)
    if len(labels) != len(features):
        raise UserError(f"{what}: {len(features)} feature rows but {len(labels)} labels; one label a row is needed")
    keep = labels >= 0
    if not keep.any():
        raise UserError(f"{what}: none of {len(labels)} images has a label; give class folders or a labelled list")
    if keep.all():
        return features, labels, 0
    return np.ascontiguousarray(features[keep]), labels[keep], int((~keep).sum())


# ------------------------------------------------------------------------------------------------------------ the verb


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """`selfsup eval knn TARGET`: print the result, write it to `out` or RUN/eval/knn*.json. Ranks but 0 return {}."""
    result = evaluate_quietly(target, overrides, out)
    results.show(result, out)
    return result


def evaluate_quietly(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """The same without printing the table."""
    settings = resolve("knn", overrides)
    assert isinstance(settings, KnnSettings)
    results.check_destination(out)
    return evaluate(open_target(target, device=settings.device), settings, out)


def evaluate(
    target: Target,
    settings: KnnSettings,
    out: Path | None = None,
    pair: LabelledPair | None = None,
    scratch: Path | None = None,
) -> dict[str, Any]:
    """The same for an opened target (and, if given, opened data); `scratch` as in `features.extract`."""
    pair, left_out = labelled_only(pair or open_pair(target, settings))
    request = Request(settings.pooling, settings.layer)
    transform = transform_for(target, pair.train, settings)
    bank = extract(target, pair.train, settings, [request], transform, what="train features", scratch=scratch)
    queries = extract(target, pair.val, settings, [request], transform, what="val features", scratch=scratch)
    if not dist.is_main():
        return {}
    readable = bank.readable(request), queries.readable(request)
    rows, facts = classify(
        bank.array(request), np.where(readable[0], pair.train_labels, -1),
        queries.array(request), np.where(readable[1], pair.val_labels, -1),
        ks=settings.k, temperatures=settings.temperature, classes=pair.classes, backend=settings.backend, device=target.device,
    )  # fmt: skip
    first, features = rows[0], bank.array(request)
    protocol = {
        "k": first["k"],
        "temperature": first["temperature"],
        "pooling": request.pooling,
        "layer": request.layer,
        "vote": "exp(cosine / T), as DINO's eval_knn; neighbour ties by lower index, vote ties by lower class",
        "selected": "the first k and temperature given; nothing is chosen on val",
        **facts,
        "dimensions": features.shape[1],
        "rankme": rankme(features if readable[0].all() else features[readable[0]]),
        "unlabelled_left_out": left_out,
        "unreadable_left_out": {"train": int((~readable[0]).sum()), "val": int((~readable[1]).sum())},
        "top1_interval_95": results.interval(first["top1"], facts["val_images"]),
        **bank.protocol,
        **pair.protocol,
        "seed": settings.seed,
        "versions": results.versions(),
    }
    metrics: dict[str, float] = {str(key): first[key] for key in ("top1", "top5") if key in first}
    result = results.result("knn", target, metrics, protocol, rows)
    results.save(result, target, out)
    return result
