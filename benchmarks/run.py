"""Side-by-side measurements against peers.

    python benchmarks/run.py [--only step,small] [--peer dino=PATH] [--json FILE] [--picture FILE.png] [--quick]

The protocol is in `protocol.py`, the rows in `rows.py`, the peers' sides in `peers.py`, ours in `ours.py`.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import protocol  # noqa: E402
from benchmarks.equality import Equality, compare, distance  # noqa: E402
from benchmarks.protocol import Result  # noqa: E402
from benchmarks.rows import ROWS, Row, write_initial_state  # noqa: E402


class SideError(RuntimeError):
    """A side could not do what it was asked for."""


class Side:
    """A worker process and the pipe to it."""

    def __init__(self, threads: int, log: Path) -> None:
        self.log = log
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker"],
                cwd=ROOT,
                env=protocol.thread_environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One command, one answer; raises SideError with what the worker said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SideError(f"{do}: the process ended ({self.process.wait()}): {self.log.read_text()[-1500:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise SideError(f"{do}: {answer['error']}\n{answer['traceback']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


class Bench:
    """Measures rows; holds what all of them share."""

    def __init__(self, peers: dict[str, str], threads: int, pairs: int, folder: Path) -> None:
        self.peers, self.threads, self.pairs, self.folder = peers, threads, pairs, folder
        self.peaks: dict[str, float] = {}

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

    def peak(self, dtype: str) -> float:
        """GEMM peak of this machine in this run, in a process of its own; the best seen."""
        side = Side(self.threads, self.folder / "gemm.log")
        try:
            seen = side.ask("gemm", dtype=dtype)["flops_per_second"]
        finally:
            side.close()
        self.peaks[dtype] = max(self.peaks.get(dtype, 0.0), seen)
        return self.peaks[dtype]

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

    def measure(self, row: Row, peer: str) -> Result:
        """One row against one peer, by the protocol."""
        result = Result(row.name, peer, details={"title": row.title, "threads": self.threads})
        write_initial_state(row, self.folder / f"{row.name}.safetensors")
        say(f"{row.name} against {peer}: loss and gradients ...")
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
            timed: dict[str, list[float]] = {who: [] for who in sides}

            def timer(who: str) -> protocol.Timer:
                def run() -> float:
                    timed[who].append(sides[who].ask("time", count=count)["seconds"] / count)
                    return timed[who][-1]

                return run

            protocol.summarise(result, *protocol.measure({who: timer(who) for who in sides}, self.pairs))
            memory = {who: side.ask("memory")["peak_bytes"] for who, side in sides.items()}
        peak = self.peak(row.dtype)
        seconds = {who: sorted(values)[len(values) // 2] for who, values in timed.items()}
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
        say(f"  {result.ratio:.2f} [{result.low:.2f}, {result.high:.2f}], A/A {result.aa:.3f}: {result.claim}")
        return result


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def missing(row: Row, peer: str, peers: dict[str, str]) -> str | None:
    """Why a peer cannot be measured here, or None."""
    if peer == "dino":
        if "dino" not in peers:
            return "missing: give a clone, --peer dino=PATH"
        if not (Path(peers["dino"]) / "main_dino.py").is_file():
            return f"missing: no main_dino.py in {peers['dino']}"
    else:
        import importlib.util

        if importlib.util.find_spec(peer) is None:
            return f"missing: {peer} is not installed"
    return None


def run(rows: list[Row], peers: dict[str, str], threads: int, pairs: int) -> list[Result]:
    """Every row against every peer it names."""
    results = []
    with tempfile.TemporaryDirectory(prefix="selfsup-bench-") as folder:
        bench = Bench(peers, threads, pairs, Path(folder))
        for dtype in ("fp32", "bf16"):
            say(f"GEMM peak {dtype}: {bench.peak(dtype) / 1e9:.0f} GFLOP/s with {threads} threads")
        for row in rows:
            for peer in row.peers:
                why = missing(row, peer, peers)
                if why is None and row.dtype == "bf16" and bench.peaks["bf16"] < 2 * bench.peaks["fp32"]:
                    why = "not measured: this machine's bf16 GEMM peak is less than twice its fp32 peak"
                if why is not None:
                    say(f"{row.name} against {peer}: {why}")
                    results.append(Result(row.name, peer, claim=why, details={"title": row.title}))
                    continue
                try:
                    results.append(bench.measure(row, peer))
                except SideError as error:
                    say(f"  failed: {error}")
                    first = str(error).splitlines()[0]
                    results.append(Result(row.name, peer, claim=f"failed: {first}", details={"title": row.title}))
    return results


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; wrong names are refused with what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--only", help=f"rows, separated by commas: {', '.join(names)}")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="a clone of dino: dino=PATH")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--picture", type=Path, help="draw the results here; default: beside --json")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side (default: all)")
    parser.add_argument("--pairs", type=int, default=16, help=f"below {protocol.MIN_PAIRS} nothing is claimed")
    parser.add_argument("--quick", action="store_true", help="4 pairs: does it run at all; claims nothing")
    given = parser.parse_args(argv)
    only = given.only.split(",") if given.only else names
    if unknown := [name for name in only if name not in names]:
        parser.error(f"--only {','.join(unknown)}: no such row; there are {', '.join(names)}")
    if wrong := [p for p in given.peer if not p.startswith("dino=")]:
        parser.error(f"--peer {wrong[0]}: only dino=PATH is taken")
    if given.pairs < 1 or given.threads < 1:
        parser.error("--pairs and --threads are at least 1")
    given.rows = [row for row in ROWS if row.name in only]
    given.peers = dict(p.split("=", 1) for p in given.peer)
    given.pairs = 4 if given.quick else given.pairs
    given.picture = given.picture or (given.json.with_suffix(".png") if given.json else None)
    return given


def main(argv: list[str] | None = None) -> int:
    """0; 1 when a side failed or did not compute the same step."""
    given = arguments(argv)
    results = run(given.rows, given.peers, given.threads, given.pairs)
    from benchmarks import present

    present.table(results)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([result.json() for result in results], indent=1) + "\n")
    if given.picture:
        present.picture(results, given.picture)
    return int(any(result.claim.startswith(("failed", "not the same")) for result in results))


if __name__ == "__main__":
    sys.exit(main())
