"""A run that was stopped and resumed is the run that never was: bit for bit, for every method, wherever it stopped.

Every run is a set of processes of its own (over gloo where there are several), forked from one that has imported everything.
Where a run stops is drawn anew each time; SELFSUP_TEST_SEED=N, which a failure shows, draws the same places again.
"""

import itertools
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfsup.config import dump, load
from selfsup.methods import METHODS, find
from tests.faults.lab import checkpoints, ended, log, weights
from tests.faults.zygote import Process, Zygote
from tests.methods.tiny import METHOD_OPTIONS, TINY_RUN, TINY_VIT, write_images

SEED = int(os.environ.get("SELFSUP_TEST_SEED") or time.time_ns() % 1_000_000)
IMAGES, BATCH = 40, 16  # 2.5 steps an epoch
STEPS = 12
TOLERANCE = 1e-4
"""Largest difference of a loss, relative if it is above 1, after a resume at another world size; for so many steps:"""
AFTER = 20


class Lab:
    """Runs of one data set; a run is named by its recipe and its world size."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote, self.folder = zygote, folder
        self.images = write_images(folder / "images", IMAGES, classes=4)

    def recipe(
        self,
        name: str,
        method: str,
        *overrides: str,
        backbone: Sequence[str] = ("backbone.drop_path_rate=0.2", *TINY_VIT),
    ) -> Path:
        """A recipe file: a tiny run of this method and backbone."""
        common = (*TINY_RUN, f"data={self.images}", f"global_batch={BATCH}", f"steps={STEPS}")
        common = tuple(option for option in common if not option.startswith("backbone"))
        path = self.folder / f"{name}.yaml"
        path.write_text(dump(load(None, [*common, f"method={method}", *backbone, *METHOD_OPTIONS[method], *overrides])))
        return path

    def run(self, recipe: Path, out: Path, world: int, *overrides: str, status: int = 0) -> Process:
        """Train in `world` processes, from where `out` stands; the process of rank 0."""
        arguments = ["train", recipe, *overrides, "--out", out, "--resume"]
        if world == 1:
            processes = [self.zygote.start(arguments)]
        else:
            processes = self.zygote.ranks(arguments, world)
        for process in processes:
            ended(process, status, timeout=120)
        return processes[0]

    def stopped_twice(self, recipe: Path, out: Path, world: int, draw: random.Random) -> list[int]:
        """Stop in the middle of an epoch, resume, stop again, resume to the end: each time with another number of workers."""
        places = sorted(draw.sample([s for s in range(1, STEPS) if s * BATCH % IMAGES], 2))
        for stop, workers in zip([*places, None], draw.sample([0, 1, 2], 3)):
            options = [f"workers={workers}", *([f"stop_at={stop}"] if stop else [])]
            process = self.run(recipe, out, world, *options, status=75 if stop else 0)
            assert "not bitwise" not in process.stderr(), process.stderr()
            assert checkpoints(out)[-1] == (stop or STEPS)
        assert f"resuming at step {places[1]}" in process.stderr()
        return places


@pytest.fixture(scope="module")
def _lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Zygote(tmp_path_factory.mktemp("zygote")) as zygote:
        yield Lab(zygote, tmp_path_factory.mktemp("lab"))


@pytest.fixture
def lab(_lab: Lab) -> Iterator[Lab]:
    print(f"SELFSUP_TEST_SEED={SEED}")
    yield _lab
    _lab.zygote.end_all()


def trainer(run: Path) -> dict[str, Any]:
    found = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "trainer.json").read_text())
    return dict(found)


def assert_same(run: Path, whole: Path, world: int, what: str) -> None:
    """Log line by line but for clocks; student, teacher, centre, optimizer and generators of every rank; backbone; state."""
    ours, theirs = log(run), log(whole)
    assert len(ours) == STEPS and ours[-1]["epoch"] > 4, what
    assert [a["step"] for a, b in zip(ours, theirs) if a != b] == [], what
    mine, other = weights(run, STEPS), weights(whole, STEPS)
    assert mine.keys() == other.keys() and f"rank_{world - 1:05d}.safetensors" in mine
    assert [name for name in mine if mine[name] != other[name]] == [], what
    assert trainer(run) == trainer(whole), what


FAST = [("fp32", 4, 1), ("bf16", 1, 2)]
"""(precision, accumulate, world); the others of the matrix are slow."""

THOROUGH = ("dino", "dinov2", "distill", "moco")
"""Methods that go through all of the matrix: what it varies is the trainer's, and these have every kind of state that there is.
The others go through the fast cases, batch norm, and another world size."""

ROW = [pytest.mark.systems("One process, torchrun on CPU (gloo) and GPU (NCCL), bitwise resume")]

MATRIX = [
    pytest.param(method, *case, marks=([] if case in FAST else [pytest.mark.slow]) + (ROW if method == "dino" else []))
    for method in sorted(METHODS)
    for case in (itertools.product(("bf16", "fp32"), (1, 4), (1, 2, 4)) if method in THOROUGH else FAST)
]


@pytest.mark.parametrize(("method", "precision", "accumulate", "world"), MATRIX)
def test_resume_is_bitwise(lab: Lab, tmp_path: Path, method: str, precision: str, accumulate: int, world: int) -> None:
    if hasattr(find(method), "whole_batch"):
        accumulate = 1  # more is refused
    case = f"{method}_{precision}_{accumulate}_{world}"
    draw = random.Random(f"{SEED} {case}")
    recipe = lab.recipe(case, method, f"precision={precision}", f"accumulate={accumulate}")
    lab.run(recipe, tmp_path / "whole", world, f"workers={draw.choice([0, 2])}")
    places = lab.stopped_twice(recipe, tmp_path / "parts", world, draw)
    assert_same(tmp_path / "parts", tmp_path / "whole", world, f"stopped at {places}; SELFSUP_TEST_SEED={SEED}")


VITS = {"capi", "deit", "dinov2", "ibot", "ijepa", "mae", "msn", "simmim"}
"""Methods of a ViT alone, and SimMIM, whose squares are larger than these images if they are as large as a ResNet's stride."""


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS.keys() - VITS))
def test_resume_is_bitwise_with_batch_norm(lab: Lab, tmp_path: Path, method: str) -> None:
    """Running statistics, which two ranks compute together; convolutions, whose moments are channels-last."""
    case = f"{method}_batch_norm"
    draw = random.Random(f"{SEED} {case}")
    convolutions = ("backbone=resnet10t", "backbone.channels=[8,16,16,32]", "backbone.stem_width=8", "optimizer=sgd")
    recipe = lab.recipe(case, method, "precision=fp32", backbone=convolutions)
    lab.run(recipe, tmp_path / "whole", 2)
    places = lab.stopped_twice(recipe, tmp_path / "parts", 2, draw)
    assert_same(tmp_path / "parts", tmp_path / "whole", 2, f"stopped at {places}; SELFSUP_TEST_SEED={SEED}")


WORLDS = [
    pytest.param(method, *worlds, marks=() if worlds == (2, 1) else pytest.mark.slow)
    for method in sorted(METHODS)
    for worlds in ((2, 1), (1, 2), (4, 2))
    if method in THOROUGH or worlds == (2, 1)
]


@pytest.mark.parametrize(("method", "before", "after"), WORLDS)
def test_resume_at_another_world_size(lab: Lab, tmp_path: Path, method: str, before: int, after: int) -> None:
    """Announced as not bitwise; the losses of the next steps are those of the run that went on as it was."""
    draw = random.Random(f"{SEED} {method} {before} {after}")
    stop = draw.choice([s for s in range(4, 10) if s * BATCH % IMAGES])
    steps = 9 + AFTER
    normalises = getattr(
        find(method), "batch_statistics", False
    )  # over images that differ little: float32 is too coarse
    options = (
        f"precision={'fp64' if normalises else 'fp32'}",
        f"steps={steps}",
        "optimizer.lr=1e-3",
        "optimizer.warmup=2 steps",
    )
    recipe = lab.recipe(f"{method}_{before}_{after}", method, *options)
    lab.run(recipe, tmp_path / "whole", before)
    lab.run(recipe, tmp_path / "parts", before, f"stop_at={stop}", status=75)
    process = lab.run(recipe, tmp_path / "parts", after)
    assert f"not bitwise: world_size {before} -> {after}" in process.stderr()
    ours, theirs = log(tmp_path / "parts"), log(tmp_path / "whole")
    assert ours[:stop] == theirs[:stop] and len(ours) == len(theirs) == steps
    pairs = [(a["loss"], b["loss"]) for a, b in zip(ours[stop:], theirs[stop:])][:AFTER]
    differences = [abs(a - b) / max(1, abs(b)) for a, b in pairs]
    print(f"largest difference of {AFTER} losses after step {stop}: {max(differences):.1e}")
    assert len(differences) == AFTER and max(differences) <= TOLERANCE, f"stopped at {stop}; SELFSUP_TEST_SEED={SEED}"
    assert len({a["loss"] for a in ours[stop:]}) == len(ours) - stop  # it learns, so there is something to compare
