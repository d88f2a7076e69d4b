"""Small real runs to disturb, the undisturbed ones to compare them with, and what 'the same' means."""

import contextlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfsup.config import dump
from tests.faults.zygote import Process, Zygote
from tests.methods.tiny import tiny_config, write_images

STEPS = 24
EVERY = 5
"""Steps between checkpoints; the last step has one too."""
CLOCKS = ("time", "img_per_s", "data_wait")
"""What a clock decides in a line of the log."""
OVERRIDES = ("precision=fp32", f"steps={STEPS}", "log_every=3", f"checkpoint.every={EVERY}")


def recipe(path: Path, images: Path, *overrides: str) -> Path:
    """A recipe file of a tiny run over these images: three steps an epoch."""
    path.write_text(dump(tiny_config("dino", f"data={images}", *OVERRIDES, *overrides)))
    return path


class Lab:
    """Starts runs of one recipe; every one with --resume, which starts at the beginning where there is nothing."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder = zygote, folder
        self.recipe = recipe(folder / "recipe.yaml", write_images(folder / "images", 24))
        self._undisturbed: dict[tuple[Any, ...], Path] = {}
        self.seconds = 1.0
        """How long the undisturbed run took."""

    def start(self, out: Path, *overrides: str, fault: Any = None, resume: bool = True, env: Any = None) -> Process:
        """A run in one process."""
        return self.zygote.start(self._arguments(out, overrides, resume), fault=fault, env=env)

    def run(self, out: Path, *overrides: str, status: int = 0, timeout: float = 60, **options: Any) -> Process:
        """`start`, its end, and its exit status checked."""
        process = self.start(out, *overrides, **options)
        ended(process, status, timeout)
        return process

    def ranks(
        self, out: Path, *overrides: str, fault: Mapping[int, Any] | None = None, world: int = 2
    ) -> list[Process]:
        """A run in two processes."""
        return self.zygote.ranks(self._arguments(out, overrides, True), world, fault=fault)

    def run_ranks(self, out: Path, *overrides: str, fault: Mapping[int, Any] | None = None) -> list[Process]:
        """`ranks`, their end, and exit status 0."""
        processes = self.ranks(out, *overrides, fault=fault)
        for process in processes:
            ended(process, 0)
        return processes

    def undisturbed(self, *overrides: str, world: int = 1, fault: Any = None) -> Path:
        """The run folder of an undisturbed run (or the reference of another outcome), made once a session."""
        key = (overrides, world, repr(fault))
        if key not in self._undisturbed:
            out = self.folder / f"undisturbed_{len(self._undisturbed)}"
            began = time.monotonic()
            if world == 1:
                self.run(out, *overrides, fault=fault)
                self.seconds = time.monotonic() - began
            else:
                self.run_ranks(out, *overrides, fault=dict.fromkeys(range(world), fault))
            self._undisturbed[key] = out
        return self._undisturbed[key]

    def resumed_is_same(self, out: Path, *overrides: str, world: int = 1) -> Process:
        """Resume once more, to the end: now it is the undisturbed run. Returns the process (of rank 0)."""
        if world == 1:
            process = self.run(out, *overrides)
        else:
            process = self.run_ranks(out, *overrides)[0]
        same(out, self.undisturbed(world=world))
        return process

    def _arguments(self, out: Path, overrides: tuple[str, ...], resume: bool) -> list[Any]:
        return ["train", self.recipe, *overrides, "--out", out, *(["--resume"] if resume else [])]


# ---------------------------------------------------------------------------------------------------------------- checks


def log(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides. Every line is whole, and every step from the first is there once."""
    raw = (run / "metrics.jsonl").read_bytes()
    assert raw.endswith(b"\n") or not raw, f"half a line: {raw[-80:]!r}"
    lines = [json.loads(line) for line in raw.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def checkpoints(run: Path) -> list[int]:
    """Steps of the checkpoints, all of which verify; `latest` names the newest."""
    from selfsup import checkpoint

    found = checkpoint.steps(run / "checkpoints")
    for _, folder in found:
        checkpoint.verify(folder)
    if found:
        assert (run / "checkpoints" / "latest").read_text().strip() == found[-1][1].name
    return [step for step, _ in found]


def weights(run: Path, step: int = STEPS) -> dict[str, bytes]:
    """The files of a checkpoint that hold tensors, and those of the exported backbone."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    found = {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}
    assert {"model.safetensors", "optimizer.safetensors", "rank_00000.safetensors"} <= found.keys()
    return {**found, **{f"backbone/{p.name}": p.read_bytes() for p in (run / "backbone").iterdir()}}


def same_weights(run: Path, other: Path) -> None:
    """Final checkpoint and exported backbone are the same bytes; nothing unfinished is left."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if ours[k] != theirs[k]] == []
    assert checkpoints(run)[-1] == STEPS
    left = [str(p.relative_to(run)) for p in run.rglob("*") if "tmp" in p.name]
    assert left == [], f"left behind: {left}"
    assert not (run / "lease.json").exists(), "the lease was not given back"


def same(run: Path, other: Path) -> None:
    """The same log line by line but for clocks, each step once, and the same weights."""
    ours, theirs = log(run), log(other)
    assert len(ours) == STEPS
    assert [(a["step"], _difference(a, b)) for a, b in zip(ours, theirs) if a != b] == []
    same_weights(run, other)


def _difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {k: (a.get(k), b.get(k)) for k in a.keys() | b.keys() if a.get(k) != b.get(k)}


def ended(process: Process, status: int, timeout: float = 60) -> None:
    """It has ended with this status."""
    found = process.wait(timeout)
    assert found == status, f"{process}: expected {status}; its stderr:\n{process.stderr()}"


def told(process: Process, *patterns: str, timeout: float = 60) -> str:
    """It has ended with exit 2, two lines at most, no traceback, and these words in them. Returns the message."""
    ended(process, 2, timeout)
    text = process.stderr()
    assert "Traceback" not in text, text
    message = text[text.rindex("selfsup: ") :].strip()
    assert len(message.splitlines()) <= 2, message
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    return message


def steps_logged(run: Path) -> int:
    """Lines of the log so far."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def in_group(leader: int) -> list[int]:
    """Processes of this group that still run: a process and its loader workers."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def nobody_left(process: Process, timeout: float = 15) -> None:
    """A process has ended with its loader workers."""
    deadline = time.monotonic() + timeout
    while left := in_group(process.pid):
        assert time.monotonic() < deadline, f"{process}: left running: {left}"
        time.sleep(0.05)


def remove(folder: Path) -> None:
    """rm -rf of a folder in which others may be writing."""
    deadline = time.monotonic() + 10
    while folder.exists():
        assert time.monotonic() < deadline
        for root, folders, names in os.walk(folder, topdown=False):
            for name in names:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(root, name))
            for name in folders:
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.join(root, name))
        with contextlib.suppress(OSError):
            folder.rmdir()
