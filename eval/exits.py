"""What each exit of a run costs and how often it is right: accuracy against operations, as a table and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from selfsup import dist
from selfsup.errors import UserError

from . import results
from .canvas import BLUE, INK, MUTED, ORANGE, new_figure, save
from .class_names import open_val
from .classify import OpenRun, Subject, answers, open_subject, transform_of
from .settings import ExitsSettings, resolve


def run(target: str, overrides: list[str], out: Path | None = None, *, open_run: OpenRun) -> dict[str, Any]:
    """`selfsup eval exits RUN`: print the table, write it to `out` or RUN/eval/exits.json, and the picture beside it.

    Ranks but 0 return {}.
    """
    settings = resolve("exits", overrides)
    assert isinstance(settings, ExitsSettings)
    results.check_destination(out)
    subject = open_subject(target, settings.device, open_run)
    result = evaluate(subject, settings)
    if not result:
        return result
    path = out or results.path_in_run("exits", subject.target)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        result["picture"] = str(draw(result["settings"], path.with_suffix(".png"), result["protocol"]["val_images"]))
        results.save(result, subject.target, out)
    results.show(result, out)
    return result


def evaluate(subject: Subject, settings: ExitsSettings) -> dict[str, Any]:
    """Top-1 of every classifier on the val images, its operations an image, and its parameters, each used alone."""
    if len(subject.classifiers) < 2:
        raise UserError(
            f"eval exits {subject.target.name}: it has no exits; train with method=byot, or use eval classify"
        )
    val = open_val(subject.target, settings, subject.classes, subject.class_names, len(subject.mean))
    transform = transform_of(subject, settings)
    found = answers(subject.classifiers, val, transform, settings, subject.target.device, what="exits: val images")
    if not dist.is_main():
        return {}
    shape = (1, len(subject.mean), transform.size, transform.size)
    rows: list[dict[str, Any]] = []
    for name, module in subject.classifiers.items():
        seen = found[name].readable > 0
        top1 = (found[name].place[seen] == 0).double().mean().item()
        flops, parameters = cost(module, shape)
        interval = results.interval(top1, int(seen.sum()))
        rows.append({"exit": name, "top1": top1, "flops": flops, "parameters": parameters, "interval_95": interval})
    main = rows[0]
    rows.sort(key=lambda row: (row["exit"] == "ensemble", row["flops"]))
    protocol = {
        "classifier": main["exit"],
        "top1_interval_95": main["interval_95"],
        "flops": "torch.utils.flop_counter, one image; a multiplication and an addition are two; norms are not counted",
        "parameters": "what the exit needs when it is used alone: no layers behind it",
        "transform": transform.__dict__ | {"mean": list(transform.mean), "std": list(transform.std)},
        "resolution": transform.size,
        "device": subject.target.device.type,
        "unreadable_left_out": {"val": len(val.images) - int((found[main["exit"]].readable > 0).sum())},
        **val.protocol,
        "seed": settings.seed,
        "versions": results.versions(),
    }
    return results.result("exits", subject.target, {"top1": main["top1"]}, protocol, rows)


@torch.no_grad()
def cost(module: nn.Module, shape: Sequence[int]) -> tuple[int, int]:
    """(operations, parameters) of a classifier alone, for one batch of images of this shape [B, C, H, W]."""
    alone = module.cut() if hasattr(module, "cut") else module  # type: ignore[operator]
    like = next(alone.parameters())
    counter = FlopCounterMode(display=False)
    with counter:
        alone(torch.zeros(tuple(shape), device=like.device, dtype=like.dtype))
    return int(counter.get_total_flops()), sum(p.numel() for p in alone.parameters())


def draw(rows: Sequence[Mapping[str, Any]], path: Path, images: int) -> Path:
    """Accuracy over operations: a line through the exits, the ensemble beside it, bars of 95 %."""
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    alone = [row for row in rows if row["exit"] != "ensemble"]
    together = [row for row in rows if row["exit"] == "ensemble"]
    for group, colour, line in ((alone, BLUE, "-"), (together, ORANGE, "none")):
        x = [row["flops"] / 1e6 for row in group]
        y = [100 * row["top1"] for row in group]
        bars = [[100 * abs(row["top1"] - row["interval_95"][side]) for row in group] for side in (0, 1)]
        axes.errorbar(x, y, bars, color=colour, linestyle=line, marker="o", markersize=5, linewidth=1.4, capsize=2)
        for n, (row, a) in enumerate(zip(group, x)):  # labels above and below their bars in turn
            above = n % 2 == 0
            end = 100 * row["interval_95"][1 if above else 0]
            text = f"{row['exit']}\n{100 * row['top1']:.1f} %, {row['parameters'] / 1e6:.2f} M"
            side = "bottom" if above else "top"
            axes.annotate(
                text,
                (a, end),
                (0, 5 if above else -5),
                textcoords="offset points",
                va=side,
                ha="center",
                fontsize=8,
                color=INK,
            )
    axes.set_xlim(0, 1.15 * max(row["flops"] for row in rows) / 1e6)
    axes.margins(y=0.2)
    axes.set_xlabel("million operations an image (a multiplication and an addition are two)", fontsize=9, color=MUTED)
    axes.set_ylabel(f"top-1 on {images:,} images (%)", fontsize=9, color=MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, length=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_title("What each exit costs, and what it knows", fontsize=11, color=INK, loc="left")
    return save(figure, path)
