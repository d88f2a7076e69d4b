"""What the fuzz tests share: reproducible cases that are counted, what may be raised, and digests of what lies on a disk.

SELFSUP_FUZZ=20 tries twenty times as many cases, drawn anew each time; without it they are always the same ones.
As a pytest plugin it prints how many there were.
"""

import ctypes
import functools
import hashlib
import os
import random
import re
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from selfsup.errors import UserError

MULTIPLE = float(os.environ.get("SELFSUP_FUZZ", "1"))
LONGEST = 12_000
"""Characters of a message: what was typed may come back (the longest word here has 5,000), but no more than that."""

DECLARED: dict[str, int] = {}
"""Test -> how many cases it asks for, without SELFSUP_FUZZ."""
_TRIED: dict[str, int] = {}


def fuzz(count: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`@fuzz(300, data=st.binary())`: the test is called with 300 values of `data`."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        DECLARED[name] = count

        @settings(
            max_examples=max(1, round(count * MULTIPLE)),
            derandomize=MULTIPLE == 1,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
            phases=(Phase.explicit, Phase.generate),  # cases are small; making them smaller can take minutes
        )
        @given(**strategies)
        @functools.wraps(function)
        def test(*args: Any, **kwargs: Any) -> None:
            _TRIED[name] = _TRIED.get(name, 0) + 1
            function(*args, **kwargs)

        test._fuzz = name  # type: ignore[attr-defined]
        return test

    return decorate


@contextmanager
def told(seconds: int = 30) -> Iterator[None]:
    """A UserError may leave this, if its message is one or two lines; any other exception is a defect, and so is a hang."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(seconds)
    try:
        yield
    except UserError as error:
        check_message(str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def as_a_user() -> Iterator[None]:
    """Modes of files count, for root too: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, and CAP_FOWNER."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(0x20080522, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    all_of_them = sets[0].effective
    sets[0].effective &= ~0b1110
    assert libc.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = all_of_them
        assert libc.capset(ctypes.byref(header), sets) == 0


def check_message(message: str) -> None:
    assert message.strip(), "an empty message"
    assert len(re.split(r"[\r\n]", message.strip())) <= 2, message
    assert len(message) <= LONGEST, message[:LONGEST]


def digest(*roots: Path) -> dict[str, tuple[Any, ...]]:
    """Every path below, what it is, and its content: equal if nothing was added, removed or changed."""
    found: dict[str, tuple[Any, ...]] = {}
    for root in roots:
        stack = [os.fsencode(root)]
        while stack:
            path = stack.pop()
            info = os.lstat(path)
            content: Any = None
            if stat.S_ISDIR(info.st_mode):
                stack += [os.path.join(path, name) for name in os.listdir(path)]
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(info.st_mode) and info.st_size < 1 << 30:
                with open(path, "rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            mtime = None if stat.S_ISDIR(info.st_mode) else info.st_mtime_ns
            found[os.fsdecode(path)] = (info.st_mode, info.st_size if content else 0, mtime, content)
    return found


@dataclass(frozen=True)
class Edit:
    """A few changes to bytes, of whatever length: bits, bytes, pieces cut, repeated, moved, put in, cut off."""

    seed: int
    count: int

    def __call__(self, data: bytes) -> bytes:
        return _edited(data, random.Random(self.seed), self.count)


def edits() -> st.SearchStrategy[Edit]:
    """Every one another."""
    return st.builds(Edit, seed=st.integers(0, 2**32), count=st.integers(1, 6))


_INTERESTING = (
    [bytes(n) for n in (1, 2, 4, 8)] + [b"\xff" * n for n in (1, 2, 4, 8)] + [b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80"]
)


def _edited(data: bytes, rng: random.Random, count: int) -> bytes:
    out = bytearray(data)
    for _ in range(count):
        # headers are where things are decided
        at = rng.randrange(max(1, min(len(out), rng.choice([16, 64, 256, 1 << 30]))))
        span = rng.choice([1, 2, 4, 8, 32, 200])
        match rng.randrange(9):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                piece = rng.choice(_INTERESTING)
                out[at : at + len(piece)] = piece
            case 3:
                del out[at : at + span]
            case 4:
                out[at:at] = rng.randbytes(span)
            case 5:
                out[at:at] = out[at : at + span]
            case 6:
                other = rng.randrange(max(1, len(out)))
                out[at : at + span] = out[other : other + span]
            case 7 if rng.random() < 0.5:
                del out[at:]
            case 8:
                out += bytes(span) if rng.random() < 0.5 else rng.randbytes(span)
    return bytes(out)


class Counter:
    """The pytest plugin."""

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> Any:
        """Write down how many cases a test tried; in its report, which travels between processes."""
        name = getattr(pyfuncitem.obj, "_fuzz", None)
        if name is None:
            return (yield)
        before = _TRIED.get(name, 0)
        try:
            return (yield)
        finally:
            pyfuncitem.user_properties.append(("fuzz", _TRIED.get(name, 0) - before))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """fuzz: N cases."""
        reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
        counts = [
            value
            for report in reports
            if getattr(report, "when", None) == "call"
            for key, value in report.user_properties
            if key == "fuzz"
        ]
        if counts:
            terminalreporter.write_line(f"fuzz: {sum(counts)} cases in {len(counts)} tests")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin."""
    config.pluginmanager.register(Counter(), "fuzz-counter")
