"""How cost grows, without a peer: sizes on a logarithmic grid, each in a fresh process; a picture and an exponent each.

An exponent is the slope of a least-squares line through log(cost) over log(size): 0 is constant, 1 proportional.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.protocol import Result
from benchmarks.sides import Machine, Side

NO_PEER = "-"


@dataclass(frozen=True)
class Growth:
    """One curve: `measure_growth.KINDS[kind]` at every size."""

    name: str
    kind: str
    title: str
    unit: str
    sizes: tuple[int, ...]
    minutes: float = 0.5

    def measure(self, machine: Machine, tick: Callable[[float], object]) -> Result:
        """The costs at every size, their exponents, and a picture."""
        result = Result(
            self.name, NO_PEER, details={"title": self.title, "sizes": self.sizes, "threads": machine.threads}
        )
        folder = machine.folder / self.name
        folder.mkdir()
        costs: dict[str, list[float]] = {}
        for n, size in enumerate(self.sizes):
            side = Side(machine.threads, machine.folder / f"{self.name}.log")
            try:
                found = side.ask("grow", kind=self.kind, size=size, folder=str(folder))
            finally:
                side.close()
            for name, value in found["costs"].items():
                costs.setdefault(name, []).append(value)
            result.details.setdefault("notes", []).extend(found.get("notes", ()))
            tick((n + 1) / len(self.sizes))
        exponents = {name: exponent(self.sizes, values) for name, values in costs.items()}
        result.details |= {"costs": costs, "exponents": exponents}
        result.claim = "; ".join(
            f"{name} {costs[name][0]:.3g} to {costs[name][-1]:.3g}"
            + (f", exponent {slope:.2f}" if slope is not None else "")
            for name, slope in exponents.items()
        )
        if machine.pictures is not None:
            draw(self, costs, exponents, machine.pictures / f"{self.name}.png")
        return result


def exponent(sizes: Sequence[int], costs: Sequence[float]) -> float | None:
    """Slope of log(cost) over log(size); None with fewer than three positive costs."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, costs) if x > 0 and y > 0]
    if len(points) < 3:
        return None
    return statistics.linear_regression(*zip(*points)).slope


def draw(growth: Growth, costs: dict[str, list[float]], exponents: dict[str, float | None], path: Path) -> None:
    """A panel a cost, both axes logarithmic where there is something to see."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(costs), figsize=(4.2 * len(costs), 3.4), layout="constrained", squeeze=False)
    for axes, (name, values) in zip(panels[0], costs.items()):
        axes.plot(growth.sizes, values, "o-", color="tab:blue")
        axes.set_xscale("log")
        if min(values) > 0:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, min(values) / 2), max(high, max(values) * 2))  # a constant should look like one
        slope = exponents[name]
        axes.set_title(name if slope is None else f"{name}: exponent {slope:.2f}")
        axes.set_xlabel(growth.unit)
    figure.suptitle(growth.title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


GROWTHS = [
    Growth("growth-images", "images", "entries of the index", "images", (10**3, 10**4, 10**5, 10**6), 0.8),
    Growth(
        "growth-crops", "crops", "local crops of a step, tiny ViT, 32 and 16 px", "local crops", (2, 4, 8, 16, 32), 0.8
    ),
    Growth(
        "growth-prototypes",
        "prototypes",
        "prototypes of a step, tiny ViT",
        "K",
        (8192, 16384, 32768, 65536, 131072, 262144),
        1.2,
    ),
    Growth("growth-ranks", "ranks", "communication of a step", "ranks", (1, 2), 0.5),
    Growth(
        "growth-knn",
        "knn",
        "bank of a k-NN evaluation, 500 queries x 384, k = 200",
        "bank images",
        (10**4, 10**5, 10**6),
        1.0,
    ),
]
