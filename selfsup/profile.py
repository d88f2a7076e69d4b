"""`profile=true`: where a step goes, as a table, and a trace of a few steps.

The loop tells the watchdog each phase; `profiled` listens in, and hooks on the method's backbones, its `after_step` and the
optimizer's `zero_grad` tell the rest. The table is of steps without torch's profiler, which slows them; the trace is of the
steps after those. On an accelerator the phases are marked by events in its stream: nothing waits until the table is made.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch

from selfsup import dist
from selfsup.guard.watchdog import Watchdog

WARM, TABLE, TRACE = 2, 8, 2
"""Steps before the table, in the table, in the trace."""

PARTS = (
    "data", "crops on device", "forward student", "forward teacher", "head + loss", "backward", "optimizer", "EMA", "log",
)  # fmt: skip
_PHASES = {"data": "data", "forward": "crops on device", "gradients": "backward"}
_PHASES |= {part: part for part in ("backward", "optimizer", "checkpoint")}
_PHASES |= {"export": "checkpoint", "evaluate": "evaluation"}  # in the table where there were any


@contextlib.contextmanager
def profiled(run: Any, watch: Watchdog) -> Iterator[Watchdog]:
    """The watchdog to give to the loop. Without `profile=true`, and on ranks but 0, it is `watch` itself."""
    if not run.config.profile or not dist.is_main():
        yield watch
        return
    profile = Profile(run.method, run.optimizer, run.device, run.out / "profile", run.progress.note)
    try:
        yield cast(Watchdog, _Listener(watch, profile))
    finally:
        profile.finish()


class _Listener:
    """A watchdog that passes on what it is told."""

    def __init__(self, watch: Watchdog, profile: "Profile") -> None:
        self._watch, self._profile = watch, profile

    def at(self, phase: str, step: int) -> None:
        """See Watchdog.at."""
        self._watch.at(phase, step)
        self._profile.phase(phase)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watch, name)


class Profile:
    """Marks the beginnings of the parts of some steps, then writes RUN/profile and is gone."""

    def __init__(
        self, method: Any, optimizer: Any, device: torch.device, folder: Path, say: Callable[[str], None]
    ) -> None:
        self.device, self.folder, self.say = device, folder, say
        self._marks: list[tuple[str, Any]] = []
        self._begun = 0
        self._part, self._above = "", list[str]()
        self._trace: torch.profiler.profile | None = None
        self._range: Any = None
        self._undo: list[Callable[[], None]] = []
        self._over = False
        self._listen(method, optimizer)

    # ----------------------------------------------------------------------------------------------------- listening

    def _listen(self, method: Any, optimizer: Any) -> None:
        self._inside(method, "head + loss")
        backbones = {backbone: f"forward {role}" for role, backbone in method.backbones().items()}
        for backbone, part in backbones.items():
            self._inside(backbone, part)
        for kind in {owner for b in backbones for owner in type(b).__mro__ if "embed" in vars(owner)}:
            self._embed(kind, backbones)
        for owner, name, part in ((method, "after_step", "EMA"), (optimizer, "zero_grad", "optimizer")):
            self._around(owner, name, part)

    def _inside(self, module: torch.nn.Module, part: str) -> None:
        before = module.register_forward_pre_hook(lambda *_: self._enter(part))
        after = module.register_forward_hook(lambda *_: self._leave())
        self._undo += [before.remove, after.remove]

    def _around(self, owner: Any, name: str, part: str) -> None:
        original = getattr(owner, name)

        def called(*a: Any, **k: Any) -> Any:
            self._mark(part)
            out = original(*a, **k)
            if part == "EMA":
                self._mark("log")
            return out

        setattr(owner, name, called)
        self._undo.append(lambda: delattr(owner, name))

    def _embed(self, kind: Any, parts: dict[Any, str]) -> None:
        """Images of several sizes at once go through `kind.embed`, past the hooks. parts: by backbone."""
        original = kind.embed

        def embed(backbone: Any, *a: Any, **k: Any) -> Any:
            part = parts.get(backbone)  # not its copies, which are evaluated
            if part is None:
                return original(backbone, *a, **k)
            self._enter(part)
            out = original(backbone, *a, **k)
            self._leave()
            return out

        kind.embed = embed
        self._undo.append(lambda: setattr(kind, "embed", original))

    def _enter(self, part: str) -> None:
        if self._part != "backward":  # activation checkpointing computes forward passes again
            self._above.append(self._part)
            self._mark(part)

    def _leave(self) -> None:
        if self._part != "backward" and self._above:
            above = self._above.pop()
            self._mark("head + loss" if above == "crops on device" else above)

    def phase(self, phase: str) -> None:
        """The loop has come to a phase."""
        if self._over:
            return
        if phase == "data":
            self._begun += 1
            self._window()
        self._above.clear()
        self._mark(_PHASES.get(phase, "log"))

    # -------------------------------------------------------------------------------------------------------- marking

    def _mark(self, part: str) -> None:
        self._part = part
        if WARM < self._begun <= WARM + TABLE:
            self._marks.append((part, self._now()))
        if self._trace is not None:
            self._close_range()
            self._range = torch.profiler.record_function(f"selfsup: {part}")
            self._range.__enter__()

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _window(self) -> None:
        """What changes where a step begins."""
        if self._begun == WARM + TABLE + 1:
            self._marks.append(("", self._now()))
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities)
            self._trace.start()
        elif self._begun == WARM + TABLE + TRACE + 1:
            self.finish()

    # -------------------------------------------------------------------------------------------------------- writing

    def finish(self) -> None:
        """Write what was seen; hooks are gone afterwards. A run that was too short for a trace has a table alone."""
        if self._over:
            return
        self._over = True
        for undo in self._undo:
            undo()
        if self._begun <= WARM + TABLE:
            self._marks.append(("", self._now()))
        if len(self._marks) > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            steps = min(self._begun - WARM, TABLE)
            milliseconds = self._milliseconds(steps)
            (self.folder / "table.json").write_text(
                json.dumps({"steps": steps, "ms_a_step": milliseconds}, indent=1) + "\n"
            )
            text = table(milliseconds, steps)
            (self.folder / "table.txt").write_text(text + "\n")
            self.say(text)
        if self._trace is not None:
            self._close_range()
            self._trace.stop()
            path = self.folder / "trace.json"
            self._trace.export_chrome_trace(str(path))
            self.say(f"trace of {TRACE} steps: {path} (chrome://tracing, ui.perfetto.dev)")
            self._trace = None

    def _milliseconds(self, steps: int) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        total = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self._marks, self._marks[1:]):
            spent = begin.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - begin)
            total[part] = total.get(part, 0.0) + spent / steps
        return total


def table(milliseconds: dict[str, float], steps: int) -> str:
    """A line a part."""
    whole = sum(milliseconds.values())
    lines = [f"where a step goes ({steps} steps, {whole:.1f} ms each)"]
    lines += [f"  {part:16} {ms:9.2f} ms {ms / whole:6.1%}" for part, ms in milliseconds.items()]
    return "\n".join(lines)
