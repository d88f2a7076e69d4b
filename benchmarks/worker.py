"""One side of a comparison in a process of its own: commands on stdin, one JSON line of answer each on stdout."""

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import protocol


def gemm_peak(dtype: str, seconds: float = 0.7) -> float:
    """Floating-point operations a second of the best square matrix product, at `fp32` or `bf16`."""
    import torch

    best = 0.0
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    for size in (1024, 2048, 3072):
        a, b = torch.randn(size, size).to(kind), torch.randn(size, size).to(kind)
        out = torch.empty(size, size, dtype=kind)
        torch.mm(a, b, out=out)
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            torch.mm(a, b, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def clock() -> float:
    """Seconds on the wall; with SELFSUP_BENCH_CLOCK=cpu the CPU seconds of this process, its threads and its ended children."""
    if os.environ.get("SELFSUP_BENCH_CLOCK") != "cpu":
        return time.perf_counter()
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class Worker:
    """Holds one side; every public method is a command."""

    side: Any
    baseline: int

    def load(self, side: str, row: dict[str, Any], state: str, path: str | None, like: str) -> dict[str, Any]:
        """Build a side. like: the peer whose settings (clipping, position embeddings) our side takes over."""
        from safetensors.torch import load_file

        from benchmarks.peers import PEERS
        from benchmarks.rows import Row

        if side == "ours":
            from benchmarks.ours import Ours

            Ours.prepare()
        else:
            PEERS[side].prepare(path)
        self.baseline = protocol.memory_bytes("VmRSS")
        shape, tensors = Row.from_dict(row), load_file(state)
        self.side = Ours(shape, tensors, PEERS[like]) if side == "ours" else PEERS[side](shape, tensors)
        return {"disclosures": list(self.side.disclosures)}

    def begin(self, module: str, side: str, options: dict[str, Any], folder: str, path: str | None) -> dict[str, Any]:
        """Build a side of a row that is not the step (see `case.py`)."""
        import importlib

        kind = importlib.import_module(f"benchmarks.{module}").SIDES[side]
        kind.imports(path)
        self.baseline = protocol.memory_bytes("VmRSS")
        self.side = kind(options, Path(folder))
        return {"disclosures": list(kind.disclosures), "shortest": kind.shortest}

    def answer(self, out: str, given: str | None) -> dict[str, Any]:
        """What the sides must agree on goes to the file `out`."""
        from safetensors.torch import load_file, save_file

        found = self.side.answer(load_file(given) if given else {})
        save_file({k: v.contiguous().clone() for k, v in found.items()}, out)
        return {"flops": self._flops()}

    def _flops(self) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        if (known := self.side.flops()) is not None:
            return int(known)
        with FlopCounterMode(display=False) as counter:
            self.side.run(1)
        return int(counter.get_total_flops())

    def run(self, count: int) -> dict[str, Any]:
        """Seconds of `count` runs of a row that is not the step."""
        start = clock()
        self.side.run(count)
        return {"seconds": (clock() - start) * self.side.scale()}

    def facts(self) -> dict[str, Any]:
        """What else belongs beside the ratio."""
        return dict(self.side.facts())

    def gradients(self, out: str) -> dict[str, Any]:
        """Loss of the first step; its gradients go to the file `out`."""
        from safetensors.torch import save_file

        loss, gradients = self.side.gradients()
        save_file({k: v.detach().float().contiguous() for k, v in gradients.items()}, out)
        return {"loss": loss}

    def flops(self) -> dict[str, Any]:
        """Floating-point operations of a step, as torch counts them."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.side.step(1)
        return {"flops": counter.get_total_flops()}

    def time(self, count: int) -> dict[str, Any]:
        """Seconds of `count` steps."""
        start = clock()
        self.side.step(count)
        return {"seconds": clock() - start}

    def syncs(self, count: int) -> dict[str, Any]:
        """Operators that make the host wait, in `count` steps."""
        from benchmarks.counts import count_syncs

        return {"syncs": count_syncs(lambda: self.side.step(count))}

    def grow(self, kind: str, size: int, folder: str) -> dict[str, Any]:
        """Costs at one size (see `growth.py`)."""
        from benchmarks.measure_growth import KINDS

        return KINDS[kind](size, Path(folder))

    def gemm(self, dtype: str) -> dict[str, Any]:
        """This process's best matrix product."""
        return {"flops_per_second": gemm_peak(dtype)}

    def memory(self) -> dict[str, Any]:
        """Highest resident memory so far, above what the process held after its imports."""
        if getattr(self.side, "elsewhere", False):
            return {"peak_bytes": None}
        return {"peak_bytes": protocol.memory_bytes("VmHWM") - self.baseline}


def main() -> None:
    """Answer until stdin ends. What libraries print goes to stderr, never into an answer."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
