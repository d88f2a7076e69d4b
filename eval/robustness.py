"""`selfsup eval robustness`: k-NN top-1 of corrupted val images, the training images clean."""

from dataclasses import replace
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

from . import results
from .canvas import INK, bare, new_figure, save
from .corruptions import CORRUPTIONS, corrupted
from .datasets import Images, labelled_only, open_pair
from .features import Transform, extract, transform_for
from .knn import classify
from .poolings import Request
from .settings import resolve
from .settings_scores import RobustnessSettings
from .shown import beside, rgb
from .targets import open_target

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


def run(target: str, overrides: list[str], out: Path | None = None) -> dict[str, Any]:
    """Print top-1 of every corruption, write it to `out` or RUN/eval/robustness.json, and show the corruptions in a picture."""
    settings = resolve("robustness", overrides)
    assert isinstance(settings, RobustnessSettings)
    names = settings.corruptions or tuple(CORRUPTIONS)
    for name in names:
        if name not in CORRUPTIONS:
            raise UserError(f"corruptions={name}{suggest(name, CORRUPTIONS)}; known: {', '.join(CORRUPTIONS)}")
    results.check_destination(out)
    opened = open_target(target, device=settings.device)
    pair, left_out = labelled_only(open_pair(opened, settings))
    request = Request(settings.pooling, settings.layer)
    transform = transform_for(opened, pair.train, settings)
    bank = extract(opened, pair.train, settings, [request], transform, what="train features")
    passing = settings.model_copy(update={"cache": False})
    same = replace(transform, resize=transform.size)
    table: list[dict[str, Any]] = []
    for name, strength in [("none", "none"), *((n, s) for n in names for s in ("mild", "strong"))]:
        images, how = pair.val, (settings, transform)
        if name != "none":
            changed = Corrupted(pair.val.source, transform, name, strength, settings.seed)
            images, how = Images(changed, pair.val.indices, pair.val.spec), (passing, same)
        file = extract(
            opened, images, how[0], [request], how[1], what=f"val, {name} {strength}" if name != "none" else "val"
        )
        if dist.is_main():
            rows, facts = classify(
                bank.array(request), np.where(bank.readable(request), pair.train_labels, -1),
                file.array(request), np.where(file.readable(request), pair.val_labels, -1),
                ks=settings.k, temperatures=settings.temperature, classes=pair.classes, backend=settings.backend,
                device=opened.device,
            )  # fmt: skip
            table.append({"corruption": name, "strength": strength, "top1": rows[0]["top1"]})
        dist.barrier()  # what is not kept ends with the loop
    if not dist.is_main():
        return {}
    metrics = {"top1": table[0]["top1"]}
    for strength in ("mild", "strong"):
        metrics[f"top1_{strength}"] = float(np.mean([row["top1"] for row in table if row["strength"] == strength]))
    protocol = {
        "k": settings.k[0],
        "temperature": settings.temperature[0],
        "pooling": request.pooling,
        "layer": request.layer,
        "corruptions": "own, near levels 1 and 4 of ImageNet-C, after the crop; the training images are clean",
        "metric": "top1 of clean val images; means over the corruptions of each strength",
        "unlabelled_left_out": left_out,
        "top1_interval_95": results.interval(metrics["top1"], facts["val_images"]),
        **bank.protocol,
        **pair.protocol,
        "seed": settings.seed,
        "versions": results.versions(),
    }
    result = results.result("robustness", opened, metrics, protocol, table)
    results.save(result, opened, out)
    results.show(result, out)
    picture = beside("robustness", opened, out)
    if picture is not None:
        print(f"picture: {_draw(pair.val, transform, table, settings.seed, picture)}")
    return result


def _draw(val: Images, transform: Transform, table: list[dict[str, Any]], seed: int, path: Path) -> Path:
    """The first val image that can be read, in every way, with the top-1 of all of them."""
    names = list(dict.fromkeys(row["corruption"] for row in table[1:]))
    figure = new_figure(1.35 * (len(names) + 1), 3.5)
    grid = figure.subplots(2, len(names) + 1, squeeze=False)
    first = next(int(i) for i in val.indices if _readable(val.source, int(i)))
    pixels = eval_crop(eight_bits(val.source.read(first)), transform.size, transform.resize, transform.interpolation)
    bare(grid[0, 0], f"clean\n{table[0]['top1']:.1%}")
    grid[0, 0].imshow(rgb(pixels))
    bare(grid[1, 0])
    for row in table[1:]:
        axes = grid[("mild", "strong").index(row["strength"]), names.index(row["corruption"]) + 1]
        changed = Corrupted(val.source, transform, row["corruption"], row["strength"], seed).read(first)
        bare(axes, f"{row['corruption'].replace('_', ' ')}\n{row['top1']:.1%}")
        axes.imshow(rgb(changed))
    grid[0, 1].set_ylabel("mild", fontsize=9, color=INK)
    grid[1, 1].set_ylabel("strong", fontsize=9, color=INK)
    figure.suptitle("k-NN top-1 under corruptions of the val images", fontsize=10, color=INK)
    return save(figure, path)


def _readable(source: Source, i: int) -> bool:
    try:
        source.read(i)
    except BadImage:
        return False
    return True
