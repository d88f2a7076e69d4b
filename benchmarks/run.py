"""Side-by-side measurements against peers.

    python benchmarks/run.py [--only step,knn] [--peer dino=PATH] [--json FILE] [--picture FILE.png] [--quick]

The protocol is in `protocol.py`. The rows: `rows.py` (the step), `case.py` (other timings), `counts.py` (syncs, memory) and
`growth.py` (how cost grows; without a peer). What each should reach: `targets.py`.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("benchmarks") is None:
    sys.path.append(str(ROOT))

from benchmarks import compare, counts, growth, protocol, step  # noqa: E402
from benchmarks.case import CASES, Case  # noqa: E402
from benchmarks.protocol import Result  # noqa: E402
from benchmarks.rows import ROWS, Row  # noqa: E402
from benchmarks.sides import Machine, SideError, say  # noqa: E402
from benchmarks.targets import judge  # noqa: E402

Tick = Callable[[float], object]


@dataclass(frozen=True)
class Job:
    """One line of the table, and how it is measured."""

    name: str
    peer: str
    title: str
    minutes: float
    """Expected, on two cores with 16 pairs."""
    measure: Callable[[Machine, Tick], Result]
    dtype: str = "fp32"


def _timed(case: Case) -> Callable[[Machine, Tick], Result]:
    return lambda machine, tick: compare.measure(case, machine, tick)


def _step(row: Row, peer: str) -> Callable[[Machine, Tick], Result]:
    return lambda machine, tick: step.Bench(machine).measure(row, peer, tick)


def jobs() -> list[Job]:
    """Everything there is, in the order in which it is measured."""
    found = [Job(c.name, c.peer, c.title, c.minutes, _timed(c)) for c in CASES]
    found += [Job(c.name, c.peer, c.title, c.minutes, c.measure) for c in counts.COUNTS]
    found += [Job(g.name, growth.NO_PEER, g.title, g.minutes, g.measure) for g in growth.GROWTHS]
    minutes = {"step": 5.5, "step-bf16": 3.5, "small": 1.0}
    found += [Job(r.name, p, r.title, minutes.get(r.name, 1.0), _step(r, p), r.dtype) for r in ROWS for p in r.peers]
    return found


class Clock:
    """Progress with the time that is left, from what the rows were expected to take and did."""

    def __init__(self, planned: list[Job]) -> None:
        self.total = sum(job.minutes for job in planned)
        self.count, self.done, self.index = len(planned), 0.0, 0
        self.began = self.shown = time.monotonic()

    def start(self, job: Job) -> Tick:
        """Announce a row; the answer is to be told its share that is done."""
        self.index += 1
        against = "" if job.peer == growth.NO_PEER else f" against {job.peer}"
        say(f"[{self.index}/{self.count}] {job.name}{against}: {job.title}{self._left(0.0)}")

        def tick(share: float) -> None:
            if time.monotonic() - self.shown > 20:
                say(f"  {share:.0%}{self._left(share * job.minutes)}")

        return tick

    def finish(self, job: Job) -> None:
        """A row is done."""
        self.done += job.minutes

    def _left(self, more: float) -> str:
        self.shown = time.monotonic()
        done = self.done + more
        if not done:
            return f"; about {self.total:.0f} min in all"
        rate = (self.shown - self.began) / 60 / done
        return f"; about {(self.total - done) * rate:.0f} min left"


def missing(peer: str, peers: dict[str, str]) -> str | None:
    """Why a peer cannot be measured here, or None."""
    if peer == "dino":
        if "dino" not in peers:
            return "missing: give a clone, --peer dino=PATH"
        if not (Path(peers["dino"]) / "main_dino.py").is_file():
            return f"missing: no main_dino.py in {peers['dino']}"
    elif peer != growth.NO_PEER and importlib.util.find_spec(peer) is None:
        return f"missing: {peer} is not installed"
    return None


def measure(job: Job, machine: Machine, tick: Tick) -> Result:
    """One row, or why there is no figure."""
    why = missing(job.peer, machine.peers)
    if why is None and job.dtype == "bf16" and machine.peaks["bf16"] < 2 * machine.peaks["fp32"]:
        why = "not measured: this machine's bf16 GEMM peak is less than twice its fp32 peak"
    if why is not None:
        return Result(job.name, job.peer, claim=why, details={"title": job.title})
    try:
        return job.measure(machine, tick)
    except (SideError, OSError, RuntimeError) as error:
        say(f"  failed: {error}")
        return Result(job.name, job.peer, claim=f"failed: {str(error).splitlines()[0]}", details={"title": job.title})


def run(
    planned: list[Job], peers: dict[str, str], threads: int, pairs: int, pictures: Path | None = None
) -> list[Result]:
    """Every row that is asked for."""
    results = []
    with tempfile.TemporaryDirectory(prefix="selfsup-bench-") as folder:
        machine = Machine(peers, threads, pairs, Path(folder), pictures)
        for dtype in ("fp32", "bf16"):
            say(f"GEMM peak {dtype}: {machine.peak(dtype) / 1e9:.0f} GFLOP/s with {threads} threads")
        clock = Clock(planned)
        for job in planned:
            result = judge(measure(job, machine, clock.start(job)))
            clock.finish(job)
            if (
                result.ratio is not None
                and result.low is not None
                and result.high is not None
                and result.aa is not None
            ):
                say(f"  {result.ratio:.2f} [{result.low:.2f}, {result.high:.2f}], A/A {result.aa:.3f}: {result.claim}")
            else:
                say(f"  {result.claim}")
            results.append(result)
    return results


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; wrong names are refused with what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = jobs()
    names = list(dict.fromkeys(job.name for job in known))
    parser.add_argument("--only", help=f"rows, separated by commas: {', '.join(names)}")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="a clone of dino: dino=PATH")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--picture", type=Path, help="draw the results here; default: beside --json, else bench.png")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side (default: all)")
    parser.add_argument("--pairs", type=int, default=16, help=f"below {protocol.MIN_PAIRS} no timing is claimed")
    parser.add_argument("--quick", action="store_true", help="4 pairs: does it run at all; claims nothing")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: CPU seconds instead of time, for a machine that others use; meets targets of one-thread rows only",
    )  # fmt: skip
    given = parser.parse_args(argv)
    only = given.only.split(",") if given.only else names
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only {','.join(unknown)}: no such row; there are {', '.join(names)}")
    if wrong := [p for p in given.peer if not p.startswith("dino=")]:
        parser.error(f"--peer {wrong[0]}: only dino=PATH is taken")
    if given.pairs < 1 or given.threads < 1:
        parser.error("--pairs and --threads are at least 1")
    given.jobs = [job for job in known if job.name in only]
    given.peers = dict(p.split("=", 1) for p in given.peer)
    given.pairs = 4 if given.quick else given.pairs
    given.picture = given.picture or (given.json.with_suffix(".png") if given.json else Path("bench.png"))
    return given


def main(argv: list[str] | None = None) -> int:
    """0; 1 when a side failed or the sides did not do the same work."""
    given = arguments(argv)
    os.environ["SELFSUP_BENCH_CLOCK"] = given.clock  # for the worker processes
    began = time.monotonic()
    results = run(given.jobs, given.peers, given.threads, given.pairs, given.picture.parent)
    from benchmarks import present

    present.table(results)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes; pictures beside {given.picture}")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([result.json() for result in results], indent=1) + "\n")
    present.picture(results, given.picture)
    return int(any(result.claim.startswith(("failed", "not the same")) for result in results))


if __name__ == "__main__":
    sys.exit(main())
