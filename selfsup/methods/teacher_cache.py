"""`teacher.cache=FOLDER`: what a frozen teacher said, kept by image and augmentation, in half precision.

The augmentation repeats after `teacher.cache_epochs` epochs, so that an image is seen in so many ways and no more. A row
is what the teacher says of one image, in one draw of its augmentation, in one view. The first pass fills the rows, later
ones read them; both use the numbers as they are stored, so that a run computes the same whether it finds a row or not.
The images of a micro-batch are all read or all computed.

    FOLDER/cache.json                  what the rows depend on: the teacher's weights, data, seed, views, what is kept
    FOLDER/rank_00000/logits           one file an output, rows of fixed size; written by this rank alone
    FOLDER/rank_00000/checksums        uint32 a row, written after the row; 0: there is none

A row counts if its checksum fits: one that a kill or a lost power left half written is computed again. Ranks read one
another's rows. Images are told by their numbers in the data's list of names, not by their contents; of a data set that
augments at random by itself nothing can be kept, which is tried on its first images.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsup import dist, durable
from selfsup.config import Config
from selfsup.data.base import Source
from selfsup.data.decode import BadImage
from selfsup.data.views import View
from selfsup.errors import DiskError, UserError
from selfsup.losses.logits import keep_top
from selfsup.methods.contract import ViewBatch
from selfsup.methods.outputs import Outputs, Wanted
from selfsup.methods.teachers import Teacher

_LARGEST = 65504.0
"""Of float16."""

_WORDS = {
    "teacher": "another teacher",
    "data": "other data",
    "images": "other data",
    "seed": "another seed",
    "views": "other views",
    "epochs": "another teacher.cache_epochs",
    "outputs": "other outputs of the teacher, for other losses",
    "layers": "other layers of the teacher",
    "view_count": "other views",
    "precision": "another precision",
    "temperature": "another temperature",
    "topk": "another teacher.cache_topk",
    "format": "another version of selfsup",
}


class TeacherCache:
    """Rows of one data set, one teacher and one set of views; see above."""

    def __init__(
        self,
        folder: str | Path,
        key: Mapping[str, Any],
        example: Outputs,
        *,
        images: int,
        epochs: int,
        views: int,
        rank: int = 0,
        topk: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        """key: what the rows depend on besides the rest here. example: outputs of one image, for names and shapes.

        Raises UserError if the folder holds rows of another key, or cannot be written.
        """
        self.images, self.epochs, self.views = images, epochs, views
        self.topk, self.temperature = topk, temperature
        self.folder, self.rank = Path(folder), rank
        encoded = self._encode(example)
        self.layout = {name: (value.shape[1:], value.dtype) for name, value in encoded.items()}
        full = {
            "format": 1,
            **key,
            "images": images,
            "epochs": epochs,
            "topk": topk,
            "temperature": temperature if topk else None,
            "outputs": {name: [list(shape), str(dtype)] for name, (shape, dtype) in self.layout.items()},
            "view_count": views,
        }
        try:
            _claim(self.folder, json.loads(json.dumps(full)))
            self._own = _Rows(self.folder / f"rank_{rank:05d}", self.layout, self.count, create=True)
        except OSError as error:
            raise _failed(self.folder, error) from None
        self._others: dict[str, _Rows] = {}
        self.hits = self.misses = 0

    @property
    def count(self) -> int:
        """Rows in all."""
        return self.images * self.epochs * self.views

    def rows(self, ids: Tensor, draws: Tensor) -> np.ndarray:
        """ids, draws: int64 [B] on the host -> numbers of rows [views * B], views first as in a batch."""
        first = (draws.numpy() % self.epochs * self.images + ids.numpy()) * self.views  # [B]
        return (first[None, :] + np.arange(self.views)[:, None]).reshape(-1)  # [views, B] -> [views * B]

    def __call__(self, rows: np.ndarray, compute: Callable[[], Outputs], like: Tensor) -> Outputs:
        """Of these rows [N]: as they are kept, or computed and kept from now on. like: for device and dtype."""
        try:
            found = self._read(rows)
            if found is None:
                self.misses += 1
                found = self._encode(compute())
                self._write(rows, found)
            else:
                self.hits += 1
        except OSError as error:
            raise _failed(self.folder, error) from None
        return self._decode(found, like)

    def decoded(self, outputs: Outputs, like: Tensor) -> Outputs:
        """As if they had been kept and read again."""
        return self._decode(self._encode(outputs), like)

    # ------------------------------------------------------------------------------------------------ what is stored

    def _encode(self, outputs: Outputs) -> dict[str, np.ndarray]:
        tensors = outputs.named()
        if self.topk is not None and outputs.logits is not None:
            del tensors["logits"]
            k = min(self.topk, outputs.logits.shape[1])
            top = keep_top(outputs.logits, k, self.temperature)
            tensors |= dict(zip(("top_indices", "top_values", "top_rest"), top, strict=True))
        return {name: _plain(name, value) for name, value in tensors.items()}

    def _decode(self, arrays: Mapping[str, np.ndarray], like: Tensor) -> Outputs:
        out = {}
        for name, array in arrays.items():
            tensor = torch.from_numpy(array)
            tensor = tensor.long() if name == "top_indices" else tensor.to(like.dtype)
            if like.device.type == "cuda":
                tensor = tensor.pin_memory()
            out[name] = tensor.to(like.device, non_blocking=True)
        return Outputs.of(out)

    def _read(self, rows: np.ndarray) -> dict[str, np.ndarray] | None:
        """All of the rows [N], or None if one is missing."""
        out = {name: np.empty((len(rows), *shape), dtype) for name, (shape, dtype) in self.layout.items()}
        missing = np.arange(len(rows))
        for look_again in (False, True):
            for part in [self._own, *self._neighbours(look_again)]:
                if missing.size:
                    good = part.read(rows[missing], out, missing)
                    missing = missing[~good]
            if not missing.size:
                return out
        return None

    def _neighbours(self, look_again: bool) -> list["_Rows"]:
        """Of other ranks, by number; looks for new ones if asked."""
        if look_again:
            for path in sorted(self.folder.glob("rank_*")):
                if path.name != f"rank_{self.rank:05d}" and path.name not in self._others:
                    other = _Rows.opened(path, self.layout, self.count)
                    if other is not None:
                        self._others[path.name] = other
        return [self._others[name] for name in sorted(self._others)]

    def _write(self, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        self._own.write(rows, arrays)


class _Rows:
    """The files of one rank: written with `pwrite` (a full disk is an error, not a signal), read through memory maps."""

    def __init__(self, folder: Path, layout: Mapping[str, tuple[Any, Any]], count: int, create: bool = False) -> None:
        self.layout = layout
        sizes = {name: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for name, (shape, dtype) in layout.items()}
        self._row_bytes = sizes
        names = {**{name: size * count for name, size in sizes.items()}, "checksums": 4 * count}  # checksums last
        if create:
            folder.mkdir(parents=True, exist_ok=True)
            self._files = {}
            for name, size in names.items():
                self._files[name] = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                os.ftruncate(self._files[name], size)  # sparse: no space before rows are written
        self._maps = {
            name: np.memmap(folder / name, dtype, "r", shape=(count, *shape)) for name, (shape, dtype) in layout.items()
        }
        self._sums = np.memmap(folder / "checksums", np.uint32, "r", shape=(count,))

    @classmethod
    def opened(cls, folder: Path, layout: Mapping[str, tuple[Any, Any]], count: int) -> "_Rows | None":
        """To read; None if another process is still making it."""
        try:
            complete = (folder / "checksums").stat().st_size == 4 * count
            return cls(folder, layout, count) if complete else None
        except (OSError, ValueError):
            return None

    def read(self, rows: np.ndarray, out: Mapping[str, np.ndarray], places: np.ndarray) -> np.ndarray:
        """Put rows [n] into out[name][places]; bool [n]: which of them are there and whole."""
        stored = np.asarray(self._sums[rows])  # [n]
        good = stored != 0
        for i in np.flatnonzero(good).tolist():
            row, total = rows[i], 0
            for name, array in self._maps.items():
                value = array[row]
                total = zlib.crc32(value.tobytes(), total)
                out[name][places[i]] = value
            good[i] = (total or 1) == stored[i]
        return good

    def write(self, rows: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Rows [n] of arrays [n, ...]; those that are not finite are left out, those that are there left alone."""
        for i, row in enumerate(rows.tolist()):
            values = {name: arrays[name][i].tobytes() for name in self.layout}
            if not all(np.isfinite(arrays[name][i]).all() or name == "top_rest" for name in self.layout):
                continue
            total = 0
            for value in values.values():
                total = zlib.crc32(value, total)
            total = total or 1
            if self._sums[row] == total and all(self._maps[name][row].tobytes() == v for name, v in values.items()):
                continue
            for name, value in values.items():
                _write_at(self._files[name], value, row * self._row_bytes[name])
            _write_at(self._files["checksums"], np.uint32(total).tobytes(), 4 * row)


def _write_at(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def _plain(name: str, value: Tensor) -> np.ndarray:
    if name == "top_indices":
        return value.to("cpu", torch.int32).contiguous().numpy()
    if name == "top_rest":
        return value.to("cpu", torch.float32).contiguous().numpy()
    return value.float().clamp(-_LARGEST, _LARGEST).to("cpu", torch.float16).contiguous().numpy()


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Make the folder one for this key. Raises UserError if it is one for another."""
    path = folder / "cache.json"
    folder.mkdir(parents=True, exist_ok=True)
    names = {name for name in os.listdir(folder) if not name.startswith(durable.TEMPORARY)}
    if not names:
        durable.write_atomically(path, json.dumps(key, indent=1, sort_keys=True) + "\n")  # other ranks write the same
        return
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"teacher.cache={folder}: holds other things; name a new folder, or an empty one") from None
    except ValueError:
        raise UserError(f"{path}: damaged; delete {folder}, and it is filled again") from None
    changed = [name for name in key if not isinstance(found, dict) or found.get(name) != key[name]]
    if changed:
        what = " and ".join(dict.fromkeys(_WORDS.get(name, name) for name in changed))
        raise UserError(f"teacher.cache={folder}: was made with {what}; name another folder, or delete it")


def _failed(folder: Path, error: OSError) -> UserError:
    return DiskError(f"teacher.cache={folder}: cannot be written or read: {error.strerror or error}")


def open_cache(
    config: Config, teacher: Teacher, wanted: Wanted, source: Source, views: Sequence[View], temperature: float
) -> TeacherCache | None:
    """The cache of `config.teacher.cache` for a teacher that sees `views` of `source`; None if there is to be none.

    temperature: at which the largest logits will be used, with `cache_topk`. Raises UserError for a stale cache, and where
    what the teacher sees is not the same each time.
    """
    wish = config.teacher
    if wish.cache is None:
        return None
    _refuse_random(source, wish.cache)
    size, channels = views[0].size, len(config.mean)
    like = next(teacher.net.parameters(), torch.zeros(()))
    example = teacher(torch.zeros(1, channels, size, size, device=like.device, dtype=like.dtype), wanted)
    seen = [[v.name, v.number, v.index, v.crops.model_dump(mode="json")] for v in views]
    sizes: list[Any] = [teacher.mean, teacher.std, teacher.size, config.mean, config.std, config.data.value_range]
    if config.data.depth != 8 or min(config.data.background) < 255:
        sizes += [config.data.depth, config.data.background]
    if config.data.frames is not None:
        sizes += [config.data.frames, config.data.stride]
    if config.volumes:
        sizes += [config.data.percentiles, config.data.channel, config.data.spacing]
    key = {
        "teacher": teacher.sha256.hex(),
        "data": source.fingerprint(),
        "seed": config.seed,
        "views": hashlib.sha256(json.dumps([seen, sizes], sort_keys=True).encode()).hexdigest(),
        "layers": list(wanted.layers),
        "precision": config.precision,
    }
    return TeacherCache(
        wish.cache,
        key,
        example,
        images=len(source),
        epochs=wish.cache_epochs,
        views=len(views),
        rank=dist.rank(),
        topk=wish.cache_topk,
        temperature=temperature,
    )


def ask(teacher: Teacher, cache: TeacherCache | None, images: Tensor, wanted: Wanted, batch: ViewBatch) -> Outputs:
    """What the teacher says of a batch's views [V * B, C, S, S], from the cache where there is one."""
    if cache is None:
        return teacher(images, wanted)
    if batch.rows is None:
        return cache.decoded(teacher(images, wanted), images)
    return cache(cache.rows(*batch.rows), lambda: teacher(images, wanted), images)


def _refuse_random(source: Source, folder: str) -> None:
    """Raise UserError if images of the source are not the same when they are read again."""
    for i in range(min(len(source), 8)):
        try:
            first, second = np.asarray(source.read(i)), np.asarray(source.read(i))
        except BadImage:  # told of elsewhere
            continue
        if first.shape != second.shape or not np.array_equal(first, second):
            raise UserError(
                f"teacher.cache={folder}: {source.name(i)} is another image each time it is read, and outputs are kept by image; "
                "take the random transforms out of the data set (views.* has them), or leave teacher.cache out"
            )
