"""Every self-supervised `*_demo` recipe, and lightly's own examples, with the same seconds of one CPU core for each.

    python benchmarks/methods.py [--only dino,simclr,lightly_simclr] [--seeds 0,1,2] [--budget 120] [--jobs 2]
                                 [--work DIR] [--json FILE] [--table]

A run gets as many steps as it makes in the budget, by the least CPU time of its row's steps in some short runs, which come
first; its schedules end with them. Its k-NN is taken at equal distances on the way; at the end k-NN and linear probe
(`selfsup eval`), RankMe of the k-NN's bank, and the peak of its memory. What has run is in the JSON and is not run again
unless the recipe or the budget has changed. The table, in Markdown as well, and the picture of accuracy over time are made
from it; `lightly_NAME` is lightly's example on the images, crops, backbone and optimizer of our NAME (see
`methods_lightly.py`), with the interval of the difference over the seeds.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("benchmarks") is None:
    sys.path.append(str(ROOT))

from benchmarks import forks, methods_table  # noqa: E402
from benchmarks.forks import say  # noqa: E402
from benchmarks.methods_lightly import EXAMPLES  # noqa: E402
from selfsup import durable  # noqa: E402

CALIBRATION = (10, 50)
"""Steps of two short runs, from whose difference the steps of a budget are reckoned,"""
ROUNDS = 3
"""so many times, all rows by turns; the least time counts: the others had company."""
SNAPSHOTS = 5
PEER = "lightly_"
OVERRIDES = [
    "epochs=null", "samples=null", "workers=0", "threads=1", "device=cpu", "tensorboard=false", "eval.train=demo",
    "eval.val=demo:val", "checkpoint.every=1000000",
]  # fmt: skip
NEED_MORE = ("byot", "deit", "distill", "supervised", "supcon")
"""Methods that learn from labels or a teacher; they have a benchmark of their own (`distill.py`)."""


@dataclass
class Lab:
    """Where and how runs are made, and what is known already."""

    work: Path
    file: Path
    budget: float
    recipes: dict[str, str]
    """Our rows: name -> recipe."""
    runs: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    rates: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Steps that a row makes in a second of CPU time, images in each."""

    def key(self, row: str) -> str:
        """Of everything that a run depends on but the seed."""
        recipe = ROOT / "selfsup" / "recipes" / f"{self.recipes[row.removeprefix(PEER)]}.yaml"
        return hashlib.sha256(recipe.read_bytes() + f"{row} {self.budget}".encode()).hexdigest()[:16]

    def known(self, row: str, seed: int) -> bool:
        """Whether the JSON has this run."""
        found = self.runs.get(row, {}).get(str(seed))
        return found is not None and found["key"] == self.key(row)

    def keep(self, row: str, seed: int, found: dict[str, Any]) -> None:
        """Into the JSON, at once."""
        with self.lock:
            self.runs.setdefault(row, {})[str(seed)] = found
            text = json.dumps({"budget": self.budget, "runs": self.runs}, indent=1, sort_keys=True)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            durable.write_atomically(self.file, text + "\n")


def demos() -> dict[str, str]:
    """Row -> recipe, of the demos that need neither labels nor a teacher: NAME of NAME_demo."""
    from selfsup.config import load

    found = {}
    for path in sorted((ROOT / "selfsup" / "recipes").glob("*demo.yaml")):
        method = load(path.stem, []).method.name
        if method not in NEED_MORE:
            found[method if path.stem == "demo" else path.stem.removesuffix("_demo")] = path.stem
    return found


# ------------------------------------------------------------------------------------------------------------- one run


def measure(lab: Lab, row: str, seed: int) -> dict[str, Any]:
    """Train and evaluate; what goes into the JSON."""
    peer, name = row.startswith(PEER), row.removeprefix(PEER)
    run = lab.work / "runs" / f"{row}_seed{seed}_{lab.key(row)}"
    shutil.rmtree(run, ignore_errors=True)
    rate, batch = lab.rates[row]
    config = lab.work / "calibration" / row / "config.yaml"
    steps = max(2 * SNAPSHOTS, round(lab.budget * rate))
    if peer:
        told = _example(name, config, run, steps, SNAPSHOTS, seed)
        curve = [
            (int(folder.name) / steps, _knn(folder, run)["metrics"]["top1"])
            for folder in sorted((run / "snapshots").iterdir())
        ]
        target = run / "backbone"
    else:
        every = max(1, steps // SNAPSHOTS)
        started = [
            *OVERRIDES,
            f"seed={seed}",
            f"steps={steps}",
            f"eval.every={every}",
            f"log_every={max(1, steps // 20)}",
        ]
        spent = forks.selfsup(run.with_suffix(".log"), "train", lab.recipes[name], *started, "--out", str(run))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curve = [(line["step"] / steps, line["eval"]["knn_top1"]) for line in lines if "eval" in line]
        told = {"peak_mb": spent.peak_mb}
        target = run
    knn = _knn(target, run)
    linear = run / "linear.json"
    data = ["eval.train=demo", "eval.val=demo:val", "workers=0"]
    forks.selfsup(run.with_suffix(".log"), "eval", "linear", str(target), *data, "--out", str(linear))
    return {
        "key": lab.key(row),
        "img_per_s": round(rate * batch, 1),
        "peak_mb": round(told["peak_mb"]),
        "steps": steps,
        "knn": knn["metrics"]["top1"],
        "rankme": knn["protocol"]["rankme"],
        "dimensions": knn["protocol"]["dimensions"],
        "linear": json.loads(linear.read_text())["metrics"]["top1"],
        "curve": curve,
    }


def calibrate(lab: Lab, rows: Sequence[str], jobs: int) -> None:
    """Set `lab.rates` of rows; our resolved configuration is left in WORK/calibration/ROW/config.yaml."""
    seconds: dict[str, list[tuple[float, float]]] = {row: [] for row in rows}
    for number in range(ROUNDS):
        say(f"speed of {len(rows)} rows, round {number + 1} of {ROUNDS}")
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for row, found in zip(rows, pool.map(lambda row: _speed(lab, row), rows)):
                seconds[row].append(found)
    for row in rows:
        few, many = (min(values) for values in zip(*seconds[row], strict=True))
        line = json.loads((lab.work / "calibration" / row / "metrics.jsonl").read_text().splitlines()[-1])
        lab.rates[row] = (CALIBRATION[1] - CALIBRATION[0]) / (many - few), line["samples"] // line["step"]
        say(f"{row}: {lab.rates[row][0]:.2f} steps a second")


def _speed(lab: Lab, row: str) -> tuple[float, float]:
    """CPU seconds of a run of each length in CALIBRATION."""
    name, out, took = row.removeprefix(PEER), lab.work / "calibration" / row, []
    for steps in CALIBRATION:
        shutil.rmtree(out, ignore_errors=True)
        if row.startswith(PEER):  # one step of ours, for the configuration
            options = [*OVERRIDES, "steps=1", "log_every=1", "eval.every=null", "--out", str(out)]
            forks.selfsup(out.with_suffix(".log"), "train", lab.recipes[name], *options)
            took.append(_example(name, out / "config.yaml", out / "peer", steps, 0, 0)["seconds"])
        else:
            options = [*OVERRIDES, f"steps={steps}", f"log_every={steps}", "eval.every=null", "--out", str(out)]
            took.append(forks.selfsup(out.with_suffix(".log"), "train", lab.recipes[name], *options).seconds)
    return took[0], took[1]


def _example(name: str, config: Path, out: Path, steps: int, snapshots: int, seed: int) -> dict[str, Any]:
    """lightly's example in a process of its own."""
    out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, "-m", "benchmarks.methods_lightly", name, str(config), str(out), "--steps", str(steps),
        "--snapshots", str(snapshots), "--seed", str(seed),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise forks.Failed(f"{' '.join(command[1:5])} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return dict(json.loads((out / "metrics.json").read_text()))


def _knn(target: Path, run: Path) -> dict[str, Any]:
    file = run / f"knn_{target.name}.json"
    data = ["eval.train=demo", "eval.val=demo:val", "workers=0"]
    forks.selfsup(run.with_suffix(".log"), "eval", "knn", str(target), *data, "--out", str(file))
    return dict(json.loads(file.read_text()))


# ------------------------------------------------------------------------------------------------------------ all runs


def work(lab: Lab, rows: Sequence[str], seeds: Sequence[int], jobs: int) -> list[str]:
    """Run what is not known; the failures."""
    failures: list[str] = []
    todo = [(row, seed) for seed in seeds for row in rows if not lab.known(row, seed)]
    calibrate(lab, [row for row in rows if any(row == each for each, _ in todo)], jobs)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(measure, lab, row, seed): (row, seed) for row, seed in todo}
        for done in concurrent.futures.as_completed(running):
            row, seed = running[done]
            try:
                found = done.result()
            except forks.Failed as error:
                failures.append(f"{row}, seed {seed}: {error}")
                say(failures[-1])
                continue
            lab.keep(row, seed, found)
            say(f"{row}, seed {seed}: k-NN {found['knn']:.4f}, linear {found['linear']:.4f}, {found['steps']} steps")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="methods, as in dino,lightly_dino")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds of training a run, on one core")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "methods", help="where run folders go")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "methods.json")
    parser.add_argument("--table", action="store_true", help="only show what the JSON has")
    args = parser.parse_args(arguments)
    parts = [part.strip() for part in args.seeds.split(",")]
    if not all(part.isdigit() for part in parts):
        parser.error(f"--seeds {args.seeds}: numbers, as in 0,1,2")
    if args.budget <= 0 or args.jobs < 1:
        parser.error(f"--budget {args.budget}, --jobs {args.jobs}: both are more than 0")
    stored = json.loads(args.json.read_text()) if args.json.is_file() else {"runs": {}, "budget": args.budget}
    if args.table:
        present(stored["runs"], stored["budget"], args.json)
        return 0
    recipes = demos()
    every = [row for name in recipes for row in (name, *([PEER + name] if name in EXAMPLES else []))]
    rows = [part.strip() for part in args.only.split(",")] if args.only else every
    if unknown := [row for row in rows if row not in every]:
        parser.error(f"--only {unknown[0]}: known are {', '.join(every)}")
    args.work.mkdir(parents=True, exist_ok=True)
    lab = Lab(args.work.absolute(), args.json, args.budget, recipes, stored["runs"])
    failures = work(lab, rows, list(dict.fromkeys(map(int, parts))), args.jobs)
    present(lab.runs, args.budget, args.json)
    for failure in failures:
        say(f"failed: {failure}")
    return 1 if failures else 0


def present(runs: Any, budget: float, file: Path) -> None:
    """Print the table; write it as Markdown, and the picture, beside the JSON."""
    text = methods_table.markdown(runs, budget)
    print(text)
    if runs:
        file.with_suffix(".md").write_text(text)
        methods_table.picture(runs, budget, file.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
