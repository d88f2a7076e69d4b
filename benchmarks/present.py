"""Results as one table and one picture."""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.protocol import Result

_COLOURS = {True: "tab:green", False: "tab:red", None: "tab:gray"}


def _reached(result: Result) -> str:
    return {True: "yes", False: "no", None: "-"}[result.met]


def _gibibytes(result: Result) -> str:
    peer = result.details.get("peer_peak_bytes")
    if result.peak_bytes is None or peer is None:
        return "-"
    return f"{result.peak_bytes / 2**30:.2f} / {peer / 2**30:.2f}"


def _fraction(result: Result) -> str:
    if result.gemm_fraction is None:
        return "-"
    peer = result.details.get("peer_gemm_fraction")
    return f"{result.gemm_fraction:.0%}" + (f" / {peer:.0%}" if peer is not None else "")


def _share(result: Result) -> str:
    """What stands beside a claim."""
    wait = result.details.get("data_wait")
    return "" if wait is None else f"; data-wait {wait:.1%}"


def table(results: Sequence[Result]) -> None:
    """Print the table, then everything that has to be disclosed."""
    from rich.console import Console
    from rich.table import Table

    out = Table(
        title="The peer's cost over ours or, where the target is <=, ours over the peer's; claims are the nearer bound"
    )
    names = (
        "row",
        "peer",
        "ratio [95 %]",
        "A/A",
        "target",
        "met",
        "of GEMM peak: ours / peer",
        "GiB: ours / peer",
        "claim",
    )
    for name in names:
        out.add_column(name)
    for r in results:
        measured = r.ratio is not None and r.low is not None and r.high is not None and r.aa is not None
        ratio = f"{r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]" if measured else "-"
        control = f"{r.aa:.3f}" if measured else "-"
        out.add_row(
            r.name,
            r.peer,
            ratio,
            control,
            r.target or "-",
            _reached(r),
            _fraction(r),
            _gibibytes(r),
            r.claim + _share(r),
        )
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(out)
    for line in dict.fromkeys(line for r in results for line in r.details.get("disclosures", ())):
        console.print(f"* {line}", highlight=False)
    for line in dict.fromkeys(f"{r.name}: {line}" for r in results for line in r.details.get("notes", ())):
        console.print(f"* {line}", highlight=False)
    for title in dict.fromkeys(f"{r.name}: {r.details['title']}" for r in results if "title" in r.details):
        console.print(f"* {title}", highlight=False)


def picture(results: Sequence[Result], path: Path) -> None:
    """Ratios with their intervals and targets; grey where nothing is claimed. Nothing measured, nothing drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from benchmarks.targets import TARGETS

    drawn = [r for r in results if r.ratio is not None and r.low is not None and r.high is not None]
    if not drawn:
        return
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.5 * len(drawn)), layout="constrained")
    smallest = 0.02  # a ratio of 0 on a logarithmic axis
    for y, r in enumerate(reversed(drawn)):
        assert r.ratio is not None and r.low is not None and r.high is not None
        ratio, low, high = (max(v, smallest) for v in (r.ratio, r.low, r.high))
        axes.errorbar(ratio, y, xerr=[[ratio - low], [high - ratio]], fmt="o", color=_COLOURS[r.met], capsize=4)
        axes.text(high, y + 0.12, f"  {r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]", va="bottom", fontsize=8)
        target = TARGETS.get((r.name, r.peer))
        if target is not None:
            at = max(target.bound, smallest)
            axes.plot([at, at], [y - 0.3, y + 0.3], color="black", linewidth=1.5)
            axes.annotate(
                "", xy=(at * (1.18 if target.at_least else 1 / 1.18), y - 0.3), xytext=(at, y - 0.3),
                arrowprops={"arrowstyle": "->", "color": "black"},
            )  # fmt: skip
    axes.set_yticks(range(len(drawn)), [f"{r.name} vs {r.peer}" for r in reversed(drawn)])
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.2, high * 2.5)
    axes.axvline(1, color="black", linestyle="--", linewidth=0.8)
    axes.set_xlabel(
        "ratio with its 95 % interval; black: the target, the arrow points to what meets it\n"
        "green: met, red: not met, grey: nothing claimed"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
