"""Measuring one timed row: the sides agree, then they are timed in turn."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.case import Case
from benchmarks.protocol import Result
from benchmarks.sides import Machine, Side, say
from benchmarks.targets import TARGETS


def interleaved(
    result: Result,
    run: dict[str, Callable[[], float]],
    pairs: int,
    tick: Callable[[int], object],
    at_most: bool = False,
) -> dict[str, float]:
    """Time 'A', 'B' and 'C' in turn into `result`; the median seconds of each."""
    timed: dict[str, list[float]] = {who: [] for who in run}

    def timer(who: str) -> protocol.Timer:
        def once() -> float:
            timed[who].append(run[who]())
            return timed[who][-1]

        return once

    protocol.summarise(result, *protocol.measure({who: timer(who) for who in run}, pairs, tick), at_most=at_most)
    if os.environ.get("SELFSUP_BENCH_CLOCK") == "cpu":
        result.details["clock"] = "cpu"
        result.claim += " (CPU seconds)"
    return {who: sorted(values)[len(values) // 2] for who, values in timed.items()}


def begin(
    case: Case, name: str, machine: Machine, folder: Path, stack: contextlib.ExitStack
) -> tuple[Side, dict[str, Any]]:
    """A process with one side of a case in it, and what it says about itself."""
    side = Side(case.threads or machine.threads, machine.folder / f"{case.name}-{name}.log")
    stack.callback(side.close)
    told = side.ask(
        "begin", module=case.module, side=name, options=case.options, folder=str(folder), path=machine.peers.get(name)
    )
    return side, told


def answers(case: Case, machine: Machine, folder: Path) -> tuple[str, int]:
    """How the sides' answers differ ('' if they agree), and the floating-point operations of our run."""
    from safetensors.torch import load_file

    files = {name: folder / f"answer-{name}.safetensors" for name in ("peer", "ours")}
    flops = 0
    for who, given in (("peer", None), ("ours", str(files["peer"]))):
        with contextlib.ExitStack() as stack:
            side, _ = begin(case, case.peer if who == "peer" else "ours", machine, folder, stack)
            flops = side.ask("answer", out=str(files[who]), given=given)["flops"]
    return case.load().differ(case.options, load_file(files["ours"]), load_file(files["peer"])), flops


def measure(case: Case, machine: Machine, tick: Callable[[float], object] = lambda share: None) -> Result:
    """One row by the protocol. tick: told the share that is done."""
    threads = case.threads or machine.threads
    result = Result(case.name, case.peer, details={"title": case.title, "threads": threads, **case.options})
    folder = machine.folder / f"{case.name}-{case.peer}"
    folder.mkdir()
    case.load().inputs(case.options, folder)
    unlike, flops = answers(case, machine, folder)
    if unlike:
        result.claim = f"not the same work, nothing timed: {unlike}"
        return result
    with contextlib.ExitStack() as stack:
        begun = {
            who: begin(case, name, machine, folder, stack) for who, name in zip("ABC", ("ours", case.peer, "ours"))
        }
        sides = {who: side for who, (side, _) in begun.items()}
        result.details["disclosures"] = [*begun["A"][1]["disclosures"], *begun["B"][1]["disclosures"]]
        for side in sides.values():
            side.ask("run", count=1)  # warm
        one = {who: side.ask("run", count=1)["seconds"] for who, side in sides.items()}
        count = max(1, round(begun["A"][1]["shortest"] / max(one["A"], 1e-4)))
        say(f"  a run: ours {one['A']:.2f} s, {case.peer} {one['B']:.2f} s; {machine.pairs} pairs of {count} run(s)")

        def run(who: str) -> float:
            return float(sides[who].ask("run", count=count)["seconds"]) / count

        target = TARGETS.get((case.name, case.peer))
        seconds = interleaved(
            result,
            {"A": lambda: run("A"), "B": lambda: run("B"), "C": lambda: run("C")},
            machine.pairs,
            lambda done: tick(done / machine.pairs),
            at_most=target is not None and not target.at_least,
        )
        result.peak_bytes = sides["A"].ask("memory")["peak_bytes"]
        result.details["peer_peak_bytes"] = sides["B"].ask("memory")["peak_bytes"]
        result.details |= sides["A"].ask("facts")
    result.details["seconds"] = {"ours": seconds["A"], case.peer: seconds["B"]}
    if flops:
        result.details |= {
            "flops": {"ours": flops},
            "gemm_peak": machine.peaks.get(case.dtype) or machine.peak(case.dtype),
        }
        result.gemm_fraction = flops / seconds["A"] / result.details["gemm_peak"]
    return result
