"""Our DINO step: the trainer's own loop, over crops that are already in memory."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import Dino, Lightly
from benchmarks.rows import Row
from selfsup import config as configuration
from selfsup import runtime, train
from selfsup.config import Config
from selfsup.data.loader import Batch
from selfsup.data.views import ViewParams
from selfsup.guard.watchdog import Watchdog
from selfsup.run import Run
from selfsup.schedules import Plan, constant
from selfsup.signals import StopSignals


class Images:
    """A data set for the loader that is never read: the crops come from `FixedCrops`."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def __len__(self) -> int:
        return self.row.batch

    def __getitem__(self, index: int) -> np.ndarray:
        return np.zeros((self.row.global_size, self.row.global_size, self.row.channels), dtype=np.uint8)


class FixedCrops:
    """Stands where the loader does and gives the same uint8 crops at every step, with no augmentation left to do."""

    wait_seconds = 0.0

    def __init__(self, row: Row, state: dict[str, Tensor]) -> None:
        crops = [state["global"].clone(), state["local"].clone()]  # not as views of the file that holds the weights as well
        self.batch = Batch(
            crops=crops,
            params=[untouched(c) for c in crops],
            ids=torch.arange(row.batch),
            positions=torch.arange(row.batch),
            labels=torch.full((row.batch,), -1),
            bad=[],
        )

    def stream(self, start: int, total: int) -> Iterator[list[Batch]]:
        """One micro-batch a step."""
        for _ in range(start, total):
            yield [self.batch]


def untouched(crops: Tensor) -> Tensor:
    """Parameters of views that are only normalised: crops [V, B, C, S, S] -> [V, B, P]."""
    size = float(crops.shape[-1])
    params = ViewParams(
        x=0, y=0, w=size, h=size, hflip=0, vflip=0, order=-1, brightness=1, contrast=1, saturation=1, hue=0, gray=0,
        sigma=0, solarize=-1,
    )  # fmt: skip
    return torch.from_numpy(params.pack()).expand(*crops.shape[:2], -1).clone()


class TimedRun(Run):
    """A run whose end is not followed by a checkpoint and an export: those are no part of a step."""

    def save(self, figures: dict[str, float], may_commit: Callable[[], None]) -> None:
        """Nothing."""

    def export(self) -> None:
        """Nothing."""


class Ours:
    """selfsup.train's loop with its recorder, health figures and schedules, started from a row's weights."""

    disclosures = ("ours: the step starts from uint8 crops and includes their conversion and normalisation",)

    def __init__(self, row: Row, state: dict[str, Tensor], peer: type[Lightly] | type[Dino]) -> None:
        self.row, self.stack = row, contextlib.ExitStack()
        self.out = Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="selfsup-bench-run-")))
        self.config = runtime.resolve(configuration.validate(Config, self._config(row, peer), "benchmark"))
        self.stack.enter_context(runtime.settings(self.config))
        self.signals = self.stack.enter_context(StopSignals())
        self.watch = Watchdog(self.out / "ranks", 1800, rank=0, world=1)  # told of each phase, as in training
        self.run = TimedRun.create(self.config, self.out, torch.device("cpu"), Images(row), None, quiet=True)
        network = {k: v for k, v in state.items() if k not in ("global", "local")}
        network = {k.replace("backbone.", "backbone.model.", 1): v for k, v in network.items()}
        for half in (self.run.method.student, self.run.method.teacher):
            half.load_state_dict(network)
        self.run.loader = FixedCrops(row, state)  # type: ignore[assignment]

    @staticmethod
    def prepare() -> None:
        """Everything is imported with this file."""

    @staticmethod
    def _config(row: Row, peer: type[Lightly] | type[Dino]) -> dict[str, Any]:
        return {
            "data": "benchmark",
            "backbone": {
                "name": row.backbone,
                "in_chans": row.channels,
                "pos_interp": peer.pos_interp,
                **row.backbone_options,
            },
            "views": {
                "global": {"count": 2, "size": row.global_size, "blur": 0.0, "solarize": 0.0},
                "local": {"count": row.locals, "size": row.local_size},
            },
            "method": {
                "name": "dino",
                "out_dim": row.out_dim,
                "hidden_dim": row.hidden_dim,
                "bottleneck_dim": row.bottleneck_dim,
                "student_temp": row.student_temp,
            },
            "optimizer": {"name": "adamw", "lr": row.lr, "clip": 3.0 if peer.clips else None},
            "global_batch": row.batch,
            "steps": 1,
            "precision": row.dtype,
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "workers": 0,
            "tensorboard": False,
        }

    def _loop(self, count: int, lr: float, momentum: float) -> None:
        run = self.run
        run.spikes.restore([])
        run.step, run.plan = 0, Plan(steps=count, images=self.row.batch, global_batch=self.row.batch)
        values = {
            "lr": lr,
            "wd": self.row.weight_decay,
            "momentum": momentum,
            "teacher_temp": self.row.teacher_temp,
            "freeze_last_layer": 0.0,
        }
        run.schedules = {name: constant(value) for name, value in values.items()}
        train._train(run, self.signals, self.watch, train.Evaluations(), lambda: None)

    def step(self, count: int) -> None:
        """The loop, for `count` steps."""
        self._loop(count, self.row.lr, self.row.momentum)

    def gradients(self) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of one step without clipping, by canonical name."""
        run = self.run
        run.config = run.config.model_copy(update={"optimizer": run.config.optimizer.model_copy(update={"clip": None})})
        self._loop(1, lr=0.0, momentum=1.0)
        loss = json.loads((self.out / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
        named = run.method.student.named_parameters()
        found = {k.replace("backbone.model.", "backbone.", 1): p.grad for k, p in named if p.grad is not None}
        run.config = self.config
        return loss, found
