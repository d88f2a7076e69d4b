"""Files of masks: which one belongs to an image, and the ids in it. The same for every verb that takes `masks=FOLDER`.

A mask is a palette or grey image (PNG, TIFF, ... or .npy) whose values are ids, 0 to 65535; grey that is stored in several equal
channels is grey. It has its image's name, whatever the suffix, in the same subfolder; or anywhere, where only one has that name.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from selfsup.data.decode import BadImage, read_file
from selfsup.errors import UserError

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm", ".npy")
IDS = 65536


def read_ids(path: Path, max_pixels: int = 100_000_000) -> np.ndarray:
    """The ids of a mask as they are stored, an unsigned type [H, W]: indices of a palette, or grey values."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, allow_pickle=False)
        else:
            read_file(path, 1, max_pixels)  # what is no file, or is too large
            with Image.open(path) as image:
                array = np.asarray(image) if image.mode not in ("1",) else np.asarray(image).astype(np.uint8)
    except (BadImage, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"masks: {path}: cannot be read: {error}") from None
    if array.ndim == 3 and (array == array[..., :1]).all():
        array = array[..., 0]  # grey, stored in several channels
    if array.ndim != 2:
        raise UserError(
            f"masks: {path}: shape {array.shape}, colours instead of ids; save it as a palette or grey image whose values are ids"
        )
    if array.dtype.kind not in "bui" or (array.size and (array.min() < 0 or array.max() >= IDS)):
        raise UserError(
            f"masks: {path}: values of type {array.dtype}, {array.min()} to {array.max()}; ids are 0 to 65535"
        )
    return array.astype(np.uint16) if array.dtype not in (np.uint8, np.uint16) else array


def matched(images: Sequence[Path], folder: Path) -> list[Path]:
    """The mask in `folder` of each image, whose names are relative to the folder of images.

    Raises UserError as `find`, and for an image without a mask.
    """
    masks = find(images, folder)
    missing = [image for image, mask in zip(images, masks) if mask is None]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(images)})" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: no mask {folder / missing[0].with_suffix('.png')}{more}; "
            "a mask has its image's name, with one of these suffixes: " + " ".join(SUFFIXES)
        )
    return [mask for mask in masks if mask is not None]


def find(images: Sequence[Path], folder: Path) -> list[Path | None]:
    """The same, None for an image without one. Raises UserError for two masks of one name, and for a mask of two images."""
    by_stem: dict[Path, Path] = {}
    by_name: dict[str, list[Path]] = {}
    for path in files(folder, SUFFIXES):
        stem = path.relative_to(folder).with_suffix("")
        if stem in by_stem:
            raise UserError(f"{path}: there is also {by_stem[stem].name}; one mask an image")
        by_stem[stem] = path
        by_name.setdefault(stem.name, []).append(path)
    found: list[Path | None] = []
    owner: dict[Path, Path] = {}
    for image in images:
        alike = by_name.get(image.stem, [])
        mask = by_stem.get(image.with_suffix("")) or (alike[0] if len(alike) == 1 else None)
        if mask in owner:
            raise UserError(f"{mask}: the mask of two images, {owner[mask]} and {image}; a mask belongs to one image")
        if mask is not None:
            owner[mask] = image
        found.append(mask)
    return found


def files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Those in a folder and below with these suffixes, hidden ones left out, sorted."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file())
