"""Pictures of a run folder, inside the page."""

import base64
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}
_ELSEWHERE = {
    "backbone",
    "checkpoints",
    "code",
    "features",
    "job",
    "logs",
    "profile",
    "ranks",
    "refused",
    "tensorboard",
}
_DEEPEST = 3
MOST_PICTURES = 40
"""Of one run."""
_MOST_PIXELS = 60_000_000
_WIDEST = 1800
_AS_IT_IS = 250_000
"""Bytes up to which a picture is taken over unchanged."""


@dataclass(frozen=True)
class Picture:
    """One, as a data: address."""

    name: str
    """Path in the run folder."""
    address: str
    size: tuple[int, int]
    """Width and height in pixels."""


def pictures(folder: Path, budget: int) -> tuple[list[Picture], list[str]]:
    """Those in a run folder, and remarks on those that are left out.

    budget: bytes of them all in the page. Large ones are made smaller; what cannot be decoded is left out, as the page would
    show a broken one.
    """
    found: list[Picture] = []
    remarks, left, too_many = [], budget, 0
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if len(found) >= MOST_PICTURES:
            too_many += 1
            continue
        try:
            data, kind, size = _encoded(path)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            remarks.append(f"{name}: no picture that can be shown: {error}")
            continue
        if len(data) * 4 / 3 > left:
            too_many += 1
            continue
        left -= len(data) * 4 // 3
        found.append(Picture(name, f"data:image/{kind};base64,{base64.b64encode(data).decode()}", size))
    if too_many:
        remarks.append(f"{too_many} further picture(s) in {folder} are left out, to keep the page small")
    return found, remarks


def _files(folder: Path) -> Iterator[Path]:
    """Those of the folder itself first, then those of the folders in it."""
    for here, folders, names in os.walk(folder):
        depth = len(Path(here).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if f not in _ELSEWHERE and not f.startswith(".") and depth < _DEEPEST)
        if depth and (Path(here) / "config.yaml").is_file():  # another run
            folders.clear()
            continue
        for name in sorted(names):
            path = Path(here, name)
            if (
                path.suffix.lower() in _SUFFIXES
                and not name.startswith(".")
                and path.is_file()
                and not path.is_symlink()
            ):
                yield path


def _encoded(path: Path) -> tuple[bytes, str, tuple[int, int]]:
    """(bytes, kind, (width, height)): the file itself if it is small, else at most _WIDEST wide, as WebP. Raises OSError."""
    with Image.open(path) as picture:
        width, height = picture.size
        if width * height > _MOST_PIXELS:
            raise ValueError(f"{width} x {height} pixels")
        kind = (picture.format or "").lower()
        picture.load()
        if path.stat().st_size <= _AS_IT_IS and kind in ("png", "jpeg", "webp", "gif"):
            return path.read_bytes(), kind, picture.size
        small = picture.convert("RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB")
        if width > _WIDEST:
            small = small.resize((_WIDEST, max(1, round(height * _WIDEST / width))), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        small.save(out, "WEBP", quality=88, method=2)
        return out.getvalue(), "webp", small.size
