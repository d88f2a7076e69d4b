"""`selfsup eval neighbors`: images beside those that a backbone finds most alike, of all that are searched."""

from pathlib import Path
from typing import Any

import numpy as np

from selfsup import dist
from selfsup.errors import UserError

from .canvas import GREEN, INK, MUTED, bare, new_figure, save
from .class_figures import class_name
from .class_names import val_of
from .datasets import Images, align
from .features import Transform, extract, transform_for
from .poolings import Request
from .search import neighbours
from .settings_pictures import NeighborsSettings
from .shown import Shown, begin, displayed, open_shown, read, said
from .targets import Target

_WRONG = "#c23b3b"


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Draw into `out` or RUN/pictures/neighbors.png."""
    settings, opened, path = begin("neighbors", target, overrides, out)
    bank, queries = _open(opened, settings)
    transform = transform_for(opened, bank.images, settings)
    request = Request(settings.pooling, settings.layer)
    found = extract(opened, bank.images, settings, [request], transform, what="bank features")
    same = queries is bank
    rows = np.sort(queries.few(settings.images))
    some = Images(queries.images.source, queries.images.indices[rows], queries.images.spec)
    asked = found if same else extract(opened, some, settings, [request], transform, what="query features")
    if not dist.is_main():
        return {}
    if same:  # not from another pass: an image is then its own nearest to the last bit
        wanted = np.asarray(asked.array(request))[rows]
    else:
        wanted = np.asarray(asked.array(request))
    kept = np.flatnonzero(np.isfinite(wanted[:, 0]))
    readable = np.flatnonzero(found.readable(request))
    if not len(kept) or len(readable) < 2:
        raise UserError(f"{bank.images.spec}: {len(readable)} images to search, {len(kept)} queries that can be read")
    rows = rows[kept]
    features = np.asarray(found.array(request))
    features = features if len(readable) == len(features) else features[readable]
    near = neighbours(features, wanted[kept], settings.k + same, device=opened.device)
    indices, similarities = readable[near.indices.numpy()], near.similarities.numpy()
    if same:
        indices, similarities = without_self(indices, similarities, rows)
    return said(_sheet(bank, queries, rows, indices, similarities, transform, opened, path))


def _open(target: Target, settings: NeighborsSettings) -> tuple[Shown, Shown]:
    """(bank, queries): the same object if the queries are of the bank."""
    run = target.config
    train = settings.eval.train or settings.data.path
    val = settings.eval.val or settings.data.val
    if train is None:
        if run is None:
            raise UserError(f"eval neighbors {target.name}: no images; give data=FOLDER")
        train, val = run.eval.train or run.data.path, val or val_of(run)
    bank = open_shown(target, settings, train)
    if val is None:
        return bank, bank
    queries = open_shown(target, settings, val)
    if bank.labels is not None and queries.labels is not None:
        names, bank.labels, queries.labels = align(bank.names, bank.labels, queries.names, queries.labels)
        bank.names = queries.names = names
    return bank, queries


def without_self(indices: np.ndarray, similarities: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours [Q, k + 1] of bank images `rows` [Q] without those images themselves: [Q, k] each."""
    own = indices == rows[:, None]
    own[~own.any(axis=1), -1] = True  # among many equal ones it was not even found: one neighbour fewer
    keep = ~own
    shape = (len(rows), indices.shape[1] - 1)
    return indices[keep].reshape(shape), similarities[keep].reshape(shape)


def _sheet(
    bank: Shown,
    queries: Shown,
    rows: np.ndarray,
    indices: np.ndarray,
    similarities: np.ndarray,
    transform: Transform,
    target: Target,
    path: Path,
) -> Path:
    left = displayed(read(queries.images, rows, transform)[0], transform.mean, transform.std)
    needed = np.unique(indices)
    loaded, kept = read(bank.images, needed, transform)
    right = displayed(loaded, transform.mean, transform.std)
    place = {int(row): n for n, row in enumerate(kept)}
    count, k = indices.shape
    figure = new_figure(1.0 * (k + 1) + 0.5, 1.2 * count + 0.5)
    grid = figure.subplots(count, k + 1, squeeze=False, gridspec_kw={"width_ratios": [1.15, *([1.0] * k)]})
    hits: list[bool] = []
    for q in range(count):
        bare(grid[q, 0], class_name(queries.names, int(queries.labels[rows[q]])) if queries.labels is not None else "")
        grid[q, 0].imshow(left[q])
        for j in range(k):
            axes, row = grid[q, j + 1], int(indices[q, j])
            bare(axes)
            axes.imshow(right[place[row]])
            axes.set_title(f"{similarities[q, j]:.3f}", fontsize=7, color=MUTED, pad=2)
            if bank.labels is not None and queries.labels is not None:
                hits.append(bool(bank.labels[row] == queries.labels[rows[q]]))
                _frame(axes, GREEN if hits[-1] else _WRONG)
    share = f"; {np.mean(hits):.0%} of the query's class" if hits else ""
    figure.suptitle(
        f"Queries and their {k} nearest of {len(bank.images):,}, with cosines{share}", fontsize=10, color=INK
    )
    return save(figure, path)


def _frame(axes: Any, colour: str) -> None:
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(colour)
        spine.set_linewidth(2.0)
