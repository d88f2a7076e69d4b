"""What distillation and the supervised tricks bring on real images, at an equal budget for all rows.

    python benchmarks/distill.py [--data demo|fashion] [--seeds 0,1,2] [--only kd,byot] [--budget 1000 | --budget 60s]
                                 [--jobs 2] [--work DIR] [--json FILE]

The rows are in `distill_rows.py`: a recipe and what differs from it. Every run is `selfsup train`, with the evaluation at its
end, in a process of its own with one thread, forked from one that has imported the libraries; `--jobs` of them at a time.
What has run is in the JSON and is not run again, unless its row, the data or the budget have changed; the table, in Markdown
as well, and the picture are made from it.

fashion: all 60,000 and 10,000 images, where /usr/share/datasets/fashion-mnist has them; demo: the bundled 10,000 and 2,000.
The budget is steps of 128 images, the same for every row (one with larger batches takes fewer); or seconds, for which each
row gets as many steps as it does in them.
"""

import argparse
import concurrent.futures
import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("benchmarks") is None:
    sys.path.append(str(ROOT))

from benchmarks import distill_table, forks  # noqa: E402
from benchmarks.distill_rows import BASE, BATCH, GROUPS, ROWS, Row  # noqa: E402
from benchmarks.forks import say  # noqa: E402
from selfsup import durable  # noqa: E402

FASHION = Path("/usr/share/datasets/fashion-mnist")
CALIBRATION = 40
"""Steps from which the steps of a budget in seconds are reckoned."""


@dataclass
class Lab:
    """Where and how runs are made, and what is known already."""

    work: Path
    file: Path
    setting: dict[str, Any]
    train: str
    val: str
    jobs: int = 2
    runs: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def known(self, row: Row, seed: int) -> bool:
        """Whether the JSON has this run, of this very row."""
        found = self.runs.get(row.name, {}).get(str(seed))
        return found is not None and found["key"] == self.key(row)

    def key(self, row: Row) -> str:
        """Of everything that a run depends on but the seed."""
        teacher = self.key(_row(row.teacher)) if row.teacher else ""
        text = json.dumps([BASE, row.overrides, row.times, teacher, self.setting], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def keep(self, row: Row, seed: int, found: dict[str, Any]) -> None:
        """Into the JSON, at once."""
        with self.lock:
            self.runs.setdefault(row.name, {})[str(seed)] = found
            text = json.dumps({"setting": self.setting, "runs": self.runs}, indent=1, sort_keys=True)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            durable.write_atomically(self.file, text + "\n")

    def forget_stale(self) -> None:
        """Drop what was measured with another setting or of rows that have changed since."""
        names = {row.name: row for row in ROWS}
        for name in list(self.runs):
            kept = {
                s: run for s, run in self.runs[name].items() if name in names and run["key"] == self.key(names[name])
            }
            if len(kept) < len(self.runs[name]):
                say(f"{name}: measured with another setting, measured again")
            self.runs[name] = kept
        self.runs = {name: found for name, found in self.runs.items() if found}


def _row(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


# ------------------------------------------------------------------------------------------------------------- one run


def measure(lab: Lab, row: Row, seed: int) -> dict[str, Any]:
    """Train and evaluate; what goes into the JSON."""
    run = lab.work / "runs" / f"{row.name}_seed{seed}_{lab.key(row)}"
    steps = _steps(lab, row, seed)
    overrides = _overrides(lab, row, seed, steps)
    seconds = _selfsup(run, "train", str(_recipe(lab)), *overrides, "--out", str(run), "--resume")
    found = json.loads((run / "eval" / "classify.json").read_text())
    rows = {r["classifier"]: r["top1"] for r in found.get("settings") or []}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "key": lab.key(row),
        "top1": found["metrics"]["top1"],
        "classifiers": rows,
        "loss": metrics[-1]["loss"],
        "steps": steps,
        "seconds": round(seconds, 1),
        "overrides": [text for text in overrides if not text.startswith(("data.path", "data.val", "teacher.path"))],
    }


def _steps(lab: Lab, row: Row, seed: int) -> int:
    budget, batch = lab.setting["budget"], int(row.overrides.get("global_batch", BATCH))
    if budget.endswith("s"):
        run = lab.work / "calibration" / row.name
        shutil.rmtree(run, ignore_errors=True)
        _selfsup(run, "train", str(_recipe(lab)), *_overrides(lab, row, seed, CALIBRATION), "--out", str(run))
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        rate = metrics[-1]["img_per_s"] / batch  # steps a second, after the first ones
        return max(CALIBRATION, round(float(budget[:-1]) * rate * row.times))
    return round(int(budget) * row.times * BATCH / batch)


def _overrides(lab: Lab, row: Row, seed: int, steps: int) -> list[str]:
    values = {**row.overrides, "steps": steps, "seed": seed, "data.path": lab.train, "data.val": lab.val}
    if row.teacher is not None:
        teacher = _row(row.teacher)
        values["teacher.path"] = str(lab.work / "runs" / f"{teacher.name}_seed0_{lab.key(teacher)}")
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def _recipe(lab: Lab) -> Path:
    """What all rows have in common, as a recipe (YAML is a superset of JSON)."""
    path = lab.work / "base.yaml"
    if not path.is_file():
        temporary = path.with_name(f".base.{os.getpid()}.{threading.get_ident()}.tmp")
        temporary.write_text(
            "# what all rows of benchmarks/distill.py have in common\n" + json.dumps(BASE, indent=1) + "\n"
        )
        os.replace(temporary, path)
    return path


def _selfsup(run: Path, *arguments: str) -> float:
    """`selfsup ...`; what it says goes to RUN.log. Returns its seconds of CPU."""
    return forks.selfsup(run.with_name(run.name + ".log"), *arguments).seconds


# ------------------------------------------------------------------------------------------------------------ all runs


def plan(rows: Sequence[Row], seeds: Sequence[int]) -> tuple[list[tuple[Row, int]], list[tuple[Row, int]]]:
    """(teachers that the rows need, the rows): a teacher is trained once, with seed 0."""
    teachers = {row.teacher for row in rows if row.teacher is not None}
    first = [(row, 0) for row in ROWS if row.name in teachers]
    return first, [(row, seed) for seed in seeds for row in rows if (row, seed) not in first]


def work(lab: Lab, rows: Sequence[Row], seeds: Sequence[int]) -> list[str]:
    """Run what is not known; the failures."""
    failures: list[str] = []
    for jobs in plan(rows, seeds):
        todo = [(row, seed) for row, seed in jobs if not lab.known(row, seed)]
        with concurrent.futures.ThreadPoolExecutor(lab.jobs) as pool:
            running = {pool.submit(measure, lab, row, seed): (row, seed) for row, seed in todo}
            for done in concurrent.futures.as_completed(running):
                row, seed = running[done]
                try:
                    found = done.result()
                except forks.Failed as error:
                    failures.append(f"{row.name}, seed {seed}: {error}")
                    say(failures[-1])
                    continue
                lab.keep(row, seed, found)
                say(
                    f"{row.name}, seed {seed}: top-1 {found['top1']:.4f} after {found['steps']} steps, {found['seconds']:.0f} s"
                )
        if failures:
            break  # rows without their teacher would fail one by one
    return failures


def data(name: str, folder: Path) -> tuple[str, str]:
    """(train, val) of a data set by its name, unpacked under `folder` if need be."""
    if name == "demo":
        return "demo", "demo:val"
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        source, target = FASHION / f"{part}-ubyte.gz", raw / f"{part}-ubyte"
        if not source.is_file():
            raise SystemExit(f"--data fashion: {source} is not there; use --data demo")
        if not target.is_file():
            target.write_bytes(gzip.decompress(source.read_bytes()))
    return f"torchvision:FashionMNIST:{folder}:train", f"torchvision:FashionMNIST:{folder}:test"


def choose(only: str | None) -> list[Row]:
    """Rows by group or name, with those they are compared with."""
    names = [part.strip() for part in only.split(",")] if only else list(GROUPS)
    known = {row.name for row in ROWS} | set(GROUPS)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--only {unknown[0]}: known are {', '.join([*GROUPS, *(row.name for row in ROWS)])}")
    chosen = {row.name for row in ROWS if row.name in names or row.group in names}
    for row in reversed(ROWS):  # a row comes after the one it is compared with
        if row.name in chosen and row.against is not None:
            chosen.add(row.against)
    return [row for row in ROWS if row.name in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("demo", "fashion"), default="fashion" if FASHION.is_dir() else "demo")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="groups or rows, as in kd,byot")
    parser.add_argument("--budget", default="1000", help="steps a run, or seconds as in 60s")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "distill", help="where run folders go")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "distill.json")
    parser.add_argument("--table", action="store_true", help="only show what the JSON has")
    args = parser.parse_args(arguments)
    seeds = _seeds(parser, args.seeds)
    budget = args.budget.strip()
    if not budget.removesuffix("s").isdigit() or int(budget.removesuffix("s")) < 1:
        parser.error(f"--budget {args.budget}: a number of steps, or of seconds as in 60s")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least 1")
    rows = choose(args.only)
    setting: dict[str, Any] = {"data": args.data, "budget": budget}
    stored = json.loads(args.json.read_text()) if args.json.is_file() else {"setting": setting, "runs": {}}
    if args.table:
        present(stored["runs"], stored["setting"], args.json)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    work_folder = args.work.absolute()
    train, val = data(args.data, work_folder / "data")
    lab = Lab(work_folder, args.json, setting, train, val, args.jobs, stored["runs"])
    lab.forget_stale()
    began = time.monotonic()
    failures = work(lab, rows, seeds)
    present(lab.runs, setting, args.json)
    say(f"{time.monotonic() - began:.0f} s, {args.jobs} at a time")
    for failure in failures:
        say(f"failed: {failure}")
    return 1 if failures else 0


def _seeds(parser: argparse.ArgumentParser, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not parts or not all(part.isdigit() for part in parts):
        parser.error(f"--seeds {text}: numbers, as in 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))


def present(runs: Any, setting: dict[str, Any], file: Path) -> None:
    """Print the tables; write them as Markdown, and the picture, beside the JSON."""
    distill_table.show(runs, setting)
    if runs:
        file.with_suffix(".md").write_text(distill_table.markdown(runs, setting))
        distill_table.picture(runs, file.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
