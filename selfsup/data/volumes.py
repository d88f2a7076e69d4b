"""Volumes: NIfTI files (.nii, .nii.gz, through nibabel) and stacks in .npy files, for backbones that see three axes.

What becomes of which file:

- A volume is [C, D, H, W]. Of NIfTI files the axes are turned by the header to the nearest of slices from the head down, rows
  from front to back, columns from left to right. `.npy` is [D, H, W] or [C, D, H, W], as it is; never a pickle.
- Channels: a file of one fits `backbone.in_chans=1`, a fourth axis of C entries (NIfTI's last, .npy's first) in_chans=C.
  `data.channel=N` takes one entry of the fourth axis; without it a file of another number of channels is refused.
- Spacing: voxels are taken as they are, also where they are longer along one axis than along another. `data.spacing=[2,1,1]`
  resamples NIfTI files to so many millimetres (depth, height, width), trilinearly, and smoothly where there are fewer.
- Levels: a window (`data.value_range`, in the file's own units, as [-160, 240] of Hounsfield units), or else the percentiles
  `data.percentiles` of each volume and channel, become 0..255; what is outside is clipped, and NaN becomes 0. Training sees
  256 levels.
- A volume that is smaller than a crop is padded with level 0, equally on both sides.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from selfsup.config import DataConfig
from selfsup.data.base import Names, Source, retried, size_of, text
from selfsup.data.decode import BadImage
from selfsup.errors import UserError
from selfsup.wording import one_line

SUFFIXES = (".nii", ".nii.gz", ".npy")
"""What a folder is searched for, in any case."""

_SUFFIXES = tuple(os.fsencode(s) for s in SUFFIXES)


class VolumeSource(Source):
    """Volumes by number: those below a folder, sorted, or one file. Raises UserError if the first one does not fit."""

    def __init__(self, path: str, channels: int, config: DataConfig, shown: str) -> None:
        super().__init__(channels, config)
        self.root = os.fsencode(path)
        self._names = Names()
        for name in _walk(self.root) if os.path.isdir(path) else [b""]:
            self._names.append(name)
        if not len(self._names):
            raise UserError(f"{shown}: no volumes in it or below; looked for {' '.join(SUFFIXES)}, in any case")
        try:
            retried(lambda: read_header(self.path(0), channels, config))
        except BadImage as error:
            raise UserError(f"{shown}: {one_line(self.name(0))}: {error}") from None

    def __len__(self) -> int:
        return len(self._names)

    def path(self, i: int) -> str:
        """Of volume i."""
        name = self._names[i]
        return os.fsdecode(os.path.join(self.root, name) if name else self.root)

    def volume(self, i: int) -> np.ndarray:
        """Volume i in 256 levels: uint8 [C, D, H, W]. Raises BadImage."""
        return levels(retried(lambda: read_volume(self.path(i), self.channels, self.config)[0]), self.config)

    def read(self, i: int) -> np.ndarray:
        """Volume i as an image of many channels, slice after slice: uint8 [H, W, D*C]."""
        volume = self.volume(i).transpose(2, 3, 1, 0)  # [C, D, H, W] -> [H, W, D, C]
        return volume.reshape(*volume.shape[:2], -1)

    def stored_bytes(self, i: int) -> int:
        return size_of(self.path(i))

    def name(self, i: int) -> str:
        return text(os.fsencode(self.path(i)))

    @property
    def labels(self) -> np.ndarray | None:
        return None

    def fingerprint(self) -> str:
        return self._names.fingerprint


def open_volumes(spec: str, *, channels: int, config: DataConfig) -> VolumeSource:
    """The volumes that `data=SPEC` means: a folder, or one file. Raises UserError when there is nothing to read."""
    shown = f"data={one_line(spec)}"
    path = os.path.expanduser(spec)
    if not os.path.exists(path):
        raise UserError(f"{shown}: no such folder or file; for volumes give a folder of {' '.join(SUFFIXES)} files")
    if os.path.isfile(path) and not path.lower().endswith(SUFFIXES):
        raise UserError(f"{shown}: no volume; give a file that ends in {' '.join(SUFFIXES)}, or a folder of them")
    return VolumeSource(path, channels, config, shown)


def _walk(root: bytes) -> Iterator[bytes]:
    """Relative paths of volumes below `root`, sorted; hidden files are none."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith(b"."))
        for name in sorted(files):
            if name.lower().endswith(_SUFFIXES) and not name.startswith(b"."):
                yield os.path.relpath(os.path.join(folder, name), root)


# ------------------------------------------------------------------------------------------------------------ reading


def read_header(path: str, channels: int, config: DataConfig) -> tuple[int, ...]:
    """The shape [C, D, H, W] that `read_volume` will give before it resamples, from the header alone. Raises BadImage."""
    opened, shape = _open(path)
    if len(shape) not in (3, 4):
        raise BadImage(f"shape {list(shape)} has {len(shape)} axes; a volume has three, or four with channels")
    first = 0 if len(shape) == 3 else shape[0]
    if first == 0 and config.channel is not None:
        raise BadImage(f"shape {list(shape)} has no channels to choose from; leave data.channel out")
    if config.channel is not None and not 0 <= config.channel < first:
        raise BadImage(f"data.channel={config.channel}: it has {first} channels, 0 to {first - 1}")
    found = 1 if config.channel is not None else first or 1
    if found != channels:
        choose = f", or choose one with data.channel=0..{first - 1} and backbone.in_chans=1" if first else ""
        raise BadImage(
            f"{found} channel{'s' * (found > 1)} of shape {list(shape[-3:])}, and backbone.in_chans={channels}; "
            f"give backbone.in_chans={found}{choose}"
        )
    if int(np.prod(shape, dtype=np.int64)) > config.max_pixels:
        raise BadImage(f"{np.prod(shape):,} voxels, more than data.max_pixels={config.max_pixels}")
    if min(shape) < 1:
        raise BadImage(f"shape {list(shape)} is empty")
    if config.spacing is not None and isinstance(opened, np.ndarray):
        raise BadImage(
            f"data.spacing={list(config.spacing)}: a .npy file has no spacing; give NIfTI files or leave it out"
        )
    return (found, *shape[-3:])


def read_volume(path: str, channels: int, config: DataConfig) -> tuple[np.ndarray, tuple[float, float, float] | None]:
    """(float32 [C, D, H, W] in the file's units, millimetres of a voxel along D, H, W or None). Raises BadImage."""
    read_header(path, channels, config)
    array, spacing = read_array(path)
    array = array[None] if array.ndim == 3 else array
    array = array if config.channel is None else array[config.channel][None]
    array = np.ascontiguousarray(array, dtype=np.float32)
    if config.spacing is not None and spacing is not None:
        shape = [max(1, round(n * old / new)) for n, old, new in zip(array.shape[1:], spacing, config.spacing)]
        array, spacing = resized(torch.from_numpy(array), shape).numpy(), config.spacing
    return array, spacing


def read_array(path: str) -> tuple[np.ndarray, tuple[float, float, float] | None]:
    """([D, H, W] or [C, D, H, W] of the file's values, turned as above; millimetres or None). Raises BadImage."""
    opened, _ = _open(path)
    try:
        if isinstance(opened, np.ndarray):
            return np.array(opened), None
        import nibabel

        turned = nibabel.as_closest_canonical(opened)  # columns to the right, rows to the front, slices up
        array, (x, y, z) = np.asanyarray(turned.dataobj), (float(v) for v in turned.header.get_zooms()[:3])
    except _BROKEN as error:
        raise _broken(error) from None
    return array.T[..., ::-1, ::-1, :], (z, y, x)  # [X, Y, Z, C] -> [C, Z, Y, X]


_BROKEN = (OSError, EOFError, ValueError, TypeError, zlib.error, OverflowError)
"""What nibabel, gzip and numpy raise of a damaged file."""


def _broken(error: Exception, what: str = "broken") -> Exception:
    """As a BadImage; but what the system says of a file, which may pass, as it is."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
        return error
    return BadImage(f"{what}: {one_line(error)}")


def _open(path: str) -> tuple[Any, tuple[int, ...]]:
    """(an array mapped from its file or a NIfTI image, its shape [C, D, H, W] or [D, H, W] after turning)."""
    if path.lower().endswith(".npy"):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except _BROKEN as error:
            raise _broken(error, "broken, or a pickle, which is not read") from None
        if array.dtype.kind not in "biuf":
            raise BadImage(f"values of type {array.dtype}; numbers are needed")
        return array, tuple(array.shape)
    try:
        import nibabel
    except ImportError:
        raise UserError(f"{one_line(path)}: NIfTI files need nibabel: pip install 'selfsup[volumes]'") from None
    try:
        image: Any = nibabel.load(path)
        dtype, shape = np.dtype(image.get_data_dtype()), tuple(image.shape)
        if len(shape) in (3, 4):
            order = nibabel.io_orientation(image.affine)[
                :, 0
            ].argsort()  # which axis is the columns, the rows, the slices
            shape = (*(shape[axis] for axis in order), *shape[3:])
    except (*_BROKEN, nibabel.filebasedimages.ImageFileError) as error:
        raise _broken(error) from None
    if dtype.kind not in "biuf":
        raise BadImage(f"values of type {dtype}; numbers are needed")
    return image, shape[::-1]


# ------------------------------------------------------------------------------------------------------------- levels


def scaled(volume: np.ndarray, config: DataConfig) -> np.ndarray:
    """float32 [C, D, H, W] in the file's units -> the same in 0..1, by the window or the percentiles of each channel."""
    volume = np.asarray(volume, np.float32)
    known = np.isfinite(volume)
    out = np.empty_like(volume)
    for c, (values, finite) in enumerate(zip(volume, known)):
        window = config.value_range
        if window is not None:
            own = window[c] if isinstance(window[0], tuple) else window  # of each channel, or of all
            low, high = (float(v) for v in own)
        else:
            found = values[finite]
            low, high = np.percentile(found, config.percentiles) if found.size else (0.0, 1.0)
        out[c] = (np.where(finite, values, low) - low) / max(high - low, 1e-12)
    return out.clip(0, 1)


def levels(volume: np.ndarray, config: DataConfig) -> np.ndarray:
    """As `scaled`, in 256 levels, uint8."""
    return np.rint(scaled(volume, config) * 255).astype(np.uint8)


def resized(volume: Tensor, shape: Sequence[int]) -> Tensor:
    """float [C, D, H, W] -> [C, d, h, w], trilinear, and antialiased along the axes that get shorter; axis by axis.

    The same to the last bit on any number of threads, which a matrix product is not.
    """
    if tuple(volume.shape[1:]) == tuple(shape):
        return volume
    d, h, w = shape
    x = interpolate(volume.flatten(0, 1)[None], size=(h, w), mode="bilinear", antialias=True)  # [1, C*D, h, w]
    x = x.view(volume.shape[0], 1, volume.shape[1], h * w)  # a slice is a row
    x = interpolate(x, size=(d, h * w), mode="bilinear", antialias=True)
    return x.view(volume.shape[0], d, h, w)
