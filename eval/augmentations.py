"""`selfsup eval augmentations RECIPE|RUN`: the first images of the first batch and the views that training makes of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from selfsup import config as configuration
from selfsup import dist
from selfsup.config import Config
from selfsup.data.arrays import eight_bits
from selfsup.data.batch import Split
from selfsup.data.loader import maker_of
from selfsup.data.sheet import sheet, write_sheet
from selfsup.data.sources import BadImage, Source, open_source
from selfsup.data.views import View
from selfsup.data.volumes import open_volumes
from selfsup.errors import UserError

from .settings import resolve
from .settings_pictures import AugmentationsSettings
from .shown import check_picture, rgb, said


def run(
    target: str, overrides: list[str], out: Path | None = None, *, views: Callable[[Config], list[View]]
) -> dict[str, Any]:
    """Draw into `out`, RUN/pictures/augmentations.png, or for a recipe RECIPE_augmentations.png in this folder.

    views: those of a configuration's method. The same seed, so the same crops and colours as the run's own first batch.
    """
    settings = resolve("augmentations", overrides)
    assert isinstance(settings, AugmentationsSettings)
    check_picture(out)
    config, path = _open(target, settings.training)
    if not dist.is_main():
        return {}
    channels = config.backbone.in_chans
    source = (open_volumes if config.volumes else open_source)(config.data.path, channels=channels, config=config.data)
    made, count = views(config), min(settings.images, len(source), config.global_batch)
    if count == 0:
        raise UserError(f"data={config.data.path}: no images to show")
    maker = maker_of(source)(source, made, config.seed, Split(count), copies=config.data.copies)
    batch = maker(0, 0)
    originals = [_original(source, int(i)) for i in batch.ids]
    try:
        drawn = sheet(batch, maker.groups, config.mean, config.std, most=count, originals=originals, part=maker.part)
        write_sheet(out or path, drawn)
    except OSError as error:
        raise UserError(f"{out or path}: cannot be written: {error.strerror}; name another file with --out") from None
    return said(out or path)


def _open(target: str, training: dict[str, Any]) -> tuple[Config, Path]:
    """(configuration, default file) of a run or a recipe with the keys of the training laid over it."""
    run = Path(target)
    if (run / "config.yaml").is_file():
        base, path = str(run / "config.yaml"), run / "pictures" / "augmentations.png"
    else:
        base, path = target, Path(f"{Path(target).stem}_augmentations.png")
    lasting = {key: value for key, value in training.items() if key not in ("steps", "epochs", "samples")}
    return configuration.load(base, extra=lasting), path


def _original(source: Source, index: int) -> Image.Image:
    """Image `index` as it is decoded; of more than three channels the first three. Grey where it cannot be read."""
    try:
        image = eight_bits(source.read(index))
    except BadImage:
        return Image.new("RGB", (32, 32), "#888888")
    if isinstance(image, Image.Image):
        return image
    return Image.fromarray(np.ascontiguousarray(rgb(np.asarray(image)).astype(np.uint8)))
