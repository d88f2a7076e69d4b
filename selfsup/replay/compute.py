"""What was wrong with a refused step: its batch computed again, with an eye on every module.

The trainer keeps the first steps whose loss or gradients were not finite (`refused.keep`). Here the method is built
again, gets the weights that were kept, and computes the same micro-batches with the same step number and positions, so
that drop path and masks are those of the step. Gradients are this rank's own: what training averages over ranks is not.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfsup import methods, runtime
from selfsup.config import Config
from selfsup.data import photometric
from selfsup.data.views import resolutions
from selfsup.errors import UserError
from selfsup.methods.contract import ViewBatch
from selfsup.optim import clip_gradients
from selfsup.replay import contact_sheet
from selfsup.replay.refused import Refused, kept, read
from selfsup.replay.report import lines

_SHOWN_PARAMETERS = 5


def run(folder: Path) -> None:
    """`selfsup replay FOLDER`: replay, and print what was found."""
    print("\n".join(lines(replay(folder))))


def replay(folder: Path, out: Path | None = None) -> dict[str, Any]:
    """Compute a refused step again; everything that was found, as plain values. batch.png goes to `out` (default `folder`).

    `attempts` holds one entry for the recorded precision; where that is not finite again, further ones: without the loss
    scale (fp16), and in the next higher precision. Raises UserError for a folder that is damaged, does not fit, or needs
    a method that cannot be imported here.
    """
    refused = read(folder)
    config = _configuration(refused.config)
    device = torch.device(config.device)
    with runtime.settings(config):
        method = _method(refused, config, device)
        images = _images(refused)
        report: dict[str, Any] = {
            "folder": str(folder),
            "step": refused.info.step,
            "rank": refused.info.rank,
            "world": refused.info.world,
            "method": config.method.name,
            "precision": config.precision,
            "device": config.device,
            "recorded_device": refused.config.device,
            "steps_since": refused.info.steps_since,
            "figures": dict(refused.info.figures),
            "accumulate": len(refused.batches),
            "batch_statistics": bool(getattr(method, "batch_statistics", False)),
            "weights": _unfinite({**dict(method.named_parameters()), **dict(method.named_buffers())}),
            "images": images,
            "picture": _picture(refused, method, config, images, out or folder),
            "others": [p.name for p in kept(folder.absolute().parent) if _same_step(p, folder)],
            "attempts": [],
        }
        for precision, scale in _plan(config.precision, refused.info.loss_scale):
            report["attempts"].append(_attempt(method, refused, config, device, precision, scale))
            if report["attempts"][-1]["finite"]:
                break
    return report


def _configuration(config: Config) -> Config:
    """The run's own, for this machine: nothing is fetched, compiled or recomputed."""
    device = "cuda" if config.device == "cuda" and torch.cuda.is_available() else "cpu"
    precision = config.precision
    if precision == "auto":
        precision = runtime.pick_precision("auto", torch.device(device))  # type: ignore[assignment]
    threads = min(config.threads or 1, os.cpu_count() or 1)
    return config.model_copy(
        update={
            "device": device,
            "precision": precision,
            "threads": threads,
            "deterministic": device == "cpu",
            "compile": False,
            "grad_checkpointing": False,
            "backbone": config.backbone.model_copy(update={"pretrained": False}),
        }
    )


def _method(refused: Refused, config: Config, device: torch.device) -> Any:
    """The method with the weights that were kept."""
    name = config.method.name
    try:
        method = methods.create(methods.complete(config))
    except UserError as error:
        if name not in methods.METHODS and "cannot be imported" in str(error):
            raise UserError(
                f"{refused.folder}: method.name={name!r} is not part of selfsup and cannot be imported here; "
                f"run this where it can be, or add its folder to PYTHONPATH ({' '.join(str(error).split())[-120:]})"
            ) from None
        raise UserError(f"{refused.folder}: {error}") from None
    except Exception as error:  # a module from outside the tree may raise anything; so may sizes that make no sense
        raise UserError(f"{refused.folder}: {name} cannot be built: {_short(error)}") from error
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    method.to(device=device, dtype=dtype)
    method.to(memory_format=torch.channels_last)
    try:
        method.load_state_dict(refused.model)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{refused.folder / 'model.safetensors'}: does not fit info.json: {_short(error)}") from None
    return method.train()


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _plan(precision: str, scale: float | None) -> Iterator[tuple[str, float]]:
    """(precision, loss scale) of the attempts, each made only if those before were not finite."""
    yield precision, scale or 1.0
    if (scale or 1.0) != 1.0:
        yield precision, 1.0
    if precision != "fp64":
        yield ("fp64" if precision == "fp32" else "fp32"), 1.0


# ---------------------------------------------------------------------------------------------------------------- computing


def _attempt(
    method: Any, refused: Refused, config: Config, device: torch.device, precision: str, scale: float
) -> dict[str, Any]:
    """Forward and backward pass of every micro-batch, as the trainer does them; if that is not finite, again while watched.

    Methods take no shortcuts (`Config.shortcuts`) around modules that are watched: so the figures are of the first pass.
    """
    config = config.model_copy(update={"precision": precision})
    method.to(dtype=torch.float64 if precision == "fp64" else torch.float32)
    losses, mean = _pass(method, refused, config, device, scale, None)
    gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
    torch._foreach_mul_(list(gradients.values()), 1.0 / scale)
    norm = float(
        clip_gradients([p for p in method.parameters() if p.grad is not None] or [*method.parameters()], None, "")
    )
    finite, unfinite = math.isfinite(mean["loss"]) and math.isfinite(norm), _unfinite(gradients)
    watch = _Watch(method)
    try:
        if not finite:
            _pass(method, refused, config, device, scale, watch)
    finally:
        watch.remove()
    return {
        "precision": precision,
        "loss_scale": scale,
        "loss": mean["loss"],
        "parts": mean,
        "micro": losses,
        "grad_norm": norm,
        "finite": finite,
        "forward": watch.forward,
        "backward": watch.backward if watch.forward is None else None,
        "gradients": unfinite,
    }


def _pass(
    method: Any, refused: Refused, config: Config, device: torch.device, scale: float, watch: "_Watch | None"
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """What each micro-batch gave, and the mean, summed as the trainer does; the gradients are left in the parameters, the
    buffers as they were."""
    before = {name: buffer.clone() for name, buffer in method.named_buffers()}
    method.zero_grad(set_to_none=True)
    losses: list[dict[str, float]] = []
    mean: dict[str, Any] = {}
    count = len(refused.batches)
    try:
        for micro in range(count):
            if watch is not None:
                watch.micro = micro
            views = _views(refused, micro, config, device)
            try:
                with runtime.autocast(config):
                    out = method(views, dict(refused.info.schedules))
                (out["loss"] / count * scale).backward()
                losses.append({k: float(v.detach()) for k, v in out.items()})
                mean = {k: mean.get(k, 0) + v.detach() / count for k, v in out.items()}
            except Exception as error:  # a method's own code, on what a file says
                why = _short(error)
                raise UserError(f"{refused.folder}: {config.method.name} cannot compute this batch: {why}") from error
    finally:
        for name, buffer in method.named_buffers():  # a forward pass may move some
            buffer.data = before[name]
    return losses, {k: float(v) for k, v in mean.items()}


def _views(refused: Refused, micro: int, config: Config, device: torch.device) -> ViewBatch:
    batch = refused.batches[micro]
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    return ViewBatch(
        images=[
            photometric.apply(
                crops, params, config.mean, config.std, device, dtype, crops.shape[2] // config.backbone.in_chans
            )
            for crops, params in zip(batch.crops, batch.params)
        ],
        positions=batch.positions.to(device),
        labels=batch.labels.to(device),
        ids=batch.ids.to(device),
        step=refused.info.step - 1,
        global_batch=config.global_batch,
    )


class _Watch:
    """Hooks on every module: the first output, in order of execution, that is not finite, and likewise the first gradient."""

    def __init__(self, method: nn.Module) -> None:
        self.micro = 0
        self.forward: dict[str, Any] | None = None
        self.backward: dict[str, Any] | None = None
        self._finite: str | None = None  # the module whose output, last of all, had a finite gradient
        self._handles = [
            module.register_forward_hook(partial(self._output, name), with_kwargs=True)
            for name, module in method.named_modules()
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _output(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found = list(_floats(output))
        label = {"module": name, "kind": type(module).__name__, "micro": self.micro}
        if self.forward is None and not all(bool(torch.isfinite(t).all()) for t in found):
            self.forward = {**label, "output": _range(found), "input": _range(_floats((args, kwargs)))}
        for tensor in found:
            if tensor.requires_grad and getattr(tensor, "_watched_by", None) is not self:  # innermost module first
                tensor._watched_by = self  # type: ignore[attr-defined]
                tensor.register_hook(partial(self._gradient, label))

    def _gradient(self, label: dict[str, Any], gradient: Tensor) -> None:
        if self.backward is not None:
            return
        if torch.isfinite(gradient).all():
            self._finite = label["module"]
        else:
            self.backward = {**label, "gradient": _range([gradient]), "finite": self._finite}


def _floats(value: Any) -> Iterator[Tensor]:
    """The floating tensors in whatever a module takes or returns."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _floats(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _floats(inner)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _floats(getattr(value, field.name))


def _range(tensors: Any) -> dict[str, Any]:
    """Extremes of the finite values, and how many of all are not: {"min", "max", "bad", "of"}."""
    values = [t.detach().reshape(-1).double() for t in tensors]
    flat = torch.cat([v.cpu() for v in values]) if values else torch.zeros(0)
    good = flat[torch.isfinite(flat)]
    low, high = (float(good.min()), float(good.max())) if len(good) else (None, None)
    return {"min": low, "max": high, "bad": len(flat) - len(good), "of": len(flat)}


def _unfinite(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Names of tensors that hold a value that is not finite: {"count", "of", "first"}."""
    floating = {n: t for n, t in tensors.items() if t.is_floating_point()}
    names = [n for n, t in floating.items() if not bool(torch.isfinite(t).all())]
    return {"count": len(names), "of": len(floating), "first": names[:_SHOWN_PARAMETERS]}


# ------------------------------------------------------------------------------------------------------------------- images


def _images(refused: Refused) -> list[dict[str, Any]]:
    """One entry an image: its values over all crops, in levels of 8 bit, and how many crops are of one colour."""
    out = []
    names = iter(refused.info.names)
    for micro, batch in enumerate(refused.batches):
        low = torch.stack([c.amin(dim=(0, 2, 3, 4)) for c in batch.crops]).amin(0)  # [B]
        high = torch.stack([c.amax(dim=(0, 2, 3, 4)) for c in batch.crops]).amax(0)  # [B]
        flat = torch.cat([(c.amin((3, 4)) == c.amax((3, 4))).all(-1) for c in batch.crops]).sum(0)  # [V,B] -> [B]
        views = sum(len(c) for c in batch.crops)
        for b in range(len(batch.ids)):
            out.append(
                {
                    "name": next(names),
                    "micro": micro,
                    "index": b,
                    "position": int(batch.positions[b]),
                    "id": int(batch.ids[b]),
                    "label": int(batch.labels[b]),
                    "min": int(low[b]),
                    "max": int(high[b]),
                    "constant": int(flat[b]),
                    "views": views,
                }
            )
    return out


def _picture(refused: Refused, method: Any, config: Config, images: list[dict[str, Any]], out: Path) -> str | None:
    """Write batch.png; None where nothing can be written, which does not stop a replay."""
    cpu = torch.device("cpu")
    micro = [
        [contact_sheet.displayed(k[:, : contact_sheet.MOST], config.mean, config.std) for k in views.images]
        for views in (_views(refused, m, config, cpu) for m in range(len(refused.batches)))
    ]
    kinds, groups = refused.batches[0].crops, resolutions(method.views())
    rows = [[view.name for view in group] for group in groups]
    if [(len(c), c.shape[-1]) for c in kinds] != [(len(g), g[0].size) for g in groups]:  # trained on other views
        rows = [[f"kind {k} view {v}" for v in range(len(c))] for k, c in enumerate(kinds)]
    columns = [[str(int(p)) for p in batch.positions] for batch in refused.batches]
    marked = {(image["micro"], image["index"]) for image in images if image["constant"]}
    info = refused.info
    title = f"Step {info.step}, rank {info.rank}: the crops as trained on, by position in the global batch"
    if marked:
        title += " (framed: crops of one colour)"
    try:
        contact_sheet.save(contact_sheet.draw(micro, columns, rows, title, marked), out / "batch.png")
    except OSError:
        return None
    return str(out / "batch.png")


def _same_step(other: Path, folder: Path) -> bool:
    mine = folder.absolute().name
    return other.name != mine and other.name.split("_rank_")[0] == mine.split("_rank_")[0]
