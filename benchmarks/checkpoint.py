"""What saving costs a run, and what a resume costs beyond a fresh start.

    python benchmarks/checkpoint.py [--only demo,dino_vits16] [--saves 24] [--threads N] [--json FILE]

The real loop runs with a save every third window of W steps; a window that begins with a save is compared with the two
without one that follow it, so that what a save costs includes the copy to the host and everything that its thread takes
from the steps after it. The two windows without a save, compared with one another, say what the machine's noise is.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from benchmarks import protocol  # noqa: E402

PER = 100
"""Steps between saves for which the share is told."""


@dataclass(frozen=True)
class Case:
    """A recipe and how it is run here."""

    recipe: str
    overrides: tuple[str, ...]
    window: int
    """Steps; a save is on the disk within one window."""
    saves: int


CASES = [
    Case("demo", ("eval.every=null",), 8, 24),
    Case("dino_vits16", ("global_batch=4", "precision=fp32"), 2, 8),
]


class Pictures:
    """A data set in memory: its decoding is not what is measured."""

    def __init__(self, channels: int, size: int) -> None:
        import numpy as np

        shape = (64, size, size, channels)
        self.images = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        return self.images[i]


def measure(case: Case, saves: int, threads: int) -> dict[str, Any]:
    """Run the loop and time its steps: the figures of one case."""
    from selfsup import config as configuration
    from selfsup import train
    from selfsup.run import Run

    boundaries: list[float] = []
    blocked: list[float] = []
    durable: list[float] = []
    nbytes = 0

    class TimedRun(Run):
        """Notes when each step begins and how long each save holds the loop up."""

        @classmethod
        def create(cls, *arguments: Any, **options: Any) -> "TimedRun":
            run = super().create(*arguments, **options)
            stream = run.loader.stream

            def timed(start: int, total: int) -> Generator[Any, None, None]:
                batches = stream(start, total)
                try:
                    for _ in range(start, total):
                        boundaries.append(time.perf_counter())
                        yield next(batches)
                finally:
                    batches.close()

            run.loader.stream = timed  # type: ignore[method-assign, assignment]
            return run  # type: ignore[return-value]

        def save(self, figures: dict[str, float], may_commit: Callable[[], None]) -> None:
            nonlocal nbytes
            began = time.perf_counter()

            def commit() -> None:
                may_commit()
                durable.append(time.perf_counter() - began)

            nbytes = self.capture().nbytes
            began = time.perf_counter()
            super().save(figures, commit)
            blocked.append(time.perf_counter() - began)

    every = 3 * case.window
    options = [
        *case.overrides,
        f"steps={every * (saves + 1) + 1}",
        f"checkpoint.every={every}",
        f"log_every={case.window}",
        f"threads={threads}",
        "workers=0",
        "tensorboard=false",
    ]
    config = configuration.load(case.recipe, options)
    pictures = Pictures(config.backbone.in_chans, 256 if config.views.global_.size > 100 else 28)
    with tempfile.TemporaryDirectory(prefix="selfsup-bench-") as folder:
        train.Run = TimedRun  # type: ignore[misc]
        try:
            train.train(config, out=Path(folder) / "run", dataset=pictures, quiet=True)
        finally:
            train.Run = Run  # type: ignore[misc]
    steps = [b - a for a, b in itertools.pairwise(boundaries)]
    costs, noise, clean = [], [], []
    for save in range(saves):
        first = every * (save + 1) - 1  # the step that ends with the save
        windows = [sum(steps[first + i * case.window : first + (i + 1) * case.window]) for i in range(3)]
        costs.append(windows[0] - (windows[1] + windows[2]) / 2)
        noise.append(windows[1] - windows[2])
        clean += [windows[1] / case.window, windows[2] / case.window]
    step = statistics.median(clean)
    low, high = protocol.bootstrap(costs)
    return {
        "recipe": case.recipe,
        "overrides": list(case.overrides),
        "threads": threads,
        "saves": saves,
        "state_mb": nbytes / 1e6,
        "step_ms": 1e3 * step,
        "blocked_ms": 1e3 * statistics.median(blocked[1:-1]),
        "durable_ms": 1e3 * statistics.median(durable[1:-1]),
        "cost_ms": 1e3 * statistics.median(costs),
        "share": statistics.median(costs) / (PER * step),
        "share_low": low / (PER * step),
        "share_high": high / (PER * step),
        "noise_share": statistics.median(noise) / (PER * step),
    }


def startup(case: Case, pairs: int, threads: int) -> dict[str, Any]:
    """Seconds that a resume takes beyond a fresh start: whole processes that take one step, save and export."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.checkpoint import Pictures;"
        "from selfsup import config, train;"
        "c = config.load(sys.argv[1], sys.argv[4:]);"
        "p = Pictures(c.backbone.in_chans, int(sys.argv[3]));\n"
        "try: train.train(c, out=Path(sys.argv[2]), dataset=p, quiet=True, resume=True)\n"
        "except Exception as e: assert type(e).__name__ == 'EarlyStop', e"
    )
    size = "256" if case.recipe != "demo" else "28"
    options = [*case.overrides, "steps=3", f"threads={threads}", "workers=0", "tensorboard=false"]
    seconds: dict[str, list[float]] = {"fresh": [], "resume": []}
    for _ in range(pairs):
        with tempfile.TemporaryDirectory(prefix="selfsup-bench-") as folder:
            for stop, name in ((1, "fresh"), (2, "resume")):
                began = time.perf_counter()
                command = [sys.executable, "-c", code, case.recipe, f"{folder}/run", size, *options, f"stop_at={stop}"]
                subprocess.run(command, check=True, cwd=ROOT, env=protocol.thread_environment(threads))
                seconds[name].append(time.perf_counter() - began)
    extra = [b - a for a, b in zip(seconds["fresh"], seconds["resume"])]
    return {
        "startup_fresh_s": statistics.median(seconds["fresh"]),
        "resume_extra_s": statistics.median(extra),
        "resume_extra_worst_s": max(extra),
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What is printed for one case."""
    return [
        f"{found['recipe']} {' '.join(found['overrides'])}: state {found['state_mb']:.0f} MB, step {found['step_ms']:.0f} ms, "
        f"{found['threads']} threads, {found['saves']} saves",
        f"  a save holds the loop up for {found['blocked_ms']:.0f} ms and is committed after {found['durable_ms']:.0f} ms; "
        f"in all it costs {found['cost_ms']:.0f} ms",
        f"  at one save per {PER} steps: {found['share']:.2%} of step time "
        f"[{found['share_low']:.2%}, {found['share_high']:.2%}]; windows without a save differ by {found['noise_share']:+.2%}",
        f"  a resume takes {found['resume_extra_s']:+.2f} s beyond a fresh start ({found['startup_fresh_s']:.1f} s), "
        f"at most {found['resume_extra_worst_s']:+.2f} s",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write a JSON file if asked for one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(c.recipe for c in CASES), help="recipes, separated by commas")
    parser.add_argument("--saves", type=int, help="saves measured in each case")
    parser.add_argument("--pairs", type=int, default=3, help="starts and resumes measured")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the figures there")
    chosen = parser.parse_args(arguments)
    found = []
    for case in CASES:
        if case.recipe in chosen.only.split(","):
            with contextlib.redirect_stdout(sys.stderr):
                figures = measure(case, chosen.saves or case.saves, chosen.threads)
                figures |= startup(case, chosen.pairs, chosen.threads)
            found.append(figures)
            print("\n".join(lines(figures)), flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
