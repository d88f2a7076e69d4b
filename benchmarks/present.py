"""Results as one table and one picture."""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.protocol import Result


def table(results: Sequence[Result]) -> None:
    """Print the table, then everything that has to be disclosed."""
    from rich.console import Console
    from rich.table import Table

    out = Table(title="The peer's time over ours: above 1, ours is faster; the claim is the interval's lower bound")
    for name in ("row", "peer", "ratio [95 %]", "A/A", "of GEMM peak: ours / peer", "memory GiB: ours / peer", "claim"):
        out.add_column(name)
    for r in results:
        if r.ratio is None or r.low is None or r.high is None or r.aa is None or r.gemm_fraction is None:
            out.add_row(r.name, r.peer, "-", "-", "-", "-", r.claim)
            continue
        d = r.details
        out.add_row(
            r.name,
            r.peer,
            f"{r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]",
            f"{r.aa:.3f}",
            f"{r.gemm_fraction:.0%} / {d['peer_gemm_fraction']:.0%}",
            f"{(r.peak_bytes or 0) / 2**30:.2f} / {d['peer_peak_bytes'] / 2**30:.2f}",
            r.claim,
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(out)
    for line in dict.fromkeys(line for r in results for line in r.details.get("disclosures", ())):
        console.print(f"* {line}", highlight=False)
    for title in dict.fromkeys(f"{r.name}: {r.details['title']}" for r in results if "title" in r.details):
        console.print(f"* {title}", highlight=False)


def picture(results: Sequence[Result], path: Path) -> None:
    """Ratios with their intervals; grey where nothing is claimed. Writes `path`; nothing measured, nothing drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [r for r in results if r.ratio is not None and r.low is not None and r.high is not None]
    if not drawn:
        return
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.6 * len(drawn)), layout="constrained")
    for y, r in enumerate(reversed(drawn)):
        assert r.ratio is not None and r.low is not None and r.high is not None
        colour = "tab:blue" if r.claim.startswith(("at least", "slower")) else "tab:gray"
        axes.barh(y, r.ratio, color=colour, height=0.5)
        axes.errorbar(r.ratio, y, xerr=[[r.ratio - r.low], [r.high - r.ratio]], color="black", capsize=4)
        axes.text(r.high, y, f"  {r.ratio:.2f} [{r.low:.2f}, {r.high:.2f}]", va="center")
    axes.set_yticks(range(len(drawn)), [f"{r.name}\nvs {r.peer}" for r in reversed(drawn)])
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, max(r.high or 0 for r in drawn) * 1.35)
    axes.set_xlabel("the peer's time over ours (above 1: ours is faster); grey: nothing claimed")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
