"""Features of frozen backbones: one pass over the images for every layer and pooling, into memory-mapped files.

Each rank computes its own contiguous part of the rows and writes it into the same files. Finished files are kept under
RUN/eval/features/KEY and found again by KEY, a hash of everything the values depend on; the folder may be deleted.
"""

import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup import dist
from selfsup.data.eval_transform import eval_batches
from selfsup.data.sources import BadImage
from selfsup.errors import UserError

from . import results
from .clips import over_clips
from .datasets import Images
from .poolings import Request, check_requests, forward_function
from .progress import Progress
from .settings import FeatureSettings
from .targets import Target

_PIXEL_SIDE = 32  # raw pixels of large photographs are looked at in this size
_STATISTICS_IMAGES = 10_000


@dataclass(frozen=True)
class Transform:
    """What happens to an image: shorter side to `resize`, centre crop to `size`, values in [0, 1] normalised per channel."""

    size: int
    resize: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass
class FeatureFile:
    """Features of N images, one memory-mapped float32 array [N, D] a request; temporary files go with this object."""

    folder: Path
    protocol: dict[str, Any]
    cached: bool = False
    """Whether every array was found from an earlier evaluation."""

    def array(self, request: Request) -> np.ndarray:
        """Rows in the order of the images."""
        return np.load(_file(self.folder, request), mmap_mode="r", allow_pickle=False)

    def readable(self, request: Request) -> np.ndarray:
        """bool [N]: False for images that could not be read; their rows are NaN."""
        return np.isfinite(self.array(request)[:, 0])


# ----------------------------------------------------------------------------------------------------------- transform


def transform_for(target: Target, images: Images, settings: FeatureSettings) -> Transform:
    """The transform of an evaluation. Pixels are normalised by the statistics of `images`, the training ones."""
    if target.backbone is None:
        size = settings.size or min(_PIXEL_SIDE, _native_size(images))
    elif settings.size is not None:
        size = settings.size
    else:
        size = target.config.views.global_.size if target.config is not None else target.backbone.input_size
    if settings.resize is not None and settings.resize < size:
        raise UserError(f"resize={settings.resize} is smaller than the size {size}; the centre crop must fit inside")
    resize = settings.resize or (size if size < 96 else round(size * 256 / 224))
    if target.backbone is not None:
        target.backbone.check_size(size)
        return Transform(size, resize, settings.interpolation, target.backbone.mean, target.backbone.std)
    channels = images.source.channels
    plain = Transform(size, resize, settings.interpolation, (0.0,) * channels, (1.0,) * channels)
    mean, std = _pixel_statistics(images, plain, settings)
    return Transform(size, resize, settings.interpolation, mean, std)


def _native_size(images: Images) -> int:
    """Shorter side of the first readable image."""
    for i in images.indices:
        try:
            height, width = np.asarray(images.source.read(int(i))).shape[:2]
        except BadImage:
            continue
        return min(height, width)
    raise UserError(f"{images.spec}: none of its {len(images)} images can be read")


def _pixel_statistics(
    images: Images, transform: Transform, settings: FeatureSettings
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Channel means and standard deviations over (at most 10,000 evenly spaced) images, every rank all of them."""
    chosen = images.indices[
        np.unique(np.linspace(0, len(images) - 1, min(len(images), _STATISTICS_IMAGES)).astype(int))
    ]
    total, square, count = torch.zeros(()), torch.zeros(()), 0
    for x, _, _ in _batches(images, chosen, transform, settings):
        x = x.double()
        total, square, count = total + x.sum((0, 2, 3)), square + x.square().sum((0, 2, 3)), count + x[:, 0].numel()
    mean = total / count
    std = (square / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return tuple(round(v, 8) for v in mean.tolist()), tuple(round(v, 8) for v in std.tolist())


def _batches(
    images: Images,
    indices: np.ndarray,
    transform: Transform,
    settings: FeatureSettings,
    on_bad: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return eval_batches(
        images.source,
        **asdict(transform),
        batch_size=settings.batch_size,
        workers=settings.workers,
        indices=indices,
        on_bad=on_bad or (lambda name, reason: None),
    )


# ---------------------------------------------------------------------------------------------------------- extraction


def extract(
    target: Target,
    images: Images,
    settings: FeatureSettings,
    requests: Sequence[Request],
    transform: Transform,
    *,
    what: str = "features",
    scratch: Path | None = None,
    quiet: bool = False,
) -> FeatureFile:
    """Features of `images` for every request; every rank calls it and gets the same. `what` names it in the progress.

    scratch: a folder all ranks see, for what is not cached; default: the run, or a temporary one.
    Raises UserError for a layer, pooling or size the backbone does not have, and for features that are not finite.
    """
    check_requests(target, requests)
    requests = list(dict.fromkeys(requests))
    facts = {
        "transform": asdict(transform),
        "resolution": transform.size,
        "precision": settings.precision,
        "device": target.device.type,
    }
    data = images.source.config
    if data.frames is not None:
        facts["clips"] = {"frames": data.frames, "stride": data.stride, "clips": data.clips}
    facts = json.loads(json.dumps(facts))
    token = _agree(secrets.randbits(48) + 1)
    kept = _kept(target, settings, scratch)
    key: dict[str, Any] = {}
    if kept:  # a look at the images, which features that nobody looks for again can do without
        key = {
            "weights": target.checkpoint_hash,
            "images": images.cache_key(),
            **facts,
            "versions": results.versions(),
            "format": 1,
        }
    folder = kept / _digest(key) if kept else _passing(target, scratch) / f".selfsup-features-{token:012x}"
    found = FeatureFile(folder, facts)
    if dist.is_main():
        if not kept:
            weakref.finalize(found, shutil.rmtree, folder, True)
        _make(folder, key)
    mask = _agree(sum(1 << i for i, r in enumerate(requests) if not _file(folder, r).is_file()) + 1) - 1
    missing = [r for i, r in enumerate(requests) if mask >> i & 1]
    if missing:
        _write(target, images, settings, missing, transform, folder, token, what, quiet)
    found.cached = not missing
    return found


def _agree(value: int) -> int:
    """Rank 0's positive number, everywhere."""
    return dist.agree(value if dist.is_main() else 0)


def _file(folder: Path, request: Request) -> Path:
    return folder / f"{request.name}.npy"


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _kept(target: Target, settings: FeatureSettings, scratch: Path | None) -> Path | None:
    """Where features are kept for the next evaluation of the same; None if they are not."""
    if scratch is None and settings.cache and target.run is not None and os.access(target.run, os.W_OK):
        return target.run / "eval" / "features"
    return None


def _passing(target: Target, scratch: Path | None) -> Path:
    """A folder that all ranks see, for features that are not kept."""
    if scratch is not None:
        return scratch
    if dist.env_world()[1] == dist.env_world()[3]:  # one host
        return Path(tempfile.gettempdir())
    in_run = target.run is not None and os.access(target.run, os.W_OK)
    return target.run if in_run and target.run else Path.cwd()


def _make(folder: Path, key: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if key:
            results.write(key, folder / "key.json")
    except OSError as error:
        raise UserError(
            f"{folder}: features cannot be written: {error.strerror}; make room, or use cache=false"
        ) from None


def _write(
    target: Target,
    images: Images,
    settings: FeatureSettings,
    requests: list[Request],
    transform: Transform,
    folder: Path,
    token: int,
    what: str,
    quiet: bool,
) -> None:
    forward = over_clips(forward_function(target, settings, requests), images.source)
    channels = images.source.channels
    widths = [x.shape[1] for x in forward(torch.zeros(1, channels, transform.size, transform.size))]
    partial = [folder / f".partial-{token:012x}-{r.name}.npy" for r in requests]
    if dist.is_main():
        needed = 4 * len(images) * sum(widths)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{folder}: features need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make room"
            )
        for path, width in zip(partial, widths):
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(images), width)).flush()
    dist.barrier()
    files = [np.lib.format.open_memmap(path, mode="r+") for path in partial]
    mine = np.array_split(np.arange(len(images)), dist.world())[dist.rank()]
    written = np.zeros(len(images), dtype=bool)
    bad: list[tuple[str, str]] = []
    progress = Progress(len(mine), what, enabled=dist.is_main() and not quiet)
    error: BaseException | None = None
    try:
        for x, _, ids in _batches(images, images.indices[mine], transform, settings, lambda *item: bad.append(item)):
            rows = np.searchsorted(images.indices, ids.numpy())  # indices ascend
            for request, file, value in zip(requests, files, forward(x)):
                file[rows] = _finite(value, request, target, images, ids)
            written[rows] = True
            progress.advance(len(x))
        missing = mine[~written[mine]]
        for file in files:
            file[missing] = np.nan
            file.flush()
        for name, reason in bad[:5]:
            print(f"{what}: {name} left out: {reason}", file=sys.stderr)
        if len(bad) > 5:
            print(f"{what}: and {len(bad) - 5} more could not be read", file=sys.stderr)
        if len(mine) and len(missing) == len(mine):
            raise UserError(
                f"{images.spec}: none of {len(mine)} images can be read; the first: {bad[0][0]}: {bad[0][1]}"
            )
    except (UserError, OSError) as cause:
        error = cause
    progress.close()
    dist.raise_together(error, "feature extraction")
    if dist.is_main():
        for path, request in zip(partial, requests):
            os.replace(path, _file(folder, request))
    dist.barrier()


def _finite(value: Tensor, request: Request, target: Target, images: Images, ids: Tensor) -> np.ndarray:
    rows = value.cpu()
    broken = (~rows.isfinite().all(dim=1)).nonzero()[:, 0]
    if len(broken):
        name = images.source.name(int(ids[broken[0]]))
        raise UserError(
            f"{target.name}: the {request.name} feature of {name} is not finite; use precision=fp32, or look at the weights"
        )
    return rows.numpy()
