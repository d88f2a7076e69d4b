"""Result files that carry their whole protocol, and their table."""

import errno
import functools
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsup.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .targets import Target

_PACKAGES = ("selfsup", "torch", "torchvision", "timm", "faiss-cpu", "faiss-gpu", "numpy", "pillow")
_SUFFIX = {"student": "_student", "random": "_random", "checkpoint": "_checkpoint", "exported": "_exported"}


def result(
    task: str,
    target: "Target",
    metrics: Mapping[str, float],
    protocol: Mapping[str, Any],
    settings: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """{"task", "target", "metrics", "protocol"[, "settings"]}; metrics are fractions of 1."""
    out: dict[str, Any] = {"task": task, "target": target.facts(), "metrics": dict(metrics), "protocol": dict(protocol)}
    if settings is not None:
        out["settings"] = settings
    return out


@functools.cache
def versions() -> dict[str, str]:
    """Installed versions of what a figure depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def interval(accuracy: float, count: int) -> list[float]:
    """Wilson's 95 % interval of an accuracy measured on `count` images."""
    z = 1.959964
    centre = (accuracy + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(accuracy * (1 - accuracy) / count + z * z / (4 * count * count))
    return [round(max(0.0, centre - half), 4), round(min(1.0, centre + half), 4)]


def check_destination(out: Path | None, option: str = "--out") -> None:
    """Refuse a file that cannot be written, before any work is done; `option` is what names it."""
    if out is None:
        return
    if out.is_dir():
        example = out / ("result.json" if option == "--out" else "picture.png")
        raise UserError(f"{option} {out}: is a folder; name a file such as {example}")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{option} {out}: {parent} cannot be written to; name a file in a folder of yours")


def file_name(task: str, kind: str) -> str:
    """'knn.json', 'knn_student.json', 'knn_random.json'."""
    return f"{task}{_SUFFIX.get(kind, '')}.json"


def path_in_run(task: str, target: "Target") -> Path | None:
    """RUN/eval/TASK*.json; None for a target outside any run."""
    return target.run / "eval" / file_name(task, target.kind) if target.run is not None else None


def save(result: Mapping[str, Any], target: "Target", out: Path | None) -> Path | None:
    """Write to `out`, else into the run the target belongs to; returns the file."""
    path = out or path_in_run(result["task"], target)
    if path is not None:
        write(result, path)
    return path


def save_with_sheet(
    result: dict[str, Any], target: "Target", out: Path | None, draw: Callable[[Path], Path] | None
) -> None:
    """As `save`, with the picture beside the file that `draw` makes; None: there is nothing to draw."""
    path = out or path_in_run(result["task"], target)
    if path is not None and draw is not None:
        picture = path.with_suffix(".png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        result["pictures"] = [str(draw(picture))]
    json.dumps(result, allow_nan=False)
    save(result, target, out)


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write JSON so that a reader sees the old file or the whole new one. Raises UserError if it cannot."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w") as file:
            json.dump(result, file, indent=2, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written: {error.strerror}; name another file with --out") from None


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises UserError if it is not one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a result file: {error}") from None
    if not isinstance(found, dict) or not {"task", "target", "metrics", "protocol"} <= found.keys():
        raise UserError(f"{path}: not a result file; task, target, metrics and protocol are needed")
    return found


def table(results: Iterable[Mapping[str, Any]], title: str | None = None) -> "Table":
    """One row a target, one column a task and metric, as percentages with their 95 % interval."""
    from rich.markup import escape
    from rich.table import Table

    results = list(results)
    columns: list[tuple[str, str]] = []
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for item in results:
        protocol = item["protocol"]
        for name, value in item["metrics"].items():
            column = (item["task"], name)
            if column not in columns:
                columns.append(column)
            text = f"{100 * value:.1f}"
            if f"{name}_interval_95" in protocol:
                low, high = protocol[f"{name}_interval_95"]
                text += f" [dim]({100 * low:.1f}–{100 * high:.1f})[/dim]"
            rows.setdefault(escape(item["target"]["name"]), {})[column] = text
    columns.sort(key=lambda column: (column[0], not column[1].startswith("top"), column[1]))
    out = Table(title=title, caption="in % (95 % interval)", caption_justify="left")
    out.add_column("target", overflow="fold")
    for task, name in columns:
        out.add_column(f"{task} {name}", justify="right")
    for target, cells in rows.items():
        out.add_row(target, *(cells.get(column, "–") for column in columns))
    return out


def settings_table(result: Mapping[str, Any]) -> "Table | None":
    """The settings a result was measured or chosen from; None if there is one only."""
    from rich.table import Table

    settings = result.get("settings") or []
    if len(settings) < 2:
        return None
    out = Table(title=f"{result['task']}: settings")
    keys = list(settings[0])
    for key in keys:
        out.add_column(key, justify="right")
    for row in settings:
        out.add_row(*(_cell(key, row.get(key)) for key in keys))
    return out


def _cell(key: str, value: Any) -> str:
    if isinstance(value, float) and (key.startswith("top") or key.endswith(("top1", "top5"))):
        return f"{100 * value:.2f}"
    return f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value)


def _by_classifier(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A result for each classifier of one, for a table with a row each; [] for a result of something else."""
    out: list[Mapping[str, Any]] = []
    count = result["protocol"].get("val_images", 0) - sum(result["protocol"].get("unreadable_left_out", {}).values())
    for row in result.get("settings") or []:
        if "classifier" not in row:
            return []
        metrics = {k: v for k, v in row.items() if k != "classifier"}
        target = {**result["target"], "name": f"{result['target']['name']} {row['classifier']}"}
        protocol = {"top1_interval_95": interval(metrics["top1"], count)} if count > 0 else {}
        out.append({"task": result["task"], "target": target, "metrics": metrics, "protocol": protocol})
    return out


def terminal() -> "Console":
    """Of rich, on stdout. One whose reader is gone raises BrokenPipeError, which the command line knows; rich's own exits 1."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")

    return Terminal()


def show(result: Mapping[str, Any], out: Path | None = None, console: "Console | None" = None) -> None:
    """Print a result: its table, its settings, how it was measured, and where it is written. Nothing for {} (other ranks)."""
    if not result:
        return
    console = console or terminal()
    classifiers = _by_classifier(result)
    console.print(table(classifiers if classifiers else [result]))
    extra = None if classifiers else settings_table(result)
    if extra is not None:
        console.print(extra)
    protocol, target = result["protocol"], result["target"]
    for key in ("train", "val", "split", "selected", "trained_on", "fine_tuned", "note"):
        if isinstance(protocol.get(key), str):
            console.print(f"{key}: {protocol[key]}", markup=False, highlight=False, soft_wrap=True)
    left_out = {
        k: protocol[k] for k in ("unlabelled_left_out", "unreadable_left_out") if any(protocol.get(k, {}).values())
    }
    for key, counts in left_out.items():
        console.print(f"{key}: {counts}", markup=False, highlight=False, soft_wrap=True)
    if worst := result.get("confusions"):
        said = [f"{c['true']} for {c['predicted']} {100 * c['share']:.0f} %" for c in worst[:3]]
        console.print(f"most confused: {', '.join(said)}", markup=False, highlight=False, soft_wrap=True)
    path = out or (
        Path(target["run"]) / "eval" / file_name(result["task"], target["kind"]) if "run" in target else None
    )
    if path is not None:
        console.print(f"written to {path}", markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(
            "not written: this target belongs to no run; name a file with --out", markup=False, soft_wrap=True
        )
