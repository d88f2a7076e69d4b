"""RUN/code: the program as it was when a run was submitted, which all its jobs run, whatever is edited meanwhile."""

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import selfsup
from selfsup import durable
from selfsup.config import Config
from selfsup.errors import UserError

FOLDER = "code"
PARTS = ("eval", "launch")
"""Subpackages that lie beside the package in a checkout, and within it when it is installed."""
_MOST_FILES, _MOST_BYTES = 5000, 200_000_000


def take(folder: Path, config: Config | None) -> str:
    """Make folder/code, or replace it: this package, and the top-level package or module of a method from outside it.

    What is installed (in site-packages) is not copied: jobs use the environment as it is. Nor are other modules that the
    user's method imports, beyond its own package: those are found as ever, through PYTHONPATH.
    Returns the sha256 of names and contents. Raises UserError.
    """
    files = _ours() | _of_method(config)
    temporary, old = (folder / f"{durable.TEMPORARY}{FOLDER}{end}-{os.getpid()}" for end in ("", "-old"))
    digest = hashlib.sha256()
    try:
        for name in sorted(files):
            content = files[name].read_bytes()
            digest.update(f"{len(name.encode())} {len(content)} {name}".encode() + content)
            target = temporary / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if (folder / FOLDER).exists():
            durable.rename(folder / FOLDER, old)
        durable.rename(temporary, folder / FOLDER)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: the code cannot be copied: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return digest.hexdigest()


def _ours() -> dict[str, Path]:
    """Name in the snapshot -> file."""
    found = dict(_files(Path(selfsup.__path__[0]), "selfsup"))
    for part in PARTS:
        package = importlib.util.find_spec(f"selfsup.{part}")
        assert package is not None and package.submodule_search_locations
        found |= _files(Path(package.submodule_search_locations[0]), f"selfsup/{part}")
    return found


def _of_method(config: Config | None) -> dict[str, Path]:
    """The same of a method named 'package.module:Class'; {} for ours, and for one that is installed."""
    module, colon, _ = config.method.name.partition(":") if config is not None else ("", "", "")
    top = module.partition(".")[0]
    if not colon or top == "selfsup":
        return {}
    assert config is not None
    places = _places(top)
    if places is None:
        where = f"neither on PYTHONPATH nor in {os.getcwd()}"
        raise UserError(f"method.name={config.method.name!r}: no module {top!r}: {where}")
    found: dict[str, Path] = {}
    for place in reversed(places):  # of a package in several folders the first wins
        if _installed(place):
            continue
        if place.is_file():
            found[place.name] = place
        elif place.is_dir():
            found |= _bounded(_files(place, top), place, config.method.name)
    return found


def _places(top: str) -> list[Path] | None:
    """The file or the folders of a top-level name, which is not imported; None if there is no such module."""
    importlib.invalidate_caches()
    spec = None
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(top)
    spec = spec or importlib.machinery.PathFinder.find_spec(top, [os.getcwd()])
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return [Path(place).absolute() for place in spec.submodule_search_locations]
    return [Path(spec.origin).absolute()] if spec.origin and spec.has_location else []


def _installed(place: Path) -> bool:
    libraries = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return bool({"site-packages", "dist-packages"} & set(place.parts) or libraries & {*place.resolve().parents})


def _files(root: Path, name: str) -> Iterator[tuple[str, Path]]:
    """(name/path, file) of everything in a package but caches and hidden files; links are followed, once."""
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [each for each in folders if each != "__pycache__" and not each.startswith(".")]
        for file in files:
            path = Path(folder, file)
            if path.suffix != ".pyc" and not file.startswith(".") and path.is_file():
                yield f"{name}/{path.relative_to(root).as_posix()}", path


def _bounded(files: Iterator[tuple[str, Path]], place: Path, name: str) -> dict[str, Path]:
    """A user's package may be a folder that holds data and runs as well: that is said, not copied for hours."""
    found, size = {}, 0
    for target, path in files:
        found[target] = path
        size += path.stat().st_size
        if len(found) > _MOST_FILES or size > _MOST_BYTES:
            most = f"{_MOST_FILES} files or {_MOST_BYTES // 10**6} MB"
            raise UserError(
                f"method.name={name!r}: its package {place} is copied for the jobs, and holds more than {most}; "
                "keep data and runs outside of it, or install the package"
            )
    return found
