"""What a cached teacher (`teacher.cache=FOLDER`) saves: img/s of distillation with the teacher computing, with a cache that is
being filled, and with one that is full.

    python benchmarks/cached_teacher.py [--only resnet50,vit_small] [--steps 40] [--rounds 3] [--json FILE]

Each is `selfsup train` in a process of its own, the three of a round one after another, on the bundled images; the times
are those of the log, without the first steps. Weights are random: they do not change what a step costs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

WARM = 10
"""Steps that are not timed."""
BATCH = 16
WAYS = ("no cache", "filling", "full")


@dataclass(frozen=True)
class Case:
    """Teacher, student and what is learned."""

    teacher: str
    student: str
    size: int
    overrides: tuple[str, ...]
    topk: int | None = None


CASES = {
    "resnet50": Case("resnet50", "resnet18", 112, ("method.losses={ce: 1, soft: 1}",)),
    "resnet50_top5": Case("resnet50", "resnet18", 112, ("method.losses={ce: 1, soft: 1}",), topk=5),
    "vit_small_patches": Case(
        "vit_small_patch16_224", "vit_tiny_patch16_224", 112, ("method.losses={cls_cosine: 1, patch_cosine: 1}",)
    ),
}


def teacher() -> Any:
    """A network of the name in TEACHER, with weights that are the same each time."""
    import timm
    import torch

    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 112} if "vit" in os.environ["TEACHER"] else {}
    return timm.create_model(os.environ["TEACHER"], num_classes=10, in_chans=1, **options)


def speed(case: Case, way: str, cache: Path, steps: int, work: Path) -> float:
    """img/s over the steps after the first."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    overrides = [
        "data=demo", "data.mean=[0.286]", "data.std=[0.353]", "backbone.in_chans=1", f"backbone={case.student}",
        f"views.global.size={case.size}", "views.global.count=1", "views.global.blur=0", "views.global.solarize=0",
        "views.local.count=0", "method=distill", "teacher=benchmarks.cached_teacher:teacher", f"teacher.size={case.size}",
        f"global_batch={BATCH}", f"steps={WARM + steps}", f"log_every={WARM}", "precision=fp32", "device=cpu", "workers=0",
        "checkpoint.every=100000", "tensorboard=false", *case.overrides,
    ]  # fmt: skip
    if "vit" in case.student:
        overrides += [f"backbone.img_size={case.size}"]
    if way != "no cache":
        overrides += [f"teacher.cache={cache}"] + ([f"teacher.cache_topk={case.topk}"] if case.topk else [])
    recipe = work / "empty.yaml"
    recipe.write_text("{}\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TEACHER": case.teacher}
    command = [sys.executable, "-m", "selfsup.cli", "train", str(recipe), *overrides, "--out", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = next(x for x in lines if x["step"] == WARM), lines[-1]
    return float((last["samples"] - first["samples"]) / (last["time"] - first["time"]))


def measure(case: Case, steps: int, rounds: int) -> dict[str, Any]:
    """img/s of each way, a list over the rounds, and the bytes that the cache took an image."""
    found: dict[str, Any] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for n in range(rounds):
            cache = Path(folder) / f"cache{n}"
            for way in WAYS:
                found[way].append(speed(case, way, cache, steps, Path(folder)))
                print(f"{time.strftime('%H:%M:%S')} {case.teacher}, {way}: {found[way][-1]:.1f} img/s", file=sys.stderr)
            size = sum(512 * file.stat().st_blocks for file in cache.rglob("*") if file.is_file())
            found["bytes_an_image"] = size / ((WARM + steps) * BATCH)
            shutil.rmtree(cache)
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown; ratios are medians over the rounds of a round's own."""
    lines = [
        "| teacher, student, losses | no cache, img/s | filling | full | full / none | bytes an image |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        none, filling, full = (statistics.median(found[way]) for way in WAYS)
        ratios = [a / b for a, b in zip(found["full"], found["no cache"], strict=True)]
        case = CASES[name]
        what = f"{case.teacher}, {case.student}, {case.overrides[0].partition('=')[2]}" + (
            f", top {case.topk}" if case.topk else ""
        )
        ratio = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        lines.append(f"| {what} | {none:.1f} | {filling:.1f} | {full:.1f} | {ratio} | {found['bytes_an_image']:.0f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--only {unknown[0]}: known are {', '.join(CASES)}")
    results = {name: measure(CASES[name], args.steps, args.rounds) for name in names}
    print(table(results))
    if args.json is not None:
        sys.path.insert(0, str(ROOT))
        from selfsup import runtime

        args.json.write_text(
            json.dumps(
                {"date": time.strftime("%Y-%m-%d"), "machine": runtime.fingerprint(), "results": results}, indent=1
            )
            + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
