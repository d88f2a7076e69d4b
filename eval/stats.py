"""`selfsup stats DATA`: what the channels of a set of images hold, and the `data:` block of a recipe that follows from it."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from selfsup.config import DataConfig
from selfsup.data.arrays import BadImage
from selfsup.data.sources import Source, open_source
from selfsup.data.statistics import Pieces, Statistics, Table, stored_channels, values_of
from selfsup.data.workers import items
from selfsup.errors import UserError
from selfsup.randomness import generator
from selfsup.wording import one_line

from .canvas import BLUE, INK, MUTED, new_figure, save
from .progress import Progress
from .results import check_destination
from .shown import check_picture

PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
_FIRST_LOOK, _LISTED, _TAG = 16, 5, 0x57A7


def run(
    spec: str,
    *,
    channels: int | None = None,
    sample: int | None = None,
    clip: tuple[float, float] = (0.1, 99.9),
    nodata: float | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    workers: int = 2,
    out: Path | None = None,
    picture: Path | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Print the statistics and the block, for people or as one JSON object; write the block and the picture where asked for.

    Raises UserError if no image can be read, and where nothing can be written.
    """
    if not 0 <= clip[0] < clip[1] <= 100:
        raise UserError(f"--clip {clip[0]:g} {clip[1]:g}: two percentiles, 0 <= low < high <= 100")
    if out is not None and out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}: a recipe ends in .yaml")
    if not all(0 <= level <= 255 for level in background):
        raise UserError(f"--background {' '.join(map(str, background))}: red, green and blue, each from 0 to 255")
    check_destination(out)
    check_picture(picture, "--picture")
    source = open_source(spec, channels=3, config=DataConfig(path=spec, background=background))
    chosen = np.arange(len(source))
    if sample is not None and sample < len(source):
        chosen = np.sort(generator(_TAG).choice(len(source), sample, replace=False))
    source.channels = channels or _channels_of(source, chosen)
    found = look(source, chosen, nodata, workers)
    if not found.tables:
        name, reason = found.bad[0]
        raise UserError(
            f"data={one_line(spec)}: none of {len(chosen)} images can be read as {source.channels} channels; {name}: {reason}"
        )
    block = recipe(found.main, spec, source.channels, clip, background)
    result = summary(found, spec, len(source), len(chosen), block)
    text = yaml.safe_dump(block, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    if as_json:
        print(json.dumps(result, indent=1, allow_nan=False), flush=True)
    else:
        print("\n".join(lines(result)))
        print(f"\nto paste into a recipe:\n\n{text}", end="", flush=True)
    if out is not None:
        _write(out, f"# selfsup stats {one_line(spec)}: {result['read']:,} images\n{text}")
    if picture is not None:
        _picture(found.main, block, clip, picture)
    for what, path in (("recipe", out), ("picture", picture)):
        if path is not None and not as_json:
            print(f"{what}: {path}")
    return result


def look(source: Source, chosen: np.ndarray, nodata: float | None, workers: int) -> Statistics:
    """The statistics of the chosen images; the same for any number of workers."""
    pieces, found = Pieces(source, chosen, source.channels, nodata), Statistics()
    progress = Progress(len(chosen), "images")
    with closing(items(pieces, 0, len(pieces), workers=workers if len(pieces) > 1 else 0)) as made:
        for part, ids in zip(made, pieces.pieces, strict=True):
            found.add(part)
            progress.advance(len(ids))
    progress.close()
    return found


def _channels_of(source: Source, chosen: np.ndarray) -> int:
    """As many as most of the first images hold; transparency is composed away, as training does."""
    seen: list[int] = []
    for i in chosen[:_FIRST_LOOK].tolist():
        try:
            raw = source.raw(i)
            count = stored_channels(raw, source)
        except BadImage:
            continue
        eight_bit_alpha = count == 4 and isinstance(raw, bytes) and raw.startswith((b"\x89PNG", b"GIF8", b"RIFF"))
        seen.append(3 if eight_bit_alpha else count)
    return max(seen, key=seen.count) if seen else 3


def recipe(
    table: Table, spec: str, channels: int, clip: tuple[float, float], background: tuple[int, int, int]
) -> dict[str, Any]:
    """The keys of a recipe: channels, range, depth, mean and std of what the network sees.

    8-bit values need no range. Others get the percentiles `clip` of each channel, and depth 16.
    """
    data: dict[str, Any] = {"path": spec}
    ranges = [(0.0, 255.0)] * channels
    if table.dtype != np.uint8:
        ranges = [_range(table, c, clip) for c in range(channels)]
        data["depth"] = 16
        data["value_range"] = [[_number(low), _number(high)] for low, high in ranges]
    if background != (255, 255, 255):
        data["background"] = list(background)
    seen = [table.mapped(c, *ranges[c]) for c in range(channels)]
    data["mean"] = [round(mean, 5) for mean, _ in seen]
    data["std"] = [round(std, 5) if std > 1e-4 else 1.0 for _, std in seen]
    return {"backbone": {"in_chans": channels}, "data": data}


def _range(table: Table, c: int, clip: tuple[float, float]) -> tuple[float, float]:
    """Rounded as it will be written; one unit wide where all values are the same."""
    if not table.channels[c].count:
        return 0.0, 1.0
    low, high = (_number(table.percentile(c, q)) for q in clip)
    if not low < high:
        low, high = _number(table.channels[c].low), _number(table.channels[c].high)
    return (low, high) if low < high else (low, low + 1)


def _number(value: float) -> float:
    """Six digits; whole numbers as such."""
    short = float(f"{value:.6g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def summary(found: Statistics, spec: str, images: int, chosen: int, block: dict[str, Any]) -> dict[str, Any]:
    """Everything as plain values; None for what a channel without values has not."""
    table = found.main
    rows = []
    for c, one in enumerate(table.channels):
        row: dict[str, Any] = {"channel": c, "count": one.count, "left_out": one.left_out}
        row |= {"mean": one.mean, "std": one.std, "min": one.low, "max": one.high} if one.count else {}
        row["percentiles"] = {f"{q:g}": table.percentile(c, q) for q in PERCENTILES} if one.count else {}
        row["state"] = "missing" if not one.count else "constant" if one.low == one.high else "ok"
        rows.append(row)
    return {
        "data": spec,
        "images": images,
        "looked_at": chosen,
        "read": sum(t.images for t in found.tables.values()),
        "dtype": str(table.dtype),
        "types": {name: t.images for name, t in found.tables.items()},
        "modes": dict(found.modes.most_common()),
        "height": _spread(found.height),
        "width": _spread(found.width),
        "nodata": {f"{value:g}": count for value, count in found.nodata.most_common()},
        "channels": rows,
        "bad_count": len(found.bad),
        "bad": [{"file": name, "reason": reason} for name, reason in found.bad],
        "recipe": block,
    }


def _spread(sides: list[int]) -> list[int]:
    """Least, median, largest."""
    return [min(sides), int(np.median(sides)), max(sides)]


def lines(result: dict[str, Any]) -> list[str]:
    """For people."""
    part = "" if result["looked_at"] == result["images"] else f" of {result['images']:,}, a seeded sample"
    sizes = ", ".join(f"{key} {'/'.join(map(str, result[key]))}" for key in ("width", "height"))
    out = [f"{result['data']}: {result['read']:,} images{part}; {sizes} (least/median/largest)"]
    out.append("stored: " + "; ".join(f"{mode}: {count:,}" for mode, count in result["modes"].items()))
    if len(result["types"]) > 1:
        out.append(
            f"the table is of {result['dtype']} alone: a range for one type does not suit another; sort them by type"
        )
    if result["nodata"]:
        out.append("values for nothing, as the files name them, left out: " + ", ".join(result["nodata"]))
    heads = ["channel", "mean", "std", "min", *(f"p{q:g}" for q in PERCENTILES), "max", "left out"]
    rows = [heads]
    for row in result["channels"]:
        figures = [row.get("mean"), row.get("std"), row.get("min"), *row["percentiles"].values(), row.get("max")]
        figures = figures if row["count"] else [None] * (len(heads) - 2)
        total = row["count"] + row["left_out"]
        note = "" if row["state"] == "ok" else f" {row['state']}"
        rows.append(
            [
                str(row["channel"]),
                *("-" if v is None else f"{v:.6g}" for v in figures),
                f"{row['left_out'] / total:.2%}{note}",
            ]
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(heads))]
    out += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if result["bad_count"]:
        out.append(f"{result['bad_count']:,} could not be read:")
        out += [f"  {bad['file']}: {bad['reason']}" for bad in result["bad"][:_LISTED]]
    return out


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written: {error.strerror or error}") from None


def _picture(table: Table, block: dict[str, Any], clip: tuple[float, float], path: Path) -> None:
    """A histogram of each channel, its ends at the extremes; the range of the recipe between two lines."""
    count = len(table.channels)
    columns = min(4, count)
    rows = -(-count // columns)
    figure = new_figure(2.6 * columns, 1.9 * rows + 0.3)
    ranges = block["data"].get("value_range") or [[0, 255]] * count
    for c, (axes, one) in enumerate(zip(figure.subplots(rows, columns, squeeze=False).flat, table.channels)):
        axes.set_title(
            f"channel {c}" + ("" if one.count and one.low < one.high else ": constant or missing"),
            fontsize=8,
            color=INK,
        )
        axes.tick_params(labelsize=6, colors=MUTED)
        axes.set_yticks([])
        if one.count:
            span = one.high - one.low or 1.0
            heights, edges = np.histogram(
                values_of(one.keys, table.dtype), 128, (one.low, one.low + span), weights=one.counts
            )
            axes.stairs(heights, edges, fill=True, color=BLUE)
            axes.set_yscale("symlog", linthresh=max(1.0, heights.max() / 1000))
            for end in ranges[c]:
                axes.axvline(end, color=INK, linewidth=0.8, linestyle="--")
    for axes in figure.axes[count:]:
        axes.set_visible(False)
    what = "0 and 255" if "value_range" not in block["data"] else f"the percentiles {clip[0]:g} and {clip[1]:g}"
    figure.suptitle(f"values of each channel, counts on a logarithmic scale; dashed: {what}", fontsize=8, color=INK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)
    except OSError as error:
        raise UserError(f"--picture {path}: cannot be written: {error.strerror or error}") from None
