"""From `data=...` to a source of images."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfsup.config import DataConfig, suggest
from selfsup.data.archives import ZipSource
from selfsup.data.base import Source
from selfsup.data.decode import BadImage, Pixels
from selfsup.data.files import FolderSource, ListSource
from selfsup.data.stacks import StackSource
from selfsup.errors import UserError
from selfsup.wording import one_line

__all__ = ["BadImage", "Pixels", "Source", "Subset", "open_source", "wrap_dataset"]

_DEMO = Path(__file__).parent / "fashion"
_DEMO_SPLITS = ("train", "val")


def open_source(spec: str, *, channels: int, config: DataConfig | None = None) -> Source:
    """The images that `data=SPEC` means, read with so many channels.

    spec: a folder (flat, or with class folders), a .txt list, a .zip, a .npy stack, `demo` or `demo:val` (bundled), or
    `torchvision:NAME[:ROOT[:SPLIT]]`, `timm:NAME[:ROOT[:SPLIT]]`. Raises UserError when there is nothing to read.
    With `config.frames` the clips of videos: see `clips.py`.
    """
    config, shown = config or DataConfig(), f"data={one_line(spec)}"
    kind, _, rest = spec.partition(":")
    if config.frames is not None and kind in ("demo", "torchvision", "timm"):
        raise UserError(
            f"{shown}: holds images, and data.frames={config.frames} asks for clips; give a folder of videos"
        )
    if kind == "demo":  # a folder of that name is ./demo
        split = rest or "train"
        if split not in _DEMO_SPLITS:
            raise UserError(f"{shown}: no such part of the demo images; write demo, demo:train or demo:val")
        return ZipSource(str(_DEMO / f"{split}.zip"), channels, config, title=f"demo:{split}")
    if kind in ("torchvision", "timm") and rest:
        return _open_named(kind, rest, channels, config)
    try:
        path = os.path.expanduser(spec)
    except ValueError as error:  # a NUL, or half a character, after ~
        raise UserError(f"{shown}: not a path: {one_line(error)}") from None
    if config.frames is not None and os.path.exists(path):
        from selfsup.data.clips import open_clips

        return open_clips(path, shown, channels, config)
    if os.path.isdir(path):
        return FolderSource(path, channels, config)
    if not os.path.exists(path):
        near = one_line(suggest(spec, ["demo", "demo:train", "demo:val", *_siblings(path)]))
        raise UserError(
            f"{shown}: no such folder or file{near}; give a folder, a .txt list, demo, or torchvision:NAME:ROOT"
        )
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{shown}: neither a folder nor a file")
    if path.lower().endswith(".txt"):
        return ListSource(path, channels, config)
    if path.lower().endswith(".zip"):
        return ZipSource(path, channels, config)
    if path.lower().endswith(".npy"):
        return StackSource(path, channels, config)
    raise UserError(f"{shown}: neither a .txt list nor a .zip nor a .npy stack; give the folder that holds the images")


def wrap_dataset(dataset: Any, *, channels: int, config: DataConfig | None = None, name: str | None = None) -> Source:
    """A user's map-style data set as a source; see DatasetSource for what its items may be. A Source stays itself."""
    if isinstance(dataset, Source):
        return dataset
    from selfsup.data.datasets import DatasetSource

    return DatasetSource(dataset, channels, config or DataConfig(), name or type(dataset).__name__)


class Subset(Source):
    """Some images of another source, in a given order."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        super().__init__(source.channels, source.config)
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, i: int) -> Pixels:
        return self.source.read(int(self.indices[i]))

    def raw(self, i: int) -> Any:
        return self.source.raw(int(self.indices[i]))

    def stored_bytes(self, i: int) -> int | None:
        return self.source.stored_bytes(int(self.indices[i]))

    @property
    def frame_channels(self) -> int:
        return self.source.frame_channels

    @property
    def labels_at_hand(self) -> bool:
        return self.source.labels_at_hand

    def name(self, i: int) -> str:
        return self.source.name(int(self.indices[i]))

    @property
    def labels(self) -> np.ndarray | None:
        labels = self.source.labels
        return None if labels is None else labels[self.indices]

    def fingerprint(self) -> str:
        return hashlib.sha256(self.source.fingerprint().encode() + self.indices.astype("<i8").tobytes()).hexdigest()


def _open_named(kind: str, rest: str, channels: int, config: DataConfig) -> Source:
    from selfsup.data import datasets

    name, _, tail = rest.partition(":")
    root, _, split = (
        tail.rpartition(":") if tail.rpartition(":")[2] in ("train", "val", "test", "validation") else (tail, "", "")
    )
    opener = datasets.open_torchvision if kind == "torchvision" else datasets.open_timm
    return opener(name, root or None, split or "train", channels, config)


def _siblings(path: str) -> list[str]:
    folder = os.path.dirname(path) or "."
    try:
        return [os.path.join(os.path.dirname(path), name) for name in sorted(os.listdir(folder))[:1000]]
    except (OSError, ValueError):  # ValueError: a NUL
        return []
