"""Clips: some frames of a video, which is a folder of pictures or a video file.

data=FOLDER data.frames=8 finds videos below FOLDER: every folder that holds pictures itself is one, its frames in the order
of the numbers in their names; every file of `video.SUFFIXES` is one (read by PyAV). The first level of folders are the
classes, if there are two or more and every video lies below one. A .txt list names a video a line, and optionally its label.

A clip is `frames` frames, `stride` apart. Its first frame is drawn uniformly, and for evaluations the clip is the middle
one (or `data.clips` of them, evenly spaced). Of a video that is too short the stride is lowered as far as needed, to 1 at
least; if there are still fewer frames than the clip has, the last frame is repeated.

Temporal multi-crop: each view is a clip of its own, `views.global.frames` and `.stride` wide in time, `views.local.*`
narrow, as SVT (Ranasinghe et al., 2022, "Self-supervised Video Transformer", section 3.2) and BraVe (Recasens et al., 2021,
"Broaden Your Views for Self-Supervised Video Learning", section 3) have it. Place, flip and colours are drawn once a clip.
"""

import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from selfsup.config import DataConfig
from selfsup.data import video
from selfsup.data.base import Source, reading, retried, text
from selfsup.data.batch import pixel_size
from selfsup.data.clip_frames import centred
from selfsup.data.decode import BadImage, Pixels, decode, read_file
from selfsup.data.files import ListSource, is_image, labelled
from selfsup.errors import UserError
from selfsup.wording import one_line


class Video(Protocol):
    """A video that has been opened: how many frames there are, and some of them."""

    count: int

    def frames(self, wanted: Sequence[int]) -> list[Pixels]:
        """Decoded frames, of one size; wanted: ascending numbers from 0. Raises BadImage."""
        ...


class FrameFolder:
    """A video that is a folder of pictures. Raises BadImage if there are none."""

    def __init__(self, path: bytes, channels: int, config: DataConfig) -> None:
        self.path, self.channels, self.config = path, channels, config
        self.names = retried(lambda: frame_names(path))
        self.count = len(self.names)
        if not self.count:
            raise BadImage("a folder without pictures")

    def frames(self, wanted: Sequence[int]) -> list[Pixels]:
        """See `Video`."""
        out: list[Pixels] = []
        for name in [self.names[i] for i in wanted]:
            try:
                out.append(self._read(os.path.join(self.path, name)))
            except BadImage as error:
                raise BadImage(f"frame {text(name)}: {error}") from None
            if pixel_size(out[-1]) != pixel_size(out[0]):
                here, first = (f"{w}x{h}" for h, w in (pixel_size(out[-1]), pixel_size(out[0])))
                raise BadImage(f"frame {text(name)} is {here}, others are {first}")
        return out

    def _read(self, path: bytes) -> Pixels:
        limit = self.config.max_pixels
        data = retried(lambda: read_file(path, self.channels, limit))
        return decode(data, self.channels, **reading(self.config))


def frame_names(folder: bytes) -> list[bytes]:
    """Pictures of a folder in the order of the numbers in their names: f2.png before f10.png."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if is_image(e.name)]
    return sorted(names, key=lambda name: ([int(n) for n in re.findall(rb"\d+", name)], name))


class _Clips(Source):
    """What sources of clips share. `channels`: values a pixel of what `read` gives, frames * clips * `frame_channels`."""

    config: DataConfig

    def setup(self, channels: int) -> None:
        """channels: of a frame."""
        self._frame_channels = channels
        self.channels = channels * (self.config.frames or 1) * self.config.clips

    @property
    def frame_channels(self) -> int:
        return self._frame_channels

    @abstractmethod
    def path(self, i: int) -> bytes:
        """Of video i."""

    def video(self, i: int) -> Video:
        """Video i, opened. Raises BadImage if it cannot be."""
        path = self.path(i)
        if os.path.isdir(path):
            return FrameFolder(path, self._frame_channels, self.config)
        return video.VideoFile(path, self._frame_channels, self.config.max_pixels)

    def read(self, i: int) -> np.ndarray:
        """The clips of an evaluation, frame after frame in the channels: uint8 [H, W, clips * T * C]."""
        opened, c = self.video(i), self.config
        chosen = [n for start in range(c.clips) for n in centred(opened.count, c.frames or 1, c.stride, start, c.clips)]
        wanted = sorted(set(chosen))
        found = dict(zip(wanted, map(np.asarray, opened.frames(wanted)), strict=True))
        return np.concatenate([np.atleast_3d(found[n]) for n in chosen], axis=2)

    def raw(self, i: int) -> np.ndarray:
        return self.read(i)

    def stored_bytes(self, i: int) -> None:
        return None

    def name(self, i: int) -> str:
        return text(self.path(i))


class ClipFolder(_Clips):
    """Videos below a folder; see above."""

    def __init__(self, root: str, channels: int, config: DataConfig) -> None:
        super().__init__(channels, config)
        self.setup(channels)
        self.root = os.fsencode(root)
        self._names, self._labels, self.classes = labelled(_walk(self.root))
        if not len(self._names):
            raise UserError(
                f"data: no videos in {one_line(root)}; looked in it and below for folders of pictures and files that end in "
                f"{' '.join(video.SUFFIXES)}"
            )

    def __len__(self) -> int:
        return len(self._names)

    def path(self, i: int) -> bytes:
        return os.path.join(self.root, self._names[i])

    @property
    def labels(self) -> np.ndarray | None:
        return self._labels

    def fingerprint(self) -> str:
        return self._names.fingerprint


class ClipList(_Clips):
    """Videos (folders or files) named in a text file: a path a line, then optionally a tab or a space and a label."""

    def __init__(self, path: str, channels: int, config: DataConfig) -> None:
        super().__init__(channels, config)
        self.setup(channels)
        self._list = _Lines(path, channels, config)
        self.classes = self._list.classes

    def __len__(self) -> int:
        return len(self._list)

    def path(self, i: int) -> bytes:
        return self._list.path(i)

    @property
    def labels(self) -> np.ndarray | None:
        return self._list.labels

    def fingerprint(self) -> str:
        return self._list.fingerprint()


class _Lines(ListSource):
    """The list itself."""

    def path(self, i: int) -> bytes:
        return self._path(i)

    @staticmethod
    def split_line(line: bytes) -> tuple[bytes, bytes]:
        """(path, label); a space splits before a number, or after the name of a video file."""
        name, tab, label = line.rpartition(b"\t")
        if not tab:
            name, _, label = line.strip().rpartition(b" ")
            if not name or not (label.lstrip(b"-").isdigit() or video.is_video(name.rstrip())):
                return line.strip(), b""
        return name.strip(), label.strip()


def open_clips(path: str, shown: str, channels: int, config: DataConfig) -> Source:
    """A folder of videos, a list of them, or one file; shown: what the user wrote."""
    if os.path.isdir(path):
        return ClipFolder(path, channels, config)
    if path.lower().endswith(".txt") and os.path.isfile(path):
        return ClipList(path, channels, config)
    raise UserError(f"{shown}: with data.frames={config.frames} give a folder of videos, or a .txt list of them")


def _walk(root: bytes) -> Iterator[bytes]:
    """Relative paths of videos below `root`: of each folder itself, its files, then its subfolders, sorted by bytes.

    Links to folders are followed, but into no folder twice.
    """
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_unreadable):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen:
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(b"."))
        below = os.path.relpath(folder, root)
        if any(is_image(name) for name in files):
            if below == b".":
                raise UserError(
                    f"data: {one_line(text(root))} holds pictures itself: with data.frames each video is a folder of its own "
                    "in it; leave data.frames out if these are images"
                )
            yield below
        prefix = b"" if below == b"." else below + b"/"
        yield from (prefix + name for name in sorted(files) if video.is_video(name))


def _unreadable(error: OSError) -> None:
    raise UserError(f"data: the folder {one_line(error.filename)} cannot be read: {error.strerror}") from None
