"""Rows that are counted, not timed: host syncs in a step, and the step's peak memory."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import protocol, step
from benchmarks.protocol import Result
from benchmarks.rows import STEP, Row, write_initial_state
from benchmarks.sides import Machine

SYNCS = (
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "_unique2",
    "unique_dim",
    "equal",
    "is_nonzero",
)
"""Operators of aten after which the host waits for the device: `item`, `bool`, `float`, and shapes that depend on values."""

SYNC_ROW = replace(STEP, name="syncs", batch=1, out_dim=1024, locals=2)
"""The number depends on the layers, not on sizes."""

PROCESSES = 3
"""Of each side, for memory."""


def count_syncs(run: Callable[[], object]) -> dict[str, int]:
    """Calls of each of `SYNCS` during `run()`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found: dict[str, int] = {}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else str(func)
            if name in SYNCS:
                found[name] = found.get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    with Counter():
        run()
    return found


def syncs(machine: Machine, tick: Callable[[float], object]) -> Result:
    """Of a step that is not logged: what four steps have more than three."""
    result = Result(
        "syncs", "dino", details={"title": "host syncs in a step that is not logged", "threads": machine.threads}
    )
    bench = step.Bench(machine)
    write_initial_state(SYNC_ROW, machine.folder / f"{SYNC_ROW.name}.safetensors")
    counted: dict[str, list[int]] = {}
    for n, name in enumerate(("ours", "dino", "ours")):
        with bench.side(name, SYNC_ROW, like="dino") as (side, said):
            three, four = (side.ask("syncs", count=k)["syncs"] for k in (3, 4))
        counted.setdefault(name, []).append(sum(four.values()) - sum(three.values()))
        result.details.setdefault("disclosures", []).extend(said)
        tick((n + 1) / 3)
    (first, again), (peer,) = counted["ours"], counted["dino"]
    result.details |= {"syncs": {"ours": first, "dino": peer}, "operators": SYNCS}
    if not peer:
        result.claim = "not the same work: no sync was seen in dino's step, which has hundreds"
        return result
    result.ratio = result.low = result.high = first / peer
    result.aa = 1.0 if first == again else 0.0
    result.at_most, result.claims = True, first == again
    result.claim = f"{first} syncs a step, {peer} in dino's" if result.claims else "two counts of ours differ"
    return result


def memory(machine: Machine, tick: Callable[[float], object], row: Row = STEP, peer: str = "dino") -> Result:
    """Highest resident memory of a few steps above what the process held after its imports, in fresh processes."""
    title = f"peak memory of the step above the imports; {row.title}"
    result = Result("memory", peer, details={"title": title, "threads": machine.threads})
    bench = step.Bench(machine)
    write_initial_state(row, machine.folder / f"{row.name}.safetensors")
    seen: dict[str, list[int]] = {who: [] for who in "ABC"}
    names = {"A": "ours", "B": peer, "C": "ours"}
    for n, who in enumerate(protocol.interleave(PROCESSES)):
        with contextlib.ExitStack() as stack:
            side, said = stack.enter_context(bench.side(names[who], row, like=peer))
            side.ask("time", count=3)
            seen[who].append(side.ask("memory")["peak_bytes"])
        result.details.setdefault("disclosures", []).extend(said)
        tick((n + 1) / (3 * PROCESSES))
    versus, control = ([b / a for a, b in zip(seen["A"], seen[who])] for who in "BC")
    protocol.summarise(result, versus, control, at_most=True, least=PROCESSES)
    result.peak_bytes = sorted(seen["A"])[PROCESSES // 2]
    result.details["peer_peak_bytes"] = sorted(seen["B"])[PROCESSES // 2]
    return result


@dataclass(frozen=True)
class Count:
    """A counted row."""

    name: str
    peer: str
    title: str
    minutes: float
    measure: Callable[[Machine, Callable[[float], object]], Result]


COUNTS = [
    Count("syncs", "dino", "host syncs in a step that is not logged", 0.4, syncs),
    Count("memory", "dino", "peak memory of the step above what the process holds after its imports", 1.8, memory),
]
