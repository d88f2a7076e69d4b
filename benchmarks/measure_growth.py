"""What `growth` measures at one size, in a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import photographs, protocol
from benchmarks.rows import Row, initial_state

TINY = Row(
    name="growth",
    title="",
    peers=(),
    backbone="vit_tiny_patch16_224",
    backbone_options={"img_size": 32, "patch_size": 8, "depth": 4},
    batch=8,
    global_size=32,
    local_size=16,
    locals=6,
    out_dim=4096,
    hidden_dim=256,
    bottleneck_dim=128,
)
Found = dict[str, Any]


def fastest(run: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of a few runs, after one to warm up."""
    run()
    seen = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seen.append(time.perf_counter() - began)
    return min(seen)


def images(size: int, folder: Path) -> Found:
    """An index of `size` lines: opening it, the first batch of a worker, and the memory that is the worker's own."""
    from selfsup.config import Config
    from selfsup.data.loader import Loader
    from selfsup.data.sources import open_source
    from selfsup.data.views import multicrop

    files = folder / "images"
    if not files.exists():
        photographs.write(files, 64)
    names = sorted(str(path.relative_to(folder)) for path in files.rglob("*.jpg"))
    table = folder / f"{size}.txt"
    with table.open("w") as out:
        out.writelines(f"{names[i % len(names)]}\n" for i in range(size))
    began = time.perf_counter()
    source = open_source(str(table), channels=3)
    opened = time.perf_counter() - began
    views = multicrop(Config().views)
    waits, private = [], []
    for attempt in range(3):
        children = set(_children())
        began = time.perf_counter()
        stream = Loader(source, views, seed=attempt, global_batch=8, workers=1).stream(0, 1000)
        next(stream)
        waits.append(time.perf_counter() - began)
        for _ in range(8):
            next(stream)
        private += [_private_bytes(child) for child in set(_children()) - children]
        stream.close()
    costs = {
        "seconds to open": opened,
        "seconds to first batch": min(waits),
        "MB of a worker's own": min(private) / 1e6,
    }
    return {"costs": costs}


def _children() -> list[int]:
    return [int(x) for x in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def _private_bytes(process: int) -> int:
    """Memory that this process shares with no other."""
    total = 0
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            total += int(line.split()[1]) * 1024
    return total


def _step(row: Row) -> Found:
    """Seconds and memory of our step."""
    from benchmarks.ours import Ours
    from benchmarks.peers import Lightly

    Ours.prepare()
    before = protocol.memory_bytes("VmRSS")
    ours = Ours(row, initial_state(row), Lightly)
    seconds = fastest(lambda: ours.step(2)) / 2
    peak = protocol.memory_bytes("VmHWM") - before
    return {"costs": {"seconds a step": seconds, "MB at peak": peak / 1e6}}


def crops(size: int, folder: Path) -> Found:
    """A step with `size` local crops."""
    return _step(replace(TINY, locals=size))


def prototypes(size: int, folder: Path) -> Found:
    """A step with `size` prototypes."""
    return _step(replace(TINY, out_dim=size))


def knn(size: int, folder: Path) -> Found:
    """A k-NN evaluation with a bank of `size` images."""
    from selfsup.eval import knn as evaluation

    draw = torch.Generator().manual_seed(0)
    labels, wanted = (torch.randint(100, (n,), generator=draw).numpy() for n in (size, 500))
    bank, queries = (torch.randn(n, 384, generator=draw).numpy() for n in (size, 500))
    before = protocol.memory_bytes("VmRSS")

    def run() -> None:
        evaluation.classify(bank, labels, queries, wanted, ks=(20, 200))

    seconds = fastest(run, times=3 if size <= 10**5 else 1)
    return {"costs": {"seconds": seconds, "MB above the bank": (protocol.memory_bytes("VmHWM") - before) / 1e6}}


def ranks(size: int, folder: Path) -> Found:
    """Bytes and calls that each of `size` ranks hands to collectives in a step."""
    port = 20_000 + os.getpid() % 20_000
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.measure_growth", str(folder / f"run{size}")],
            cwd=protocol.ROOT,
            env={**protocol.thread_environment(1), **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"ranks ended with {[process.returncode for process in processes]}")
    found = json.loads(said[0].splitlines()[-1])
    share = found["bytes"] / found["gradient_bytes"]
    note = f"{size} rank(s): {found['bytes']:.0f} bytes a step in {found['calls']:.0f} calls, {share:.3f}x of the gradients"
    return {"costs": {"bytes a step": found["bytes"], "calls a step": found["calls"]}, "notes": [note]}


def rank_main(out: Path) -> None:
    """One rank: a few steps of the real trainer, whose collectives are counted."""
    import torch.distributed as td

    from selfsup import config as configuration
    from selfsup import train as training

    counted = {"bytes": 0.0, "calls": 0.0}
    steps: list[dict[str, float]] = []
    sizes: list[int] = []

    def watch(name: str) -> None:
        original = getattr(td, name)

        def called(*a: Any, **k: Any) -> Any:
            tensors = a[0] if isinstance(a[0], (list, tuple)) else [a[0]]
            counted["bytes"] += sum(t.numel() * t.element_size() for t in tensors)
            counted["calls"] += 1
            return original(*a, **k)

        setattr(td, name, called)

    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "reduce_scatter_tensor"):
        watch(name)
    original = training._loop

    def loop(run: Any, stream: Any, recorder: Any, *rest: Any) -> Any:
        record = recorder.record
        sizes.append(sum(p.numel() * p.element_size() for p in run.method.student.parameters() if p.requires_grad))

        def noted(*a: Any, **k: Any) -> None:
            steps.append(dict(counted))
            record(*a, **k)

        recorder.record = noted
        return original(run, stream, recorder, *rest)

    training._loop = loop  # type: ignore[assignment]
    words = [
        "data=demo", "backbone=vit_tiny_patch16_224", "backbone.in_chans=1", "backbone.img_size=28", "backbone.patch_size=7",
        "views.global.size=28", "views.local.size=14", "views.local.count=2", "method.out_dim=4096", "method.hidden_dim=256",
        "method.bottleneck_dim=64", "method.freeze_last_layer=0 epochs", "global_batch=8", "steps=6", "workers=0", "device=cpu",
        "precision=fp32", "tensorboard=false", "log_every=100", "checkpoint.every=100", "threads=1",
    ]  # fmt: skip
    training.train(configuration.load(None, words), out=out, quiet=True)
    if os.environ["RANK"] == "0":  # from the end of one step's computation to the next one's
        a, b = steps[2], steps[3]
        print(json.dumps({k: b[k] - a[k] for k in b} | {"gradient_bytes": sizes[0]}), flush=True)


KINDS: dict[str, Callable[[int, Path], Found]] = {
    "images": images, "crops": crops, "prototypes": prototypes, "ranks": ranks, "knn": knn,
}  # fmt: skip


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    from selfsup import dist

    dist.shutdown()
