"""Faults by name: each is installed in a child of the zygote before its command runs.

Steps are numbered as in the log: the first is 1. What happens at a step happens in the method's forward pass.
"""

import ctypes
import json
import os
import re
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import selfsup.run as running
from selfsup import durable
from selfsup.eval import periodic
from selfsup.guard import watchdog
from selfsup.methods.dino import DINO

OPERATIONS = ("make_folder", "write", "fsync", "rename", "remove")

# ------------------------------------------------------------------------------------------------------------------ disk


def point(operation: str, paths: tuple[Any, ...]) -> str:
    """The name of a call: 'rename checkpoints/.tmp-step_00000015 checkpoints/step_00000015'. No process ids and tokens."""
    names = []
    for path in paths:
        parts = Path(path).parts
        inside = parts[parts.index("checkpoints") :] if "checkpoints" in parts else parts[-1:]
        inside = ("RUN",) if path.is_dir() and "checkpoints" not in parts else inside
        names.append(re.sub(rf"-({os.getpid()}|[0-9a-f]{{16}})(?=/|$)", "", "/".join(inside)))
    return " ".join([operation, *names])


def _wrap(around: Callable[[str, int, Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """Every operation on the disk becomes around(name of the call, how many of that name came before, real, arguments)."""
    seen: Counter[str] = Counter()
    lock = threading.Lock()

    def wrapped(operation: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            name = point(operation, arguments[: 2 if operation == "rename" else 1])
            with lock:
                before = seen[name]
                seen[name] += 1
            return around(name, before, real, arguments)

        return call

    for operation in OPERATIONS:
        setattr(durable, operation, wrapped(operation, getattr(durable, operation)))


def trace(path: str) -> None:
    """Append each call's [name, how many of that name came before] to a file, as JSON lines."""

    def around(name: str, before: int, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        with open(path, "a") as file:
            file.write(json.dumps([name, before]) + "\n")
        return real(*arguments)

    _wrap(around)


def kill_at(name: str, before: int, when: str) -> None:
    """kill -9 'before' or 'after' a call, or 'half' way through a write or the removal of a folder."""

    def around(found: str, number: int, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if (found, number) != (name, before):
            return real(*arguments)
        if when == "half" and name.startswith("remove "):
            files = sorted(arguments[0].iterdir())
            for path in files[: len(files) // 2]:
                path.unlink()
        elif when == "half":
            path, chunks = arguments
            content = b"".join(bytes(chunk) for chunk in chunks)
            real(path, [content[: len(content) // 2]])
        elif when == "after":
            real(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    _wrap(around)


def fail_at(name: str, before: int, code: int) -> None:
    """A call fails with this errno; what is written before half of it is done."""

    def around(found: str, number: int, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if (found, number) != (name, before):
            return real(*arguments)
        if name.startswith("write "):
            path, chunks = arguments
            content = b"".join(bytes(chunk) for chunk in chunks)
            real(path, [content[: len(content) // 2]])
        raise OSError(code, os.strerror(code), str(arguments[0]))

    _wrap(around)


def slow_disk(seconds: float, match: str, mark: str) -> None:
    """Calls whose name matches take this much longer; `mark` is a file that is there from the first of them on."""

    def around(name: str, number: int, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if re.search(match, name):
            Path(mark).touch()
            time.sleep(seconds)
        return real(*arguments)

    _wrap(around)


def file_limit(size: int) -> None:
    """RLIMIT_FSIZE: no file may grow above so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def ordinary_user() -> None:
    """Modes of files count, for root too: gives up the capabilities that override them."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: low words, then high ones
    libc = ctypes.CDLL(None, use_errno=True)
    overrides = 1 << 1 | 1 << 2 | 1 << 3  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    for word in range(3):
        data[word] &= ~overrides
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def kill_in_export(when: str) -> None:
    """kill -9 'before' or 'after' the backbone is exported at the end."""
    real = running.export_timm

    def export(*arguments: Any) -> Any:
        if when == "after":
            real(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    running.export_timm = export  # type: ignore[assignment]


# -------------------------------------------------------------------------------------------------------------- the method


def _in_forward(before: Callable[[int], None] | None = None, after: Callable[[int, Any], None] | None = None) -> None:
    real = DINO.forward

    def forward(self: DINO, batch: Any, s: Any) -> Any:
        if before:
            before(batch.step + 1)
        out = real(self, batch, s)
        if after:
            after(batch.step + 1, out)
        return out

    DINO.forward = forward  # type: ignore[method-assign]


def slow(seconds: float, first: int = 1) -> None:
    """Every step takes this much longer, from step `first` on: there is time to do something to it."""
    _in_forward(lambda step: time.sleep(seconds) if step >= first else None)


def nan(step: int) -> None:
    """The loss of one step is not a number."""
    scale_loss(step, float("nan"))


def scale_loss(step: int, factor: float) -> None:
    """The loss of one step, and its gradients with it, is so many times as large."""

    def after(now: int, out: Any) -> None:
        if now == step:
            out["loss"] = out["loss"] * factor

    _in_forward(after=after)


def out_of_memory(step: int) -> None:
    """The allocator's error, with its text."""

    def before(now: int) -> None:
        if now == step:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which "
                "1.12 GiB is free. Process 4711 has 14.64 GiB memory in use."
            )

    _in_forward(before)


def hang(step: int) -> None:
    """Never comes back from one step."""

    def before(now: int) -> None:
        while now == step:
            _wait_for_a_reply_that_never_comes()

    _in_forward(before)


def slow_neighbours(seconds: float) -> None:
    """The part of a k-NN evaluation that rank 0 does alone takes this much longer, and tells that it goes on."""
    real = periodic.classify

    def classify(*arguments: Any, **options: Any) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.1)
            watchdog.alive()
        return real(*arguments, **options)

    periodic.classify = classify  # type: ignore[assignment]


def _wait_for_a_reply_that_never_comes() -> None:
    time.sleep(0.05)


def clock_back(step: int, seconds: float) -> None:
    """From one step on, the clock shows a time this much earlier (step 0: from the start)."""
    real, shift = time.time, [0.0 if step else seconds]
    time.time = lambda: real() - shift[0]

    def before(now: int) -> None:
        if now == step:
            shift[0] = seconds

    _in_forward(before)


def weights(path: str) -> None:
    """At the end, every rank's own weights as a file: path.RANK."""
    real = running.Run.export

    def export(self: running.Run) -> None:
        values = {k: v.detach().cpu().numpy().tobytes() for k, v in self.method.state_dict().items()}
        Path(f"{path}.{os.environ.get('RANK', '0')}").write_bytes(b"".join(values[k] for k in sorted(values)))
        real(self)

    running.Run.export = export  # type: ignore[method-assign]


def gate(path: str) -> None:
    """Begins when this file is there: several processes at the same moment."""
    while not os.path.exists(path):
        time.sleep(0.001)
