"""Evaluations of `eval.every` as jobs of their own, beside a training that was submitted and does not wait for them.

RUN/eval/step_00000500/backbone/    the weights at that step
RUN/eval/step_00000500/job.json     {"job", "step", "task"}: that it was submitted, and under which number
RUN/eval/step_00000500/knn.json     the result
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfsup import config as configuration
from selfsup import durable
from selfsup.config import Config
from selfsup.errors import UserError

from . import commands, submission
from .cluster import Cluster
from .environment import OF_A_RANK

_PATIENCE_S = 30.0


def as_jobs(run: Path, export: Callable[[Any, Path], object], task: str = "knn") -> "EvaluationJobs":
    """What the trainer calls as evaluate(backbone, step); the figures come later, so that it returns {}.

    export: export(backbone, folder) writes a folder that `selfsup eval` takes.
    Raises UserError if the run was not submitted.
    """
    told = submission.read(run)
    if told is None:
        raise UserError(f"eval.as_jobs=true: {run} was not submitted; use eval.as_jobs=false, or selfsup submit")
    file = run / submission.CONFIG
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    config = configuration.validate(Config, configuration.parse_yaml(text, str(file)), where=str(file))
    return EvaluationJobs(run.absolute(), told, settings(config, task), export, task)


def settings(config: Config, task: str) -> list[str]:
    """The KEY=VALUE words of `selfsup eval TASK FOLDER` that make it what the evaluation during training would be."""
    values: dict[str, Any] = {
        "eval.train": config.eval.train or config.data.path,
        "eval.val": config.eval.val or config.data.val,
        "data.value_range": config.data.value_range,
        "data.max_pixels": config.data.max_pixels,
        "data.depth": config.data.depth,
        "data.background": config.data.background,
        **({f"data.{k}": getattr(config.data, k) for k in ("frames", "stride", "clips")} if config.data.frames else {}),
        "size": config.views.global_.size,
        "max_train": config.eval.max_train,
        "workers": config.workers,
        "seed": config.seed,
        "cache": False,
    }
    if task == "knn":
        values |= {"k": config.eval.k, "temperature": config.eval.temperature}
    return [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in values.items() if v is not None]


class EvaluationJobs:
    """Callable of the trainer, on every rank; only rank 0 does something.

    What goes wrong is a line on stderr: an evaluation that is missing is no reason to end a training.
    """

    def __init__(
        self,
        run: Path,
        told: submission.Submission,
        overrides: list[str],
        export: Callable[[Any, Path], object],
        task: str,
    ) -> None:
        self._run, self._told, self._overrides, self._export, self._task = run, told, overrides, export, task
        self._logs = Path(os.path.normpath(run / told.logs))
        self._code = Path(os.path.normpath(run / told.code))
        self._mine: set[int] = set()
        self._threads: list[threading.Thread] = []
        self._started: list[subprocess.Popen[bytes]] = []
        atexit.register(self.close)

    def __call__(self, backbone: Any, step: int) -> dict[str, float]:
        """Export the backbone now, and submit its evaluation in the background. Always {}."""
        if os.environ.get("RANK", "0") != "0":
            return {}
        folder = self._run / "eval" / f"step_{step:08d}"
        # done by an earlier start, which got further than its last checkpoint; our own comes again when a run is rolled
        # back, and then with other weights
        if (folder / "job.json").exists() and step not in self._mine:
            return {}
        try:
            self._write_backbone(backbone, folder)
        except (UserError, OSError) as error:
            _say(f"step {step}: no {self._task} evaluation: its backbone cannot be written: {error}")
            return {}
        self._mine.add(step)
        # a daemon: one that hangs must not keep the process; `close` waits for it, but not for ever
        thread = threading.Thread(target=self._submit, args=(folder, step), name="submit evaluation", daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()
        return {}

    def close(self) -> None:
        """Wait until everything is submitted, 30 s at most. The trainer calls it at its end."""
        end = time.monotonic() + _PATIENCE_S
        for thread in self._threads:
            thread.join(timeout=max(0.0, end - time.monotonic()))
            if thread.is_alive():
                _say(f"a {self._task} evaluation was not submitted within {_PATIENCE_S:g} s, and may be missing")
        self._threads = []

    def _write_backbone(self, backbone: Any, folder: Path) -> None:
        """folder/backbone, as a whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{durable.TEMPORARY}*"):
            durable.remove(left)
        temporary = folder / f"{durable.TEMPORARY}backbone"
        self._export(backbone, temporary)
        durable.remove(folder / "backbone")
        durable.rename(temporary, folder / "backbone")

    def _submit(self, folder: Path, step: int) -> None:
        try:
            job = self._submit_to_slurm(folder) if self._told.kind == "slurm" else self._start_here(folder)
            what = {"job": job, "step": step, "task": self._task}
            durable.write_atomically(folder / "job.json", json.dumps(what) + "\n")
        except Exception as error:  # in a thread: whatever it is, the training goes on
            what_happened = str(error) if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {error}"
            _say(f"step {step}: its {self._task} evaluation cannot be submitted: {what_happened}")

    def _command(self, folder: Path, cluster: Cluster) -> str:
        words = [self._task, str(folder / "backbone"), *self._overrides, "--out", str(folder / f"{self._task}.json")]
        return commands.selfsup(cluster, self._code, "eval", *words)

    def _submit_to_slurm(self, folder: Path) -> str:
        """One process, whatever an evaluation that follows the training has: more would each do the whole of it."""
        from .script import Sbatch  # submitit comes with it

        cluster = self._told.cluster.for_evaluation()
        # the training's progress, by which crashes are counted, is not that of this job: it would come back for ever
        policy = cluster.requeue.model_copy(update={"crashes": 0})
        cluster = cluster.model_copy(update={"nodes": 1, "tasks_per_node": 1, "requeue": policy})
        after = commands.afterwards(self._run, cluster, self._code, self._task)
        name = f"{self._run.name} {self._task} {folder.name}"
        return Sbatch(cluster, self._logs, self._command(folder, cluster), name=name, after=after).launch()

    def _start_here(self, folder: Path) -> str:
        """In a session of its own, so that it outlives the training and what ends that."""
        self._logs.mkdir(parents=True, exist_ok=True)
        own = {k: v for k, v in os.environ.items() if k not in OF_A_RANK and not k.startswith("TORCHELASTIC_")}
        command = f"exec {self._command(folder, self._told.cluster)}"
        with open(self._logs / f"{self._task}_{folder.name}.out", "ab") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=own,
                start_new_session=True,
            )
        self._started.append(process)
        return f"local-{process.pid}"


def _say(text: str) -> None:
    """One line, whatever the text."""
    with contextlib.suppress(OSError):
        print(f"selfsup: {' '.join(text.split())}", file=sys.stderr, flush=True)
