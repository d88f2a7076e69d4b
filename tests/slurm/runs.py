"""Real training jobs on the test cluster, submitted as a user submits them, and what 'the same run' means."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfsup import checkpoint
from selfsup.config import dump
from selfsup.launch import history, submission
from tests.faults.lab import log, weights
from tests.methods.tiny import tiny_config, write_images
from tests.slurm.cluster import ROOT, Slurm

STEPS = 300
"""About twenty seconds with four ranks on two cores: time to be disturbed in."""
RANKS = ("nodes=2", "tasks_per_node=2")
CLUSTER = """
kind: slurm
partition: low
time: 20
cpus_per_task: 2
signal_before_s: 60
env: {OMP_NUM_THREADS: 1}
requeue: {delay_s: 1}
"""


class Runs:
    """Submits runs of one tiny recipe, with loader workers, in a folder whose name is no easy one."""

    def __init__(self, folder: Path) -> None:
        self.slurm: Slurm | None = None
        self.folder = folder / "Läufe von heute, 走る"
        self.folder.mkdir()
        self.images = write_images(self.folder / "Bilder (alle)", 48, classes=3)
        self.labelled = write_images(self.folder / "mit Klassen", 24, classes=3, seed=1)
        self.cluster = self.folder / "mein cluster.yaml"
        self.cluster.write_text(CLUSTER)
        self.recipe = self.folder / "Rezept.yaml"
        settings = ("precision=fp32", f"steps={STEPS}", "log_every=5", "checkpoint.every=25", "workers=1")
        labelled = (f"eval.train={self.images}", f"eval.val={self.labelled}")
        self.recipe.write_text(dump(tiny_config("dino", f"data={self.images}", *settings, *labelled)))
        self._undisturbed: dict[tuple[str, ...], Path] = {}

    def run(
        self, *arguments: str, status: int | None = 0, env: dict[str, str] | None = None, code: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`selfsup ...` in a new process, on the cluster. code: a folder to take the package from."""
        assert self.slurm is not None
        path = {"PYTHONPATH": str(code)} if code else {}
        command = [sys.executable, *(["-P"] if code else []), "-m", "selfsup.cli", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.slurm.env(**path, **(env or {})), capture_output=True, text=True, timeout=120
        )
        assert status is None or done.returncode == status, (
            f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def submit(self, name: str, *words: str, ranks: tuple[str, ...] = RANKS, **options: Any) -> "Run":
        """`selfsup submit` of the recipe into a run folder of this name."""
        out = self.folder / name
        given = ["--cluster", str(self.cluster), "--out", str(out), *ranks, *words]
        self.run("submit", str(self.recipe), *given, **options)
        return Run(self, out)

    def undisturbed(self, *words: str, ranks: tuple[str, ...] = RANKS) -> Path:
        """The folder of a run that nothing happened to; made once a session."""
        key = (*words, *ranks)
        if key not in self._undisturbed:
            run = self.submit(f"undisturbed {len(self._undisturbed)}", *words, ranks=ranks)
            run.ends("completed")
            assert run.status()["restarts"] == 0
            self._undisturbed[key] = run.out
        return self._undisturbed[key]


class Run:
    """One submitted run."""

    def __init__(self, runs: Runs, out: Path) -> None:
        assert runs.slurm is not None
        self.runs, self.slurm, self.out = runs, runs.slurm, out

    @property
    def job(self) -> str:
        """Slurm's number."""
        found = submission.read(self.out)
        assert found is not None and found.job is not None
        return found.job

    def status(self) -> dict[str, Any]:
        """What `selfsup status RUN --json` says of it."""
        (found,) = json.loads(self.runs.run("status", str(self.out), "--json").stdout)
        return found

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Its history as a training, of these kinds."""
        return [each for each in history.read(self.out) if each["event"] in kinds and each["task"] == "train"]

    def reasons(self) -> list[str]:
        """Why it was requeued, each time."""
        return [event["reason"] for event in self.events("requeue")]

    def step(self) -> int:
        """Lines of its log: each step has one."""
        try:
            return (self.out / "metrics.jsonl").read_bytes().count(b"\n")
        except OSError:
            return 0

    def starts(self, count: int, timeout: float = 120) -> None:
        """Until it has started so many times, and has trained on since the last of them."""
        self.until(lambda: len(self.events("start")) >= count, timeout, f"it does not start for the {count}. time")
        before = self.events("start")[-1]["step"]
        self.until(lambda: self.step() > before + 10, timeout, "it does not go on")
        assert self.step() < STEPS, "too quick to be disturbed"

    def checkpointed(self, more_than: int = 0, timeout: float = 60) -> int:
        """Until it has a checkpoint of a step above this; that step."""
        root = self.out / "checkpoints"

        def newest() -> int:
            return max((step for step, _ in checkpoint.steps(root) if step > more_than), default=0)

        return int(self.until(newest, timeout, "no checkpoint is written"))

    def ends(self, state: str, timeout: float = 240) -> dict[str, str]:
        """Until Slurm says that the job has ended; the state is what we say then."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.slurm.job(self.job).get("JobState") in ended, timeout, "it does not end")
        found = self.status()["state"]
        assert found == state, f"{found}, not {state}\n{self.told()}"
        return self.slurm.job(self.job)

    def until(self, condition: Callable[[], Any], timeout: float, otherwise: str) -> Any:
        """What `condition` returned once it was true; else everything the run printed."""
        return self.slurm.poll(condition, timeout, lambda: f"{otherwise}\n{self.told()}")

    def told(self) -> str:
        """Its history, how Slurm sees it, and the ends of its logs."""
        logs = sorted((self.out / "logs").glob("*.out")) if (self.out / "logs").is_dir() else []
        texts = [f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs]
        return "\n".join([*map(str, history.read(self.out)), str(self.slurm.job(self.job)), *texts])

    def log_of(self, rank: int) -> str:
        """What a rank printed, in all its starts."""
        return (self.out / "logs" / f"{self.job}_{rank}_log.out").read_text(errors="replace")

    def rank_pid(self, rank: int) -> int:
        """The process of a rank, as it tells itself."""
        return int(json.loads((self.out / "ranks" / f"rank_{rank:05d}.json").read_bytes())["pid"])

    def same_as(self, other: Path) -> None:
        """Bit for bit: every step once in the log, the same figures, weights, optimizer and exported backbone."""
        ours, theirs = log(self.out), log(other)
        assert len(ours) == len(theirs) == STEPS
        assert [(a["step"], a, b) for a, b in zip(ours, theirs) if a != b][:1] == []
        mine, others = weights(self.out, STEPS), weights(other, STEPS)
        assert mine.keys() == others.keys()
        assert [name for name in mine if mine[name] != others[name]] == []
        left = [str(path.relative_to(self.out)) for path in self.out.rglob("*") if "tmp" in path.name]
        assert left == [] and not (self.out / "lease.json").exists()
