"""Measuring the rows of the step: loss and gradients are compared, then the sides are timed in turn."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks.compare import interleaved
from benchmarks.equality import Equality, compare, distance
from benchmarks.protocol import Result
from benchmarks.rows import Row, write_initial_state
from benchmarks.sides import Machine, Side, say


class Bench:
    """Measures rows of the step."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.peers, self.threads, self.pairs = machine.peers, machine.threads, machine.pairs
        self.folder = machine.folder

    @contextlib.contextmanager
    def side(self, name: str, row: Row, like: str) -> Iterator[tuple[Side, list[str]]]:
        """A fresh process with `name` built in it, and what is to be disclosed about it."""
        side = Side(self.threads, self.folder / f"{row.name}-{like}.log")
        try:
            loaded = side.ask(
                "load",
                side=name,
                row=row.to_dict(),
                state=str(self.folder / f"{row.name}.safetensors"),
                path=self.peers.get(name),
                like=like,
            )
            yield side, loaded["disclosures"]
        finally:
            side.close()

    def first_step(self, name: str, row: Row, peer: str) -> tuple[float, dict[str, Any], int]:
        """Loss and gradients of one side's first step, and what torch counts as its work. Nothing is timed here."""
        from safetensors.torch import load_file

        out = self.folder / f"{row.name}-{name}-gradients.safetensors"
        with self.side(name, row, like=peer) as (side, _):
            loss = side.ask("gradients", out=str(out))["loss"]
            flops = side.ask("flops")["flops"]
        gradients = load_file(out)
        out.unlink()
        return loss, gradients, flops

    def equality(self, row: Row, peer: str) -> tuple[Equality, dict[str, int]]:
        """Whether both sides do the same step, and each one's count of its floating-point operations."""
        loss, gradients, flops = self.first_step("ours", row, peer)
        peer_loss, peer_gradients, peer_flops = self.first_step(peer, row, peer)
        equality = compare(loss, gradients, peer_loss, peer_gradients)
        if row.dtype != "fp32":
            _, exact, _ = self.first_step("ours", replace(row, dtype="fp32"), peer)
            equality = replace(
                equality, distance=distance(gradients, exact), peer_distance=distance(peer_gradients, exact)
            )
        return equality, {"ours": flops, peer: peer_flops}

    def measure(self, row: Row, peer: str, tick: Callable[[float], object] = lambda share: None) -> Result:
        """One row against one peer, by the protocol."""
        result = Result(row.name, peer, details={"title": row.title, "threads": self.threads})
        write_initial_state(row, self.folder / f"{row.name}.safetensors")
        equality, flops = self.equality(row, peer)
        result.details["equality"] = vars(equality)
        say(f"  {equality}")
        if not equality.within(row.dtype):
            result.claim = f"not the same step, nothing timed: {equality}"
            return result

        with contextlib.ExitStack() as stack:
            names = {"A": "ours", "B": peer, "C": "ours"}
            opened = {who: stack.enter_context(self.side(name, row, like=peer)) for who, name in names.items()}
            sides = {who: side for who, (side, _) in opened.items()}
            result.details["disclosures"] = [*opened["A"][1], *opened["B"][1]]
            cold = {who: side.ask("time", count=1)["seconds"] for who, side in sides.items()}
            warm = {who: min(side.ask("time", count=1)["seconds"] for _ in range(3)) for who, side in sides.items()}
            count = max(1, round(0.5 / warm["A"]))  # at least half a second between two looks at the clock
            say(
                f"  a step: ours {warm['A']:.2f} s, {peer} {warm['B']:.2f} s; {self.pairs} pairs of {count} step(s) ..."
            )

            def run(who: str) -> float:
                return float(sides[who].ask("time", count=count)["seconds"]) / count

            seconds = interleaved(
                result,
                {"A": lambda: run("A"), "B": lambda: run("B"), "C": lambda: run("C")},
                self.pairs,
                lambda done: tick(done / self.pairs),
            )
            memory = {who: side.ask("memory")["peak_bytes"] for who, side in sides.items()}
        peak = self.machine.peak(row.dtype)
        result.gemm_fraction = flops["ours"] / seconds["A"] / peak
        result.peak_bytes = memory["A"]
        result.details |= {
            "seconds": {"ours": seconds["A"], peer: seconds["B"]},
            "first_step_seconds": {"ours": cold["A"], peer: cold["B"]},
            "flops": flops,
            "gemm_peak": peak,
            "peer_gemm_fraction": flops[peer] / seconds["B"] / peak,
            "peer_peak_bytes": memory["B"],
        }
        return result
