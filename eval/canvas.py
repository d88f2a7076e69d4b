"""Figures without a display and without global state, in one look."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED = "#222222", "#8a8f98"
BLUE, ORANGE, GREEN, PURPLE = "#2f6db5", "#d9822b", "#3b8f5a", "#7b5ea7"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches at 150 dots an inch."""
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Written at once, and without the time and version that matplotlib would put in: equal pictures are equal files."""
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, metadata={"Software": None})
    temporary.replace(path)
    return path


def bare(axes: Axes, title: str = "") -> None:
    """No ticks, no frame: for images."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if title:
        axes.set_title(title, fontsize=9, color=INK, pad=4)
