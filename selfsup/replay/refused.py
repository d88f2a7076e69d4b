"""The batch of a refused step, kept so that it can be computed again: written by the trainer, read by `selfsup.replay`.

    RUN/refused/step_00000123_rank_00000/
        batch.safetensors    'micro.M.crops.K' uint8 [V,B,C,S,S] and 'micro.M.params.K' [V,B,P] of kind K of micro-batch M;
                             'micro.M.ids', 'micro.M.positions', 'micro.M.labels' int64 [B]
        model.safetensors    the method's state when the copy was made
        info.json            `Info`

Folders may come from strangers: tensors and JSON are all that is read, and everything is checked before it is used.
"""

import fcntl
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from selfsup import dist, durable, tensorfile
from selfsup.config import Config, Positive, Section, validate
from selfsup.data.batch import Batch
from selfsup.data.erasing import KEYS, MEAN
from selfsup.data.views import ORDERS, P, ViewParams
from selfsup.data.warp import FILLS
from selfsup.errors import UserError

_FORMER_P = (14, 26)
"""How long the rows of parameters of a view are in older folders: before there were light, erasing and Cutout; before warps."""

_NAME = re.compile(r"^step_\d{8,}_rank_\d{5,}$")


class Info(Section):
    """info.json: what is known about a refused step besides its tensors."""

    format: Literal[1] = 1
    step: Positive
    """As in metrics.jsonl: the number of steps including this one."""
    rank: Annotated[int, Field(ge=0)]
    world: Positive
    steps_since: Annotated[int, Field(ge=0)]
    """Steps that changed the weights between the refusal and the copy."""
    schedules: dict[str, float]
    loss_scale: Annotated[float, Field(gt=0)] | None = None
    """What the loss was multiplied by (fp16)."""
    figures: dict[str, float | str]
    """The loss and its parts as training saw them; 'nan', 'inf' or '-inf' where they were not finite."""
    names: list[str]
    """Of the images, micro-batch by micro-batch."""
    config: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """A folder that was read and found sound."""

    folder: Path
    info: Info
    config: Config
    batches: list[Batch]
    model: dict[str, Tensor]


def keep(
    folder: Path,
    *,
    step: int,
    rank: int,
    batches: Sequence[Batch],
    method: nn.Module,
    s: Mapping[str, float],
    config: Config,
    names: Sequence[str],
    parts: Mapping[str, float],
    steps_since: int,
    limit: int = 3,
    loss_scale: float | None = None,
    say: Callable[[str], None] | None = None,
) -> Path | None:
    """Keep a refused step under `folder` (RUN/refused); the new folder, or None if `limit` folders are there already.

    step: as in metrics.jsonl, so one more than `ViewBatch.step`. batches: its micro-batches on this rank, as the loader
    gives them. s: the values of its schedules. names: of the images of all micro-batches, in order. parts: figures to be
    shown with it. loss_scale: of that step (fp16); default the figure of this name in `parts`.

    A disk that is full or not writable is reported through `say` (default: stderr), never raised: a run does not end
    because of what it keeps for later. Nothing is kept twice; the first refused steps are the ones that stay.
    """
    name = f"step_{step:08d}_rank_{rank:05d}"
    final, temporary = folder / name, folder / f"{durable.TEMPORARY}{name}"
    try:
        folder.mkdir(exist_ok=True)  # not its parents: a run folder that was removed is not made again
        for stale in folder.glob(f"{durable.TEMPORARY}*_rank_{rank:05d}"):
            durable.remove(stale)
        if final.exists():
            return final
        if len(kept(folder)) >= limit:
            return None
        info = Info(
            step=step,
            rank=rank,
            world=dist.world(),
            steps_since=steps_since,
            schedules=dict(s),
            loss_scale=parts.get("loss_scale") if loss_scale is None else loss_scale,
            figures={k: v if math.isfinite(v) else str(v) for k, v in parts.items()},
            names=[n.encode("utf-8", "backslashreplace").decode() for n in names],
            config=config.model_dump(mode="json", by_alias=True),
        )
        durable.make_folder(temporary)
        durable.write(temporary / "batch.safetensors", tensorfile.pieces(_packed(batches)))
        state = {k: v.detach().cpu().contiguous() for k, v in method.state_dict().items()}
        durable.write(temporary / "model.safetensors", tensorfile.pieces(state))
        durable.write(temporary / "info.json", [json.dumps(info.model_dump(), indent=1, allow_nan=False).encode()])
        with _alone(folder):  # ranks share the folder and its limit
            if len(kept(folder)) < limit:
                durable.rename(temporary, final)
                return final
        durable.remove(temporary)
    except (OSError, TypeError, ValueError, MemoryError) as error:
        text = f"the refused step {step} cannot be kept in {folder}: {error}; training goes on"
        with suppress(OSError):
            durable.remove(temporary)
        (say or _to_stderr)(text)
    return None


def kept(folder: Path) -> list[Path]:
    """The folders of refused steps in RUN/refused, oldest step first."""
    try:
        return sorted(p for p in folder.iterdir() if _NAME.match(p.name) and p.is_dir())
    except OSError:
        return []


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # where locks are not supported, two ranks may exceed the limit by one
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _packed(batches: Sequence[Batch]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for m, batch in enumerate(batches):
        for k, (crops, params) in enumerate(zip(batch.crops, batch.params, strict=True)):
            out[f"micro.{m}.crops.{k}"], out[f"micro.{m}.params.{k}"] = crops.contiguous(), params.contiguous()
        for key in ("ids", "positions", "labels"):
            out[f"micro.{m}.{key}"] = getattr(batch, key).contiguous()
    return out


# ---------------------------------------------------------------------------------------------------------------- reading


def read(folder: Path) -> Refused:
    """A folder that `keep` wrote. Raises UserError, one line, for anything that is missing, damaged or does not fit."""
    if not (folder / "info.json").is_file():
        raise UserError(_not_there(folder))
    info = validate(Info, _json(folder / "info.json"), where=str(folder / "info.json"))
    config = validate(Config, info.config, where=f"{folder / 'info.json'}: config")
    path = folder / "batch.safetensors"
    tensors = _tensors(path)
    try:
        batches = _unpacked(tensors, config)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    images = sum(len(b.ids) for b in batches)
    if len(info.names) != images:
        raise UserError(f"{folder / 'info.json'}: {len(info.names)} names for the {images} images of {path.name}")
    return Refused(folder, info, config, batches, _tensors(folder / "model.safetensors"))


def _not_there(folder: Path) -> str:
    """Advice for a path that is no refused step: often its run, or the folder above it."""
    for above in (folder, folder / "refused"):
        if found := kept(above):
            return f"{folder}: name one refused step: {', '.join(str(p) for p in found[:4])}"
    what = "has no info.json" if folder.is_dir() else "no such folder"
    return f"{folder}: {what}; a refused step is a folder such as RUN/refused/step_00000123_rank_00000"


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {_short(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, seen {type(values).__name__}")
    return values


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: missing; the folder is not complete")
    try:
        return tensorfile.read(path)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {_short(error)}") from None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _unpacked(tensors: Mapping[str, Tensor], config: Config) -> list[Batch]:
    """Raises KeyError for a tensor that is missing, ValueError for one that cannot be trained on."""
    out: list[Batch] = []
    while any(name.startswith(f"micro.{len(out)}.") for name in tensors):
        out.append(_micro(tensors, f"micro.{len(out)}.", config))
    if not out:
        raise KeyError("micro.0.ids")
    for m, batch in enumerate(out):
        if [c.shape for c in batch.crops] != [c.shape for c in out[0].crops]:
            raise ValueError(f"micro.{m} holds other crops than micro.0")
    return out


def _micro(tensors: Mapping[str, Tensor], prefix: str, config: Config) -> Batch:
    ids, positions, labels = (_vector(tensors, prefix + key) for key in ("ids", "positions", "labels"))
    count = len(ids)
    if not (count == len(positions) == len(labels) >= 1):
        raise ValueError(f"{prefix}ids, positions and labels hold {count}, {len(positions)} and {len(labels)} numbers")
    if int(positions.min()) < 0 or int(positions.max()) >= config.global_batch:
        raise ValueError(f"{prefix}positions lie outside the global batch of {config.global_batch}")
    crops: list[Tensor] = []
    params: list[Tensor] = []
    while not crops or tensors.keys() & {f"{prefix}crops.{len(crops)}", f"{prefix}params.{len(crops)}"}:
        name = f"{prefix}crops.{len(crops)}"
        crop, drawn = tensors[name], _completed(tensors[f"{prefix}params.{len(crops)}"])
        shape = tuple(crop.shape)
        fits = len(shape) == 5 and min(shape) > 0 and shape[3] == shape[4]
        deep, channels = config.volumes or config.data.frames is not None, config.backbone.in_chans  # frames, slices
        fits = fits and shape[1] == count and (shape[2] % channels == 0 if deep else shape[2] == channels)
        if not fits or crop.dtype not in (torch.uint8, torch.uint16):
            raise ValueError(
                f"{name} is {crop.dtype} {list(shape)}; "
                f"uint8 [views, {count}, {config.backbone.in_chans}, size, size] is expected, or uint16"
            )
        _check_params(drawn, f"{prefix}params.{len(crops)}", shape)
        crops.append(crop)
        params.append(drawn)
    return Batch(crops, params, ids, positions, labels, [])


def _vector(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if tensors[name].dtype != torch.int64 or tensors[name].ndim != 1:
        raise ValueError(f"{name} is {tensors[name].dtype} {list(tensors[name].shape)}; int64 [B] is expected")
    return tensors[name]


def _completed(params: Tensor) -> Tensor:
    """Rows of a former version with what was not drawn then."""
    if params.ndim == 0 or params.shape[-1] not in _FORMER_P:
        return params
    return torch.cat([params, params.new_zeros(*params.shape[:-1], P - params.shape[-1])], dim=-1)


def _check_params(params: Tensor, name: str, crops: tuple[int, ...]) -> None:
    """Rows of ViewParams within what can be drawn: an order indexes a table, a sigma sizes a filter, a box an image."""
    if params.dtype != torch.float32 or params.shape != (*crops[:2], P):
        raise ValueError(f"{name} is {params.dtype} {list(params.shape)}; float32 {[*crops[:2], P]} is expected")
    columns = dict(zip(ViewParams._fields, params.unbind(-1), strict=True))
    order, sigma, fill = columns["order"], columns["sigma"], columns["erase_fill"]
    sound = bool(torch.isfinite(params).all()) and order.min() >= -1 and order.max() < len(ORDERS)
    sound = sound and (order == order.round()).all() and sigma.min() >= 0 and sigma.max() <= 4 * crops[-1]
    sound = sound and (fill == fill.round()).all() and fill.min() >= MEAN and fill.max() < KEYS
    moved = columns["fill"] > 0
    sound = sound and (columns["fill"] == columns["fill"].round()).all() and columns["fill"].min() >= 0
    sound = sound and columns["fill"].max() <= len(FILLS) and (columns["zoom"][moved] > 0).all()
    sound = sound and torch.stack([columns["shear_x"], columns["shear_y"]]).abs().max() < 90
    for box in ("erase", "cutout"):
        for start, extent in (("x", "w"), ("y", "h")):
            low, length = columns[f"{box}_{start}"], columns[f"{box}_{extent}"]
            sound = sound and (low == low.round()).all() and (length == length.round()).all()
            sound = sound and low.min() >= 0 and length.min() >= 0 and (low + length).max() <= crops[-1]
    if not sound:
        raise ValueError(f"{name} holds values that no view draws")
