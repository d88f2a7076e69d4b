"""Every step's figures: kept on the device, brought to the host at logging steps, one line a step."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfsup import dist
from selfsup.config import Config
from selfsup.errors import UserError
from selfsup.health import SLOW_DATA, CollapseMonitor
from selfsup.log import MetricsLog, Progress, TensorBoard
from selfsup.remedies import advice
from selfsup.schedules import Plan
from selfsup.spikes import SpikeDetector


@dataclass
class Refusal:
    """A step that was not taken because loss or gradients were not finite."""

    step: int
    ranks: list[int]
    """Those whose own loss was not finite; empty if only gradients were not."""
    in_row: int
    """How many were refused in a row, with it."""
    steps_since: int
    """Steps taken between it and the newest."""
    parts: dict[str, float]


@dataclass
class Findings:
    """What the figures of some steps call for; the same on every rank."""

    refused: list[Refusal] = field(default_factory=list)
    too_many: UserError | None = None
    """`max_nonfinite` steps in a row were refused."""
    spike: int | None = None
    """The first step whose loss spiked."""


class Recorder:
    """Buffers device scalars; `flush` averages them over ranks, judges them, and writes them."""

    def __init__(
        self,
        out: Path,
        step: int,
        plan: Plan,
        progress: Progress,
        monitor: CollapseMonitor,
        spikes: SpikeDetector,
        config: Config,
        still_ours: Callable[[], None] = lambda: None,
    ) -> None:
        """still_ours: called before anything is written; raises UserError if the run folder is another's by now."""
        self._plan, self._progress, self._monitor, self._config = plan, progress, monitor, config
        self._spikes, self._still_ours, self._out = spikes, still_ours, out
        self._log = MetricsLog(out / "metrics.jsonl", step) if dist.is_main() else None
        self._board = TensorBoard(out / "tensorboard", step) if dist.is_main() and config.tensorboard else None
        self._pending: list[tuple[int, dict[str, float], list[str], Tensor]] = []
        self._since, self._waited = time.monotonic(), 0.0
        self._warned_data = False
        self._named: str | None = None
        self._windows = 0

    def data_wait(self, seconds: float) -> None:
        """Time that the step just begun waited for its batch."""
        self._waited += seconds

    def record(self, step: int, schedules: Mapping[str, float], parts: Mapping[str, Tensor]) -> None:
        """Figures of a finished step; nothing is copied to the host."""
        names = list(parts)
        self._pending.append((step, dict(schedules), names, torch.stack([parts[n].double() for n in names])))

    def flush(
        self,
        evaluations: Mapping[str, float] | None = None,
        last: bool = False,
        problem: BaseException | None = None,
    ) -> Findings:
        """Write the buffered steps; `evaluations` belong to the newest. Every rank calls it at the same steps.

        problem: what went wrong on this rank meanwhile. It is raised on all ranks together, as is a log that cannot be
        written: nobody is left waiting.
        """
        found = Findings()
        if not self._pending:
            return found
        values = torch.stack([p[3] for p in self._pending])  # [steps, figures]
        ranks = dist.all_gather(values[None]).cpu()  # [ranks, steps, figures]; summed in rank order, so always alike
        table = (ranks.sum(0) / ranks.shape[0]).tolist()
        records = []
        for i, (step, s, names, _) in enumerate(self._pending):
            record = self._line(step, s, dict(zip(names, table[i])))
            records.append(record)
            if "refused_in_row" in record:
                own = ranks[:, i, names.index("loss")]
                parts = {k: v for k, v in record.items() if isinstance(v, float)}
                culprits = (~own.isfinite()).nonzero().flatten().tolist()
                found.refused.append(Refusal(step, culprits, record["refused_in_row"], 0, parts))
            elif "left_out" not in record:
                for refusal in found.refused:
                    refusal.steps_since += 1
                if self._spikes.judge(step, record["loss"]) and found.spike is None:
                    found.spike = step
        self._pending = []

        elapsed = time.monotonic() - self._since
        newest = records[-1]
        newest["img_per_s"] = round(len(records) * self._config.global_batch / max(elapsed, 1e-9), 2)
        newest["data_wait"] = round(min(1.0, self._waited / max(elapsed, 1e-9)), 4)
        newest["time"] = round(time.time(), 3)
        if evaluations:
            newest["eval"] = dict(evaluations)
        if self._log is not None and problem is None:
            try:
                self._still_ours()
                self._log.write(records)
            except UserError as cause:
                problem = cause
        dist.raise_together(problem, "training")
        if self._board is not None:
            for record in records:
                self._board.write(record)
        self._say(records, last)
        self._since, self._waited = time.monotonic(), 0.0
        found.too_many = self._too_many(records)
        return found

    def _too_many(self, records: list[dict[str, Any]]) -> UserError | None:
        worst = max(records, key=lambda r: r.get("refused_in_row", 0))
        row = worst.get("refused_in_row", 0)
        if row < self._config.max_nonfinite:
            return None
        bad = [k for k, v in worst.items() if isinstance(v, float) and not math.isfinite(v)]
        return UserError(
            f"{' and '.join(bad) or 'loss'} not finite for {row} steps in a row (max_nonfinite={self._config.max_nonfinite}) "
            f"up to step {worst['step']}; weights are those before them\n"
            f"selfsup replay {self._out}/refused shows why; a lower optimizer.base_lr or precision=fp32 goes in a new run "
            f"with init_from={self._out}"
        )

    def _line(self, step: int, schedules: Mapping[str, float], parts: dict[str, float]) -> dict[str, Any]:
        refused, left_out = round(parts.pop("refused")), round(parts.pop("left_out"))
        health: dict[str, Any] = {
            k.removeprefix("health/"): parts.pop(k) for k in list(parts) if k.startswith("health/")
        }
        health["state"] = self._monitor.judge(step, health)
        line: dict[str, Any] = {
            "step": step,
            "epoch": self._plan.epoch(step),
            "samples": step * self._plan.global_batch,
            **parts,
            **schedules,
        }
        line["health"] = health
        if refused:
            line["refused_in_row"] = refused
        elif left_out:
            line["left_out"] = True
        return line

    def _say(self, records: list[dict[str, Any]], last: bool) -> None:
        newest = records[-1]
        self._windows += 1
        refused = [r["step"] for r in records if "refused_in_row" in r]
        if refused:
            self._progress.note(
                f"step {refused[-1]}: loss or gradients not finite; {len(refused)} step(s) refused, weights unchanged"
            )
        state = newest["health"]["state"]
        if state != "ok" and state != self._named:
            self._progress.note(f"step {newest['step']}: {state}: {advice(state, self._config.method.name)}")
        self._named = state
        if newest["data_wait"] > SLOW_DATA and not self._warned_data and self._windows > 3:
            self._warned_data = True
            self._progress.note(
                f"{newest['data_wait']:.0%} of the time is spent waiting for data: raise workers={self._config.workers}, "
                "or store smaller images"
            )
        figures = f"loss {newest['loss']:.4f}  lr {newest['lr']:.2e}"
        figures += f"  {newest['img_per_s']:.0f} img/s  wait {newest['data_wait']:.0%}"
        for name, value in newest.get("eval", {}).items():
            figures += f"  {name} {value:.4f}"
        self._progress.show(newest["step"], figures, last or "eval" in newest)

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens inside (an evaluation, a save) is not counted as training in img_per_s and data_wait."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def sync(self) -> None:
        """Log lines to the disk, if the folder is still ours: the condition of a checkpoint's commit."""
        if self._log is not None:
            self._still_ours()
            self._log.sync()

    def close(self) -> None:
        """Close the files; figures not flushed are of steps that a resume will do again."""
        if self._log is not None:
            self._log.close()
        if self._board is not None:
            self._board.close()
