"""`selfsup augment`: images in, more images out; stopped at any time, it goes on where it was and ends with the same bytes.

    OUT/images/CLASS/NAME-0000012_1.png   copy 1 of image 12; copy 0 is the image itself
    OUT/masks/..., OUT/boxes.json         if there are masks and boxes
    OUT/manifest.jsonl                    a line for each: source, file, label, what was drawn
    OUT/recipe.yaml                       the operations, complete: itself a recipe

A line is written when its file is there, in order, all copies of an image at once; so what the manifest holds is what is done.
"""

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from selfsup import durable
from selfsup.augment.folder import HEAD, MANIFEST, alone, append, begin, first_bad, writing
from selfsup.augment.labels import coco
from selfsup.augment.make import Made, Maker
from selfsup.augment.settings import AugmentConfig
from selfsup.augment.transfer import Transfer
from selfsup.data.modules import image_module, through
from selfsup.data.views import COLUMN
from selfsup.data.workers import items
from selfsup.errors import EarlyStop, UserError
from selfsup.log import duration
from selfsup.signals import StopSignals
from selfsup.wording import one_line

_EVERY = 5.0  # seconds between lines of progress


def write(maker: Maker, resume: bool) -> dict[str, int]:
    """Everything into `maker.out`; how many files were written, now and before, and how many images could not be read.

    Raises UserError before anything is there for what the first image shows to be wrong; EarlyStop after a stop signal.
    """
    out = maker.out
    with StopSignals() as signals:

        def look() -> None:
            if signals.received is not None:
                raise EarlyStop(f"stopped; {out} is whole so far; the same command with --resume goes on")

        network = Network(maker.config, maker.source.channels, look) if maker.config.on_device else None
        maker.try_first(network if maker.config.module is not None else None)
        with alone(out):
            text = f"{HEAD}{maker.source.fingerprint()}\n{maker.config.text()}"
            begun = begin(out, text, resume)
            return _write(maker, network, begun, look)


def _write(maker: Maker, network: "Network | None", begun: bool, look: Callable[[], None]) -> dict[str, int]:
    out, count = maker.out, len(maker.source)
    with writing(out / MANIFEST):
        done, counts = _done(out / MANIFEST, begun, maker)
        (out / MANIFEST).touch()
    progress = _Progress(done, count)
    stream = items(maker, done, count, workers=maker.config.workers)
    with open(out / MANIFEST, "ab", buffering=0) as manifest, contextlib.closing(stream):
        for records in _finished(stream, maker, network):
            look()
            with writing(out / MANIFEST):
                append(manifest, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode())
            _count(counts, records)
            _look(counts, maker)
            progress.advance(counts["files"])
        with writing(out / MANIFEST):
            os.fsync(manifest.fileno())
    if counts["bad"]:
        if not counts["files"]:
            raise UserError(f"none of {count:,} images can be read; the first, {first_bad(out)}")
        print(f"{counts['bad']:,} images cannot be read; the first, {first_bad(out)}", file=sys.stderr, flush=True)
    if maker.boxes is not None:
        with open(out / MANIFEST, encoding="utf-8") as lines:
            made = coco([json.loads(line) for line in lines], maker.boxes.categories)
        with writing(out / "boxes.json"):
            durable.write_atomically(out / "boxes.json", json.dumps(made))
    progress.close(counts["files"])
    return counts


def _done(path: Path, begun: bool, maker: Maker) -> tuple[int, dict[str, int]]:
    """How many images are complete, by the manifest, from which what follows is cut off.

    Of those that go through a network whole batches: on another batch its sums may be rounded in another way.
    """
    counts = {"images": 0, "files": 0, "bad": 0}
    if not begun or not path.exists():
        return 0, counts
    each = maker.config.copies + maker.config.originals
    whole = maker.config.batch if maker.config.on_device else 1
    good, place, now = 0, 0, dict(counts)
    group: list[dict[str, Any]] = []
    with open(path, "rb") as lines:
        for line in lines:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if record is None or not _there(maker.out, record):
                break
            place += len(line)
            group.append(record)
            if "bad" in record or len(group) == each:
                _count(now, group)
                group = []
                if now["images"] % whole == 0 or now["images"] == len(maker.source):
                    good, counts = place, dict(now)
    os.truncate(path, good)
    return counts["images"], counts


def _there(out: Path, record: dict[str, Any]) -> bool:
    """Whether the files of a record are, with the bytes that it says."""
    if "bad" in record:
        return True
    try:
        whole = os.stat(out / record["image"]).st_size == record["bytes"]
        return whole and ("mask" not in record or (out / record["mask"]).is_file())
    except OSError:
        return False


def _count(counts: dict[str, int], records: list[dict[str, Any]]) -> None:
    bad = sum("bad" in r for r in records)
    counts["images"] += 1
    counts["bad"] += bad
    counts["files"] += len(records) - bad


def _look(counts: dict[str, int], maker: Maker) -> None:
    bad, seen, most = counts["bad"], counts["images"], maker.config.max_bad_fraction
    if bad >= 10 and bad > most * seen:
        raise UserError(
            f"{bad} of {seen} images cannot be read, more than max_bad_fraction={most:g}; {MANIFEST} lists them ('bad'), "
            f"the first, {first_bad(maker.out)}"
        )


# --------------------------------------------------------------------------------------------------------------- networks


class Network:
    """A batch of images of one size through `module` or `transfer`; `look` is called now and then, and may raise."""

    def __init__(self, config: AugmentConfig, channels: int, look: Callable[[], None] = lambda: None) -> None:
        self.config, self.look = config, look
        name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("device=cuda: torch sees no CUDA device here; use device=cpu or device=auto")
        self.device = torch.device(name)
        if config.module is not None:
            self.module = _Checked(image_module(config.module, channels, self.device), config.module)
        else:
            steps, weight, layers = config.transfer_steps, config.transfer_weight, config.transfer_layers
            self.transfer = Transfer(str(config.transfer), channels, steps, weight, layers, self.device)

    def __call__(self, images: list[np.ndarray], others: list[np.ndarray]) -> list[np.ndarray]:
        """uint8 [H,W,C] each -> the same."""
        self.look()
        x = _stacked(images)
        if self.config.module is not None:
            y = through(self.module, x.to(self.device), np.ones(len(x))).cpu()
        else:
            y = self.transfer(x.float() / 255, _stacked(others).float() / 255, self.look)
            y = (y * 255).round().to(torch.uint8)
        return [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in y]


class _Checked(nn.Module):
    """A user's module with images of any size. Raises UserError naming the size where it fails, and for what is not finite."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, one_line(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [M,C,H,W] -> the same."""
        try:
            y = self.module(x)
        except Exception as error:  # a user's own code
            raise UserError(f"module={self.name!r} cannot take images {list(x.shape)}: {one_line(error)}") from None
        if not isinstance(y, torch.Tensor) or y.shape != x.shape:
            seen = list(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise UserError(f"module={self.name!r} gives {seen} for images {list(x.shape)}; it must keep their shape")
        if not bool(torch.isfinite(y).all()):
            raise UserError(f"module={self.name!r} gives NaN or infinity for images {list(x.shape)}; values are 0 to 1")
        return y


def _stacked(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()  # [M,H,W,C] -> [M,C,H,W]


def _finished(stream: Iterator[Made], maker: Maker, network: Network | None) -> Iterator[list[dict[str, Any]]]:
    """Records of one image after another, whose files are there."""
    if network is None:
        yield from (records for records, _ in stream)
        return
    while held := list(itertools.islice(stream, maker.config.batch)):
        jobs: dict[tuple[int, ...], list[tuple[dict[str, Any], list[np.ndarray]]]] = {}
        for records, waiting in held:
            for record, tensors in zip(records, waiting):
                arrays = [t.numpy() for t in tensors]
                live = record["copy"] > 0 and (maker.config.transfer is None or len(arrays) == 3)
                if maker.config.module is not None:
                    live = live and bool(arrays[1][COLUMN["module"]])
                jobs.setdefault(arrays[0].shape if live else (), []).append((record, arrays))
        for shape, job in jobs.items():
            for start in range(0, len(job), maker.config.batch):
                part = job[start : start + maker.config.batch]
                images = [arrays[0] for _, arrays in part]
                if shape:
                    images = network(images, [arrays[-1] for _, arrays in part])
                for (record, arrays), pixels in zip(part, images, strict=True):
                    record["bytes"] = maker.write(record["image"], maker.finish(pixels, arrays[1], record["copy"]))
        yield from (records for records, _ in held)


class _Progress:
    """A line on stderr now and then: how far, how fast, how long still."""

    def __init__(self, done: int, total: int) -> None:
        self.start, self.done, self.total = done, done, total
        self.began = self.shown = time.monotonic()
        if done:
            print(f"{done:,} of {total:,} images are done; going on", file=sys.stderr, flush=True)

    def advance(self, files: int) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.shown >= _EVERY:
            self.shown = now
            rate = (self.done - self.start) / (now - self.began)
            left = duration((self.total - self.done) / rate)
            text = f"{self.done:,} of {self.total:,} images, {files:,} files, {rate:.1f} images/s, {left} left"
            print(text, file=sys.stderr, flush=True)

    def close(self, files: int) -> None:
        seconds = max(time.monotonic() - self.began, 1e-3)
        rate = (self.done - self.start) / seconds
        print(
            f"{self.done:,} images, {files:,} files in {duration(seconds)} ({rate:.1f} images/s)",
            file=sys.stderr,
            flush=True,
        )
