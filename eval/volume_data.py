"""Volumes with masks: which file belongs to which, ids, and the crops of a training."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from selfsup.config import DataConfig
from selfsup.data.base import retried
from selfsup.data.decode import BadImage
from selfsup.data.volumes import SUFFIXES, read_array, read_header, read_volume, scaled
from selfsup.errors import UserError
from selfsup.losses.segmentation import IGNORE
from selfsup.randomness import generator

from .volume_settings import Segment3dSettings

_SPLIT, _CROP = 0x5E65373D, 0x5E65C30D
_KEEP = 2_000_000_000
"""Bytes of volumes and masks that a process keeps."""


@dataclass
class VolumePairs:
    """Files of one part, as many masks as volumes."""

    images: list[Path]
    masks: list[Path]

    def __len__(self) -> int:
        return len(self.images)

    def chosen(self, index: np.ndarray) -> "VolumePairs":
        """Those with these numbers."""
        return VolumePairs([self.images[i] for i in index], [self.masks[i] for i in index])

    def fingerprint(self) -> str:
        """sha256 of the names and sizes of the volumes and the bytes of the masks."""
        digest = hashlib.sha256()
        for image, mask in zip(self.images, self.masks):
            digest.update(f"{image.name} {image.stat().st_size} {mask.name} ".encode())
            digest.update(hashlib.sha256(mask.read_bytes()).digest())
        return digest.hexdigest()


def open_pairs(settings: Segment3dSettings) -> tuple[VolumePairs, VolumePairs, str]:
    """(train, val, how they were split). Raises UserError naming the folder, or the volume without a mask."""
    data, masks = settings.data, settings.masks
    if data.path is None or masks.path is None:
        raise UserError("eval segment3d: give data=VOLUMES masks=MASKS, two folders of .nii, .nii.gz or .npy files")
    train = _match(_folder(data.path, "data"), _folder(masks.path, "masks"))
    if data.val is not None and masks.val is not None:
        return train, _match(_folder(data.val, "data.val"), _folder(masks.val, "masks.val")), "as given"
    count = len(train)
    if count < 2:
        raise UserError(f"data={data.path}: {count} volume cannot be split; give data.val and masks.val")
    held = min(max(round(count * settings.val_fraction), 1), count - 1)
    order = generator(_SPLIT, settings.seed).permutation(count)
    said = f"seeded {count - held}/{held} of {data.path}, seed {settings.seed}"
    return train.chosen(np.sort(order[held:])), train.chosen(np.sort(order[:held])), said


def _folder(path: str, key: str) -> Path:
    found = Path(path).expanduser()
    if not found.is_dir():
        raise UserError(f"{key}={path}: no such folder")
    return found


def _stem(path: Path) -> str:
    suffix = max((s for s in SUFFIXES if path.name.lower().endswith(s)), key=len, default="")
    return path.name[: len(path.name) - len(suffix)] if suffix else ""


def _match(images: Path, masks: Path) -> VolumePairs:
    """Volumes of a folder and the masks with the same relative name, whatever the suffix."""
    found: list[dict[Path, Path]] = []
    for root in (images, masks):
        files = sorted(p for p in root.rglob("*") if p.is_file() and _stem(p) and not p.name.startswith("."))
        if not files:
            raise UserError(f"{root}: no volumes in it; looked for {' '.join(SUFFIXES)}")
        found.append({p.relative_to(root).parent / _stem(p): p for p in files})
        if len(found[-1]) < len(files):
            raise UserError(f"{root}: two files have one name but for their suffixes; a mask belongs to one volume")
    missing = [path for key, path in found[0].items() if key not in found[1]]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(found[0])})" if len(missing) > 1 else ""
        raise UserError(f"{missing[0]}: no mask of this name in {masks}{more}; suffixes may differ")
    return VolumePairs(list(found[0].values()), [found[1][key] for key in found[0]])


def read_mask(path: Path) -> np.ndarray:
    """int64 [D, H, W] of ids. Raises UserError naming the file."""
    try:
        array, _ = retried(lambda: read_array(str(path)))
    except BadImage as error:
        raise UserError(f"masks: {path}: {error}") from None
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.ndim != 3:
        raise UserError(f"masks: {path}: shape {list(array.shape)}; one id a voxel is needed, [D, H, W]")
    ids = array.astype(np.int64)
    if not np.array_equal(ids, array) or (ids.size and (ids.min() < 0 or ids.max() > 65535)):
        raise UserError(f"masks: {path}: values from {array.min()} to {array.max()}; ids are whole numbers, 0 to 65535")
    return ids


@dataclass
class VolumeReader:
    """Volumes as a backbone takes them, and masks as numbers of classes."""

    channels: int
    config: DataConfig
    names: list[str]
    ignore: int | None
    _kept: dict[Path, tuple[Any, ...]] = field(default_factory=dict)

    def volume(self, path: Path) -> tuple[np.ndarray, tuple[float, float, float] | None]:
        """(float32 [C, D, H, W] in 0..1, millimetres of a voxel or None). Raises UserError naming the file."""
        try:
            found, spacing = retried(lambda: read_volume(str(path), self.channels, self.config))
        except BadImage as error:
            raise UserError(f"data: {path}: {error}") from None
        return scaled(found, self.config), spacing

    def mask(self, path: Path) -> np.ndarray:
        """int64 [D, H, W] of classes, IGNORE where it is ignored."""
        ids = read_mask(path)
        ignored = ids == self.ignore if self.ignore is not None else np.zeros(ids.shape, bool)
        if (ids[~ignored] >= len(self.names)).any():
            wrong = int(ids[~ignored].max())
            raise UserError(
                f"masks: {path}: id {wrong} is no class; known are 0 to {len(self.names) - 1}; see classes=, ignore="
            )
        return np.where(ignored, IGNORE, ids)

    def pair(self, image: Path, mask: Path) -> tuple[np.ndarray, np.ndarray]:
        """(volume [C, D, H, W], classes int64 [D, H, W]) of one grid: with data.spacing that of the resampled volume."""
        if image not in self._kept:
            volume, _ = self.volume(image)
            classes = nearest(self.mask(mask), volume.shape[1:])
            self._kept[image] = (volume, classes.astype(np.int32))
            while len(self._kept) > 1 and sum(a.nbytes for pair in self._kept.values() for a in pair) > _KEEP:
                del self._kept[next(iter(self._kept))]
        return self._kept[image][0], self._kept[image][1]


def nearest(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[D, H, W] -> `shape`, each voxel from the one whose centre is nearest."""
    if array.shape == tuple(shape):
        return array
    at = [np.minimum(((np.arange(n) + 0.5) * old / n).astype(int), old - 1) for n, old in zip(shape, array.shape)]
    return array[np.ix_(*at)]


def open_reader(
    pairs: tuple[VolumePairs, VolumePairs], settings: Segment3dSettings, channels: int, config: DataConfig
) -> VolumeReader:
    """Every header and mask looked at once: sizes, ids, how many classes. Raises UserError for the first that does not fit."""
    largest, seen = 0, set()
    for part in pairs:
        for image, mask in zip(part.images, part.masks):
            try:
                shape = retried(partial(read_header, str(image), channels, config))[1:]
                ids = read_mask(mask)
                if ids.shape != shape:
                    raise UserError(f"masks: {mask}: {list(ids.shape)} voxels, but {image} has {list(shape)}")
            except BadImage as error:
                raise UserError(f"data: {image}: {error}") from None
            found = np.unique(ids)
            seen |= set(found.tolist())
            largest = max(largest, int(max((i for i in found if i != settings.ignore), default=0)))
    given = settings.classes
    names = list(given) if isinstance(given, tuple) else [str(i) for i in range(given or largest + 1)]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(
            f"classes={', '.join(names)}: {'a name is given twice' if len(names) > 1 else 'two or more are needed'}"
            + ("; masks hold one id" if len(seen) < 2 else "")
        )
    return VolumeReader(channels, config, names, settings.ignore)


# ------------------------------------------------------------------------------------------------------------- crops


class VolumeCrops(Dataset[Any]):
    """Item k is the batch of step k: (float32 [B, C, d, h, w], int64 [B, d, h, w]), a function of (seed, step) alone.

    Outside a volume are value 0 and IGNORE. Volumes come in a seeded order, each once before any comes again.
    """

    def __init__(
        self, pairs: VolumePairs, reader: VolumeReader, settings: Segment3dSettings, shape: tuple[int, ...]
    ) -> None:
        self.pairs, self.reader, self.settings, self.shape = pairs, reader, settings, shape

    def __len__(self) -> int:
        return self.settings.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        s, made = self.settings, []
        for b in range(s.batch):
            turn, place = divmod(step * s.batch + b, len(self.pairs))
            i = int(generator(_CROP, s.seed, turn).permutation(len(self.pairs))[place])
            made.append(self.one(generator(_CROP, s.seed, step, b, 1), i))
        return torch.from_numpy(np.stack([m[0] for m in made])), torch.from_numpy(np.stack([m[1] for m in made]))

    def one(self, rng: np.random.Generator, i: int) -> tuple[np.ndarray, np.ndarray]:
        """A crop of volume i."""
        s, shape = self.settings, np.array(self.shape)
        volume, classes = self.reader.pair(self.pairs.images[i], self.pairs.masks[i])
        room = np.array(classes.shape) - shape
        start = np.where(room >= 0, np.floor(rng.random(3) * (room + 1)), np.floor(room / 2)).astype(int)
        if rng.random() < s.foreground and len(there := np.flatnonzero(classes.reshape(-1) > 0)):
            middle = np.array(np.unravel_index(there[int(rng.random() * len(there))], classes.shape))
            start = np.where(room >= 0, np.clip(middle - shape // 2, 0, np.maximum(room, 0)), start)
        flips = tuple(axis - 3 for axis in range(3) if rng.random() < s.flip)
        factor, shift = 1 + s.intensity * (2 * rng.random(2) - 1)
        x = window(volume * np.float32(factor) + np.float32(shift - 1), start, shape, 0).astype(np.float32)
        y = window(classes, start, shape, IGNORE).astype(np.int64)
        return np.ascontiguousarray(np.flip(x, flips)), np.ascontiguousarray(np.flip(y, flips))


def window(array: np.ndarray, start: np.ndarray, shape: np.ndarray, fill: float) -> np.ndarray:
    """[..., D, H, W] -> the box [..., d, h, w] that begins at `start`, which may be negative; `fill` where it is outside."""
    extent = np.array(array.shape[-3:])
    first, last = np.maximum(start, 0), np.minimum(start + shape, extent)
    part = array[..., first[0] : last[0], first[1] : last[1], first[2] : last[2]]
    before, after = first - start, start + shape - last
    pads = [(0, 0)] * (array.ndim - 3) + list(zip(before.tolist(), after.tolist()))
    return np.pad(part, pads, constant_values=fill) if before.any() or after.any() else part
