"""What the verbs that draw share: which images, read and as they are displayed, and where the picture is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup.data.eval_transform import eval_batches
from selfsup.data.sources import open_source
from selfsup.errors import UserError

from . import results
from .class_names import val_of
from .datasets import Images, channels_of, data_options
from .features import Transform
from .settings import FeatureSettings, ImageSettings, resolve
from .targets import Target, open_target


@dataclass
class Shown:
    """Images, with labels where there are any."""

    images: Images
    labels: np.ndarray | None
    """int64 [N], -1 where unlabelled."""
    names: list[str] | None

    def few(self, count: int) -> np.ndarray:
        """At most `count` ascending rows or, with labels, the first of every class, then the second ones, and so on."""
        if self.labels is not None:
            return one_per_class(self.labels, count)
        return spread(len(self.images), count)


def begin(task: str, target: str, overrides: list[str], out: Path | None) -> tuple[Any, Target, Path]:
    """(settings, opened target, the picture's file) of a verb. Raises UserError before any work is done."""
    settings: Any = resolve(task, overrides)
    check_picture(out)
    opened = open_target(target, device=settings.device)
    return settings, opened, picture_path(task, opened, out)


def check_picture(out: Path | None, option: str = "--out") -> None:
    """Refuse a file that cannot be written, or is no .png."""
    results.check_destination(out, option)
    if out is not None and out.suffix.lower() != ".png":
        raise UserError(f"{option} {out}: pictures are PNG files; name one that ends in .png")


def picture_path(task: str, target: Target, out: Path | None) -> Path:
    """`out`, or RUN/pictures/TASK*.png. Raises UserError for a target outside any run if `out` is None."""
    path = out
    if path is None and target.run is not None:
        path = target.run / "pictures" / results.file_name(task, target.kind).replace(".json", ".png")
    if path is None:
        raise UserError(f"eval {task} {target.name}: it belongs to no run; name the picture with --out FILE.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be made: {error.strerror}; name another file with --out") from None
    return path


def beside(task: str, target: Target, out: Path | None) -> Path | None:
    """The picture of a task whose result is written to `out`, or into the run; None where there is neither."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        return out.with_suffix(".png")
    return picture_path(task, target, None) if target.run is not None else None


def said(path: Path) -> dict[str, Any]:
    """Tell where the picture is."""
    print(f"written to {path}")
    return {"picture": str(path)}


def val_spec(target: Target, settings: ImageSettings) -> str:
    """`eval.val`, `data.val`, `data`, `eval.train`, else the run's val images, else what it was trained on."""
    given = settings.eval.val or settings.data.val or settings.data.path or settings.eval.train
    if given is not None:
        return given
    if target.config is None:
        raise UserError(f"eval of {target.name}: no images; give data=FOLDER")
    return val_of(target.config) or target.config.data.path


def open_shown(target: Target, settings: FeatureSettings, spec: str | None = None) -> Shown:
    """Images of `spec` (default: `val_spec`), with or without labels. Raises UserError if there are none."""
    spec = spec or val_spec(target, settings)
    source = open_source(spec, channels=channels_of(target, settings, spec), config=data_options(target, settings))
    labels = source.labels
    known = labels is not None and bool((np.asarray(labels) >= 0).any())
    return Shown(
        Images(source, np.arange(len(source)), spec),
        np.asarray(labels, dtype=np.int64) if known else None,
        source.classes if known else None,
    )


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` evenly spaced rows of `total`."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int))


def one_per_class(labels: np.ndarray, count: int) -> np.ndarray:
    """`count` rows: the first of every class, then the second ones, and so on."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        turn[members] = np.arange(len(members))
    return np.lexsort((labels, turn))[:count]


def read(images: Images, rows: np.ndarray, transform: Transform) -> tuple[Tensor, np.ndarray]:
    """(images [N, C, S, S], their rows), in the order of `rows`, of those that can be read."""
    order = np.argsort(rows, kind="stable")
    found, ids = [], []
    indices = images.indices[rows[order]]
    for x, _, i in eval_batches(
        images.source, size=transform.size, resize=transform.resize, interpolation=transform.interpolation,
        mean=transform.mean, std=transform.std, batch_size=64, workers=0, indices=indices, on_bad=lambda name, reason: None,
    ):  # fmt: skip
        found.append(x)
        ids.append(i.numpy())
    if not found:
        raise UserError(f"{images.spec}: none of {len(rows)} images can be read; there is nothing to draw")
    place = {int(row): n for n, row in enumerate(np.searchsorted(images.indices, np.concatenate(ids)))}
    kept = np.array([row for row in rows if int(row) in place], dtype=np.int64)
    return torch.cat(found)[[place[int(row)] for row in kept]], kept


def displayed(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """[N, C, S, S] normalised -> [N, S, S, 3] in [0, 1]: one channel as grey, of two the first, of more the first three."""
    middle = images.shape[1] // len(mean) // 2 * len(mean)  # of a clip its middle frame
    images = images[:, middle : middle + len(mean)]
    m, s = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
    x = (images.cpu() * s + m).clamp(0, 1)
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    return x.permute(0, 2, 3, 1).numpy()


def rgb(pixels: np.ndarray) -> np.ndarray:
    """[H, W, C] -> [H, W, 3], of the same type: fewer than three channels as grey, of more the first three."""
    return pixels[:, :, :3] if pixels.shape[2] >= 3 else np.repeat(pixels[:, :, :1], 3, axis=2)
