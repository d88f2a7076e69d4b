"""Data sets that are Python objects: a user's, torchvision's, timm's."""

import hashlib
import inspect
import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from selfsup.config import DataConfig, suggest
from selfsup.data.base import Source, reading
from selfsup.data.decode import BadImage, Pixels, convert, from_array
from selfsup.errors import UserError
from selfsup.wording import one_line

_LABEL_ATTRIBUTES = ("targets", "labels", "_labels", "y")


class DatasetSource(Source):
    """A map-style data set whose items are images, (image, label, ...) or dicts with "image" and perhaps "label".

    An image is a PIL image, a tensor [C,H,W] or [H,W], an array [H,W], [H,W,C] or [C,H,W], or the bytes or path of a
    file. What the data set draws at random itself is beyond this library's seeds: give it no random transforms.
    """

    def __init__(self, dataset: Any, channels: int, config: DataConfig, title: str) -> None:
        super().__init__(channels, config)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise UserError(f"data: {title} has no __getitem__ and __len__; a data set with random access is needed")
        if len(dataset) == 0:
            raise UserError(f"data: {title} is empty")
        self.dataset, self._title = dataset, title
        self._labels: np.ndarray | None = None
        self._labels_known = False
        classes = getattr(dataset, "classes", None)
        if isinstance(classes, (list, tuple)):
            self.classes = [str(c if not isinstance(c, tuple) else c[0]) for c in classes]

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> Pixels:
        return self._convert(self.raw(i))

    def raw(self, i: int) -> Any:
        try:
            return _parts(self.dataset[i])[0]
        except (OSError, SyntaxError, EOFError) as error:  # what decoders raise; anything else is a defect to be seen
            raise BadImage(f"broken: {one_line(error)}") from None

    @property
    def labels_at_hand(self) -> bool:
        return self._labels_known or _attribute_labels(self.dataset) is not None

    def _convert(self, image: Any) -> Pixels:
        how = reading(self.config)
        if isinstance(image, Image.Image):
            deep = self.config.depth != 8 and (image.mode in ("I", "F") or image.mode.startswith("I;16"))
            if self.channels in (1, 3, 4) and not deep:
                image = convert(image, self.channels, self.config.value_range, self.config.background)
                if self.config.depth == 8:
                    return image
                how["value_range"] = None  # it is 8 bit by now
            image = np.asarray(image)
        if isinstance(image, torch.Tensor):
            array = (
                image.detach().cpu().float().numpy() if image.dtype == torch.bfloat16 else image.detach().cpu().numpy()
            )
            return from_array(array.transpose(1, 2, 0) if array.ndim == 3 else array, self.channels, **how)
        if isinstance(image, np.ndarray):
            return from_array(image, self.channels, **how)
        if isinstance(image, (bytes, str, os.PathLike)):
            return self.decoded(image)
        raise UserError(
            f"data: {self._title} gives {type(image).__name__}; a PIL image, tensor, array, bytes or path is needed"
        )

    def name(self, i: int) -> str:
        return f"{self._title}[{i}]"

    @property
    def labels(self) -> np.ndarray | None:
        """From the data set's `targets` or `labels`; without those, by reading every item once."""
        if not self._labels_known:
            self._labels = _attribute_labels(self.dataset)
            if self._labels is None and _label_of(self.dataset[0]) is not None:
                found = (_label_of(self.dataset[i]) for i in range(len(self.dataset)))
                self._labels = np.array([-1 if label is None else label for label in found], dtype=np.int64)
            self._labels_known = True
        return self._labels

    def label(self, i: int) -> int:
        if not self._labels_known and (known := _attribute_labels(self.dataset)) is not None:
            self._labels, self._labels_known = known, True
        if self._labels_known:
            return super().label(i)
        label = _label_of(self.dataset[i])
        return -1 if label is None else label

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{len(self)}\n{self._title}".encode()).hexdigest()


def open_torchvision(name: str, root: str | None, split: str, channels: int, config: DataConfig) -> Source:
    """`torchvision.datasets.NAME(root)`, whose files are there already. Raises UserError with the command that fetches them."""
    import torchvision.datasets as zoo

    known = [n for n in zoo.__all__ if inspect.isclass(getattr(zoo, n))]
    kind = {n.lower(): getattr(zoo, n) for n in known}.get(name.lower())
    if kind is None:
        raise UserError(
            f"data: torchvision has no data set {one_line(name)!r}{suggest(name, known)}; see torchvision.datasets"
        )
    root = root or os.path.join(os.path.expanduser("~"), ".cache", "torchvision")
    accepted = inspect.signature(kind.__init__).parameters
    options: dict[str, Any] = {"root": root}
    if "train" in accepted:
        options["train"] = split == "train"
    for key in ("split", "image_set"):
        if key in accepted:
            options[key] = split
    if "download" in accepted:
        options["download"] = False
    try:
        dataset = kind(**options)
    except Exception as error:
        fetch = ", ".join(f"{k}={v!r}" for k, v in {**options, "download": True}.items())
        command = f'python -c "from torchvision.datasets import *; {kind.__name__}({fetch})"'
        hint = f"; fetch it once: {one_line(command, 400)}" if "download" in options else ""
        raise UserError(f"data: torchvision's {kind.__name__} in {one_line(root)}: {one_line(error)}{hint}") from None
    return DatasetSource(dataset, channels, config, f"torchvision:{kind.__name__}:{split}")


def open_timm(name: str, root: str | None, split: str, channels: int, config: DataConfig) -> Source:
    """`timm.data.create_dataset(name, root, split)`; those without random access are refused."""
    from timm.data import create_dataset

    try:
        dataset = create_dataset(name, root=root, split=split)
    except Exception as error:
        raise UserError(f"data: timm's data set {one_line(name)!r} in {one_line(root)}: {one_line(error)}") from None
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, torch.utils.data.IterableDataset):
        raise UserError(
            f"data: timm's {one_line(name)!r} is a stream; training needs random access: give a folder or a hfds/ name"
        )
    return DatasetSource(dataset, channels, config, f"timm:{name}:{split}")


def _parts(item: Any) -> tuple[Any, Any]:
    """(image, label or None) of a data set's item."""
    if isinstance(item, dict):
        image = next((item[k] for k in ("image", "img", "pixel_values") if k in item), None)
        if image is None:
            raise UserError(f"data: an item has the keys {', '.join(map(str, item))}; 'image' is needed")
        return image, next((item[k] for k in ("label", "labels", "target") if k in item), None)
    if isinstance(item, (tuple, list)):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _label_of(item: Any) -> int | None:
    label = _parts(item)[1]
    if isinstance(label, (int, np.integer)):
        return int(label)
    if isinstance(label, (torch.Tensor, np.ndarray)):
        array = np.asarray(label)
        return int(array.reshape(())) if array.size == 1 and array.dtype.kind in "iu" else None
    return None


def _attribute_labels(dataset: Any) -> np.ndarray | None:
    if isinstance(dataset, torch.utils.data.Subset):
        whole = _attribute_labels(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    for key in _LABEL_ATTRIBUTES:
        values = getattr(dataset, key, None)
        if values is None or callable(values):
            continue
        array = np.asarray(values)
        if array.shape == (len(dataset),) and array.dtype.kind in "iu":
            return array.astype(np.int64)
    return None
