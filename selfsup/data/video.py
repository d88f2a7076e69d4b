"""Frames of video files, by PyAV (the extra `video`): those that are wanted are decoded, after a seek to the key frame before.

A file is scanned once when it is opened: packets are read, not decoded, for the times of all frames, so that frame i is the
same picture whatever was decoded before it, with frames stored out of order, and in containers that do not know their
length. Decoding runs on one thread, in the worker that asks.
"""

import bisect
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from selfsup.data.base import SYSTEM, retried, text
from selfsup.data.decode import BadImage, Pixels
from selfsup.errors import UserError
from selfsup.wording import one_line

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp", ".ogv")
"""Of video files, in any case."""

_SUFFIXES = tuple(os.fsencode(s) for s in SUFFIXES)
_FORMATS = {1: "gray", 3: "rgb24"}


def is_video(name: bytes) -> bool:
    """Whether the suffix, in any case, is one of a video file; hidden files are none."""
    return name.lower().endswith(_SUFFIXES) and not name.rpartition(b"/")[2].startswith(b".")


class VideoFile:
    """One file: `count` frames. channels: 1 or 3. Raises BadImage if it is no video that can be read."""

    def __init__(self, path: bytes, channels: int, max_pixels: int) -> None:
        if channels not in _FORMATS:
            raise UserError(f"data: video files give 1 or 3 channels; backbone.in_chans={channels}")
        self.path, self.channels = path, channels
        with self._opened() as (container, stream):
            if stream.width * stream.height > max_pixels:
                raise BadImage(f"more than max_pixels={max_pixels} pixels: {stream.width}x{stream.height}")
            seen = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None and p.size]
        self.times = sorted({time for time, _ in seen})
        self.keys = sorted({time for time, key in seen if key})
        self.count = len(self.times)
        if not self.count:
            raise BadImage("a video without frames")

    def frames(self, wanted: Sequence[int]) -> list[Pixels]:
        """Frames by number from 0, ascending: images of mode L or RGB. Raises BadImage if one cannot be decoded."""
        out: list[Image.Image] = []
        with self._opened() as (container, stream):
            decoded: Iterator[Any] = iter(())
            at: int | None = None  # time of the last frame that was decoded
            for time in (self.times[i] for i in wanted):
                key = self.keys[max(0, bisect.bisect_right(self.keys, time) - 1)] if self.keys else self.times[0]
                if at is None or key > at:  # nothing in between is needed
                    container.seek(key, stream=stream, backward=True)
                    decoded = container.decode(stream)
                for frame in decoded:
                    if frame.pts is not None and frame.pts >= time:
                        break
                else:
                    raise BadImage(f"frame {self.times.index(time)} of {self.count} cannot be decoded")
                if frame.pts != time or frame.is_corrupt:
                    raise BadImage(f"frame {self.times.index(time)} of {self.count} is damaged or missing")
                at = frame.pts
                pixels: np.ndarray = frame.to_ndarray(format=_FORMATS[self.channels])
                out.append(Image.fromarray(pixels))
                if out[-1].size != out[0].size:
                    here, first = (f"{w}x{h}" for w, h in (out[-1].size, out[0].size))
                    raise BadImage(f"frame {self.times.index(time)} is {here}, others are {first}")
        return list(out)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """(container, its first video stream); what PyAV throws comes out as BadImage."""
        av = _pyav(self.path)
        try:
            retried(lambda: os.stat(self.path))
            with av.open(os.fsdecode(self.path)) as container:
                if not container.streams.video:
                    raise BadImage("a file without video")
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1
                yield container, stream
        except (av.FFmpegError, ValueError, OSError) as error:
            if getattr(error, "errno", None) in SYSTEM:
                raise
            raise BadImage(f"broken: {one_line(error, 160)}") from None


def _pyav(path: bytes) -> Any:
    try:
        import av
    except ImportError:
        raise UserError(
            f"data: {one_line(text(path))} is a video file, which PyAV reads: pip install 'selfsup[video]', or give folders "
            "of frames"
        ) from None
    av.logging.set_level(av.logging.PANIC)  # what is wrong is said once, as a BadImage
    return av
