"""`selfsup eval duplicates`: pairs of images that are nearly the same to a backbone, listed and shown."""

from pathlib import Path
from typing import Any

import numpy as np

from selfsup import dist
from selfsup.errors import UserError

from . import results
from .canvas import INK, MUTED, bare, new_figure, save
from .features import Transform, extract, transform_for
from .poolings import Request
from .search import neighbours
from .settings import resolve
from .settings_scores import DuplicatesSettings
from .shown import Shown, beside, displayed, open_shown, read
from .targets import open_target

_LISTED, _PRINTED = 10_000, 20


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Print the pairs of highest cosine, write all (at most 10,000) to `out` or RUN/eval/duplicates.json, and a sheet."""
    settings = resolve("duplicates", overrides)
    assert isinstance(settings, DuplicatesSettings)
    results.check_destination(out)
    opened = open_target(target, device=settings.device)
    spec = settings.data.path or settings.eval.train or (opened.config.data.path if opened.config is not None else None)
    if spec is None:
        raise UserError(f"eval duplicates {target}: no images; give data=FOLDER")
    shown = open_shown(opened, settings, spec)
    transform = transform_for(opened, shown.images, settings)
    request = Request(settings.pooling, settings.layer)
    file = extract(opened, shown.images, settings, [request], transform, what="features")
    if not dist.is_main():
        return {}
    readable = np.flatnonzero(file.readable(request))
    features = np.asarray(file.array(request))
    features = features if len(readable) == len(features) else features[readable]
    found = neighbours(features, features, settings.k + 1, device=opened.device)
    pairs, full = pairs_of(found.indices.numpy(), found.similarities.numpy(), settings.threshold)
    pairs = [(int(readable[a]), int(readable[b]), cosine) for a, b, cosine in pairs]
    images = {row for a, b, _ in pairs for row in (a, b)}
    protocol = {
        "threshold": settings.threshold,
        "k": settings.k,
        "pooling": request.pooling,
        "layer": request.layer,
        "search": found.backend,
        "val": spec,
        "images": len(shown.images),
        "pairs": len(pairs),
        "images_with_a_pair": len(images),
        "unreadable_left_out": {"val": len(shown.images) - len(readable)},
        **file.protocol,
        "versions": results.versions(),
    }
    if full:
        protocol["note"] = f"{full} images have {settings.k} partners or more; a larger k finds more pairs"
    result = results.result("duplicates", opened, {"in_a_pair": len(images) / len(readable)}, protocol)
    name = shown.images.source.name
    result["pairs"] = [{"a": name(a), "b": name(b), "cosine": cosine} for a, b, cosine in pairs[:_LISTED]]
    results.save(result, opened, out)
    results.show(result, out)
    print(f"{len(pairs)} pairs of cosine {settings.threshold:g} or more among {len(readable):,} images")
    for row in result["pairs"][:_PRINTED]:
        print(f"{row['cosine']:.4f}  {row['a']}  {row['b']}")
    if len(pairs) > _PRINTED:
        print(f"... and {len(pairs) - _PRINTED} more")
    picture = beside("duplicates", opened, out)
    if picture is not None and pairs:
        print(f"picture: {_sheet(shown, pairs[: settings.images], transform, picture)}")
    return result


def pairs_of(
    indices: np.ndarray, similarities: np.ndarray, threshold: float
) -> tuple[list[tuple[int, int, float]], int]:
    """([(a, b, cosine) with a < b], highest first, each once; images whose every neighbour [N, k + 1] reaches the threshold)."""
    query = np.broadcast_to(np.arange(len(indices))[:, None], indices.shape)
    close = (similarities >= threshold) & (indices != query)
    low, high = np.minimum(query, indices)[close], np.maximum(query, indices)[close]
    best = {(int(a), int(b)): float(s) for a, b, s in zip(low, high, similarities[close])}
    pairs = [(a, b, s) for (a, b), s in sorted(best.items(), key=lambda item: (-item[1], item[0]))]
    return pairs, int((close.sum(axis=1) >= indices.shape[1] - 1).sum()) if indices.shape[1] > 1 else 0


def _sheet(shown: Shown, pairs: list[tuple[int, int, float]], transform: Transform, path: Path) -> Path:
    rows = np.unique([row for a, b, _ in pairs for row in (a, b)])
    images, kept = read(shown.images, rows, transform)
    pictures = dict(zip(kept.tolist(), displayed(images, transform.mean, transform.std)))
    across = min(4, len(pairs))
    down = -(-len(pairs) // across)
    figure = new_figure(2.6 * across, 1.6 * down + 0.5)
    grid = figure.subplots(down, 2 * across, squeeze=False)
    for axes in grid.flat:
        bare(axes)
    for n, (a, b, cosine) in enumerate(pairs):
        left, right = grid[n // across, 2 * (n % across)], grid[n // across, 2 * (n % across) + 1]
        left.imshow(pictures[a])
        right.imshow(pictures[b])
        left.set_title(f"{cosine:.4f}", fontsize=8, color=MUTED, pad=2, loc="left")
    figure.suptitle(f"The {len(pairs)} pairs of highest cosine", fontsize=10, color=INK)
    return save(figure, path)
