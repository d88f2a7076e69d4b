"""`selfsup eval robustness`: top-1 of corrupted val images, by k-NN among clean training images or by the run's classifier.

A classifier also has a calibration error, which tells whether it knows that it is worse there (Ovadia et al., 2019, section 4).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfsup import dist
from selfsup.config import suggest
from selfsup.data.arrays import eight_bits
from selfsup.data.decode import BadImage
from selfsup.data.eval_transform import eval_crop
from selfsup.data.sources import Source, Subset
from selfsup.errors import UserError
from selfsup.randomness import generator

from . import classify, knn, results
from .canvas import INK, bare, new_figure, save
from .class_figures import figures
from .class_names import open_val
from .corruptions import CORRUPTIONS, corrupted
from .datasets import Images, labelled_only, open_pair
from .features import Transform, extract, transform_for
from .poolings import Request
from .settings import resolve
from .settings_scores import RobustnessSettings
from .shown import beside, rgb
from .targets import Target, open_target

_DRAW = 0xC0FF  # keeps these draws apart from other uses of the same seed


class Corrupted(Subset):
    """Images as a transform crops them, corrupted: each in the same way whenever it is read."""

    def __init__(self, source: Source, transform: Transform, name: str, strength: str, seed: int) -> None:
        super().__init__(source, np.arange(len(source)))
        self.config = source.config.model_copy(update={"depth": 8})  # corruptions know 8 bits alone
        self.transform, self.how, self.seed = transform, (name, strength), seed

    def read(self, i: int) -> np.ndarray:
        """uint8 [S, S, C]."""
        t = self.transform
        pixels = eval_crop(eight_bits(self.source.read(i)), t.size, t.resize, t.interpolation)
        return corrupted(pixels, *self.how, generator(_DRAW, self.seed, list(CORRUPTIONS).index(self.how[0]), i))


@dataclass
class Measured:
    """One row a corruption and strength, the clean images first; and what the result says of how."""

    target: Target
    val: Images
    transform: Transform
    rows: list[dict[str, Any]]
    protocol: dict[str, Any]


def run(
    target: str, overrides: list[str], out: Path | None = None, *, open_run: classify.OpenRun | None = None
) -> dict[str, Any]:
    """Print the figures of every corruption, write them to `out` or RUN/eval/robustness.json, and show the corruptions."""
    settings = resolve("robustness", overrides)
    assert isinstance(settings, RobustnessSettings)
    names = settings.corruptions or tuple(CORRUPTIONS)
    for name in names:
        if name not in CORRUPTIONS:
            raise UserError(f"corruptions={name}{suggest(name, CORRUPTIONS)}; known: {', '.join(CORRUPTIONS)}")
    results.check_destination(out)
    ways = [("none", "none"), *((n, s) for n in names for s in ("mild", "strong"))]
    if settings.by == "classifier":
        assert open_run is not None
        found = _by_classifier(classify.open_subject(target, settings.device, open_run), settings, ways)
    else:
        found = _by_knn(open_target(target, device=settings.device), settings, ways)
    if not dist.is_main():
        return {}
    figures_of = [key for key in found.rows[0] if key not in ("corruption", "strength")]
    metrics = {key: found.rows[0][key] for key in figures_of}
    for strength in ("mild", "strong"):
        rows = [row for row in found.rows if row["strength"] == strength]
        metrics |= {f"{key}_{strength}": float(np.mean([row[key] for row in rows])) for key in figures_of}
    protocol = {
        "by": settings.by,
        "corruptions": "own, near levels 1 and 4 of ImageNet-C, after the crop; the training images are clean",
        "metric": "of clean val images; means over the corruptions of each strength",
        **found.protocol,
        "seed": settings.seed,
        "versions": results.versions(),
    }
    task = "robustness" if settings.by == "knn" else f"robustness-{settings.by}"
    result = results.result(task, found.target, metrics, protocol, found.rows)
    results.save(result, found.target, out)
    results.show(result, out)
    picture = beside(task, found.target, out)
    if picture is not None:
        print(f"picture: {_draw(found.val, found.transform, found.rows, settings, picture)}")
    return result


def _corrupted(val: Images, transform: Transform, way: tuple[str, str], seed: int) -> tuple[Images, Transform]:
    """The images of one way, and how they are still to be transformed."""
    if way[0] == "none":
        return val, transform
    images = Images(Corrupted(val.source, transform, *way, seed), val.indices, val.spec)
    return images, replace(transform, resize=transform.size)


def _said(way: tuple[str, str]) -> str:
    return "val" if way[0] == "none" else f"val, {' '.join(way)}"


def _by_knn(opened: Target, settings: RobustnessSettings, ways: list[tuple[str, str]]) -> Measured:
    pair, left_out = labelled_only(open_pair(opened, settings))
    request = Request(settings.pooling, settings.layer)
    transform = transform_for(opened, pair.train, settings)
    bank = extract(opened, pair.train, settings, [request], transform, what="train features")
    passing = settings.model_copy(update={"cache": False})
    table: list[dict[str, Any]] = []
    facts: dict[str, Any] = {}
    for way in ways:
        images, how = _corrupted(pair.val, transform, way, settings.seed)
        file = extract(opened, images, settings if way[0] == "none" else passing, [request], how, what=_said(way))
        if dist.is_main():
            rows, facts = knn.classify(
                bank.array(request), np.where(bank.readable(request), pair.train_labels, -1),
                file.array(request), np.where(file.readable(request), pair.val_labels, -1),
                ks=settings.k, temperatures=settings.temperature, classes=pair.classes, backend=settings.backend,
                device=opened.device,
            )  # fmt: skip
            table.append({"corruption": way[0], "strength": way[1], "top1": rows[0]["top1"]})
        dist.barrier()  # what is not kept ends with the loop
    protocol: dict[str, Any] = {"k": settings.k[0], "temperature": settings.temperature[0]}
    protocol |= {"pooling": request.pooling, "layer": request.layer, "unlabelled_left_out": left_out}
    if dist.is_main():
        protocol["top1_interval_95"] = results.interval(table[0]["top1"], facts["val_images"])
    return Measured(opened, pair.val, transform, table, {**protocol, **bank.protocol, **pair.protocol})


def _by_classifier(subject: classify.Subject, settings: RobustnessSettings, ways: list[tuple[str, str]]) -> Measured:
    val = open_val(subject.target, settings, subject.classes, subject.class_names, len(subject.mean))
    transform = classify.transform_of(subject, settings)
    name, module = next(iter(subject.classifiers.items()))
    table: list[dict[str, Any]] = []
    seen = 0
    for way in ways:
        images, how = _corrupted(val.images, transform, way, settings.seed)
        told = classify.answers(
            {name: module}, replace(val, images=images), how, settings, subject.target.device,
            precision=settings.precision, what=_said(way),
        )[name]  # fmt: skip
        found = figures(told, val.labels, val.classes, settings.bins)
        table.append({"corruption": way[0], "strength": way[1], "top1": found["top1"], "ece": found["ece"]})
        seen = int(told.readable.sum())
    protocol = {
        "classifier": name,
        "calibration": f"expected calibration error: {settings.bins} bins of equal width, l1, of the largest probability",
        "top1_interval_95": results.interval(table[0]["top1"], seen),
        "resolution": transform.size,
        "precision": settings.precision,
    }
    return Measured(subject.target, val.images, transform, table, {**protocol, **val.protocol})


def _draw(
    val: Images, transform: Transform, table: list[dict[str, Any]], settings: RobustnessSettings, path: Path
) -> Path:
    """The first val image that can be read, in every way, with the top-1 of all of them."""
    names = list(dict.fromkeys(row["corruption"] for row in table[1:]))
    figure = new_figure(1.35 * (len(names) + 1), 3.5)
    grid = figure.subplots(2, len(names) + 1, squeeze=False)
    first = next(int(i) for i in val.indices if _readable(val.source, int(i)))
    pixels = eval_crop(eight_bits(val.source.read(first)), transform.size, transform.resize, transform.interpolation)
    bare(grid[0, 0], f"clean\n{_figures(table[0])}")
    grid[0, 0].imshow(rgb(pixels))
    bare(grid[1, 0])
    for row in table[1:]:
        axes = grid[("mild", "strong").index(row["strength"]), names.index(row["corruption"]) + 1]
        changed = Corrupted(val.source, transform, row["corruption"], row["strength"], settings.seed).read(first)
        bare(axes, f"{row['corruption'].replace('_', ' ')}\n{_figures(row)}")
        axes.imshow(rgb(changed))
    grid[0, 1].set_ylabel("mild", fontsize=9, color=INK)
    grid[1, 1].set_ylabel("strong", fontsize=9, color=INK)
    by = "k-NN" if settings.by == "knn" else "Classifier's"
    error = ", calibration error" if "ece" in table[0] else ""
    broken = "\n" if len(names) < 3 else " "  # the picture is narrow
    figure.suptitle(f"{by} top-1{error}{broken}under corruptions of the val images", fontsize=10, color=INK)
    return save(figure, path)


def _figures(row: dict[str, Any]) -> str:
    return ", ".join(f"{row[key]:.1%}" for key in ("top1", "ece") if key in row)


def _readable(source: Source, i: int) -> bool:
    try:
        source.read(i)
    except BadImage:
        return False
    return True
