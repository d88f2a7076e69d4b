"""`load_backbone`: a backbone from a run, an exported folder, or a published file."""

import argparse
import json
import math
import pickle
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from selfsup import config as configuration
from selfsup.backbones.backbone import Backbone, _pair
from selfsup.backbones.channels import adapt_channels
from selfsup.backbones.create import OWNED, build, create_backbone, wrap
from selfsup.backbones.infer import infer
from selfsup.backbones.keys import HEADS, Branch, State, convert
from selfsup.backbones.positions import PosInterp, can_choose, resample_tokens
from selfsup.backbones.pyramid import Pyramid
from selfsup.backbones.vit3d import grid_of
from selfsup.errors import UserError
from selfsup.wording import one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pyth")


@typing.overload
def load_backbone(target: str | Path, *, pyramid: typing.Literal[True], **options: Any) -> Pyramid: ...


@typing.overload
def load_backbone(target: str | Path, *, pyramid: typing.Literal[False] = False, **options: Any) -> Backbone: ...


def load_backbone(
    target: str | Path,
    *,
    pyramid: bool = False,
    allow_partial: bool = False,
    branch: Branch = "teacher",
    name: str | None = None,
    pos_interp: PosInterp | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **timm_options: Any,
) -> Backbone | Pyramid:
    """A backbone in eval() mode, on the CPU, with the weights of `target`.

    target: a run folder, a checkpoint folder, an exported (or any timm) folder, a .safetensors file, or a .pth file of
    dino, dinov2, SegFormer, PVT v2 or timm; `RUN@student` is short for branch="student". name: the timm architecture,
    where the file does not tell. pos_interp, mean, std: default to what was recorded, else to what the project of the
    file's layout used. timm_options: win over what was recorded; another `img_size` resamples the position embedding.
    pyramid: maps of strides 4, 8, 16 and 32 as the output (see `selfsup.backbones.pyramid`), also of a ViT.

    Prints the matched tensors, n/m, on stderr; m counts those of the model and those of the file that are neither in
    the model nor of a head. Raises UserError when n < m, unless `allow_partial` (n = 0 never passes), and for targets
    that cannot be read.
    """
    path, branch = _resolve(target, branch)
    given = {"pos_interp": pos_interp, "mean": mean, "std": std}
    given = {key: value for key, value in given.items() if value is not None}
    with torch.random.fork_rng(devices=[]):  # the initial values are overwritten; leave the generator alone
        source = _open(path, branch)
        backbone = source.build(name, given, timm_options)
        _load(backbone, source, str(target), allow_partial)
    return Pyramid(backbone).eval() if pyramid else backbone.eval()


def load_into(
    backbone: Backbone,
    target: str | Path,
    *,
    allow_partial: bool = False,
    branch: Branch = "teacher",
    channels: Literal["same", "adapt"] = "same",
) -> tuple[int, int]:
    """Put the weights of `target` (see `load_backbone`) into an existing backbone; the matched n and m.

    channels=adapt: weights for 3 channels are made to fit another number (see `channels`).
    """
    path, branch = _resolve(target, branch)
    return _load(backbone, _open(path, branch), str(target), allow_partial, channels == "adapt")


def rebuild(recorded: dict[str, Any], where: str) -> Backbone:
    """The backbone that a config.json describes, with initial weights. Raises UserError naming `where`."""
    fault = _fault(recorded) if isinstance(recorded.get("architecture"), str) else "no 'architecture'; it is needed"
    if fault:
        raise UserError(f"{where}: {one_line(fault)}")
    return _Source("timm", {}, recorded).build(None, {}, {})


class _Source:
    """Weights with timm's keys, and what is known about the model they belong to."""

    def __init__(self, layout: str, state: State, recorded: dict[str, Any] | None = None) -> None:
        self.layout, self.state = layout, state
        self.recorded = recorded or {}  # of config.json
        self.run: configuration.Config | None = None
        self.grid: tuple[int, ...] | None = None  # of the position embedding in `state`, where recorded

    def build(self, name: str | None, given: dict[str, Any], options: dict[str, Any]) -> Backbone:
        if self.run is not None:
            return self._from_run(self.run, name, given, options)
        if self.recorded:
            return self._from_folder(name, given, options)
        if name is None:
            name, found = infer(self.state, options)
            options = {**found, **options}
            norm = {} if name.startswith("timesformer") else {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        else:
            norm = {}
        model, options = build(name, options)
        channels = options.get("in_chans", 3)
        cfg = model.pretrained_cfg
        fallback = {"mean": cfg["mean"], "std": cfg["std"], **norm}  # type: ignore[index]
        if channels != 3:
            fallback = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
        default: dict[str, Any] = {"pos_interp": self._published_interp(), **fallback}
        if not can_choose(model):
            default["pos_interp"] = "timm"
        return wrap(model, name, options, input_size=None, **{**default, **given})

    def _published_interp(self) -> PosInterp:
        """DINO by scale factor; DINOv2 as well, but with registers by size and antialiased (its hub/backbones.py)."""
        if self.layout == "dinov2":
            return "timm" if "reg_token" in self.state else "dino"
        return "dino" if self.layout == "dino" else "timm"

    def _from_folder(self, name: str | None, given: dict[str, Any], options: dict[str, Any]) -> Backbone:
        cfg = self.recorded.get("pretrained_cfg", self.recorded)
        architecture = name or self.recorded["architecture"]
        args = {**self.recorded.get("model_args", {}), **options}
        channels, *size = cfg.get("input_size", (3, 224, 224))
        args.setdefault("in_chans", channels)
        model, args = build(architecture, args, input_size=(size[0], size[1]))
        default = {key: cfg.get(key, value) for key, value in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))}
        if len(default["mean"]) != args["in_chans"]:
            default = {"mean": (0.5,) * args["in_chans"], "std": (0.25,) * args["in_chans"]}
        default["pos_interp"] = self.recorded.get("selfsup", {}).get("pos_interp", "timm")
        return wrap(model, architecture, args, input_size=(size[0], size[1]), **{**default, **given})

    def _from_run(
        self, run: configuration.Config, name: str | None, given: dict[str, Any], options: dict[str, Any]
    ) -> Backbone:
        change = {**options, "pretrained": False}
        if name is not None:
            change["name"] = name
        if "pos_interp" in given:
            change["pos_interp"] = given["pos_interp"]
        spec = configuration.BackboneConfig(**{**run.backbone.model_dump(), **change})
        mean, std = given.get("mean", run.mean), given.get("std", run.std)
        return create_backbone(spec, mean=mean, std=std, input_size=run.views.global_.size)


# ------------------------------------------------------------------------------------------------------------ reading


def _resolve(target: str | Path, branch: Branch) -> tuple[Path, Branch]:
    path = Path(target)
    if not path.exists() and str(target).endswith(("@student", "@teacher")):
        text, _, suffix = str(target).rpartition("@")
        path, branch = Path(text), "student" if suffix == "student" else "teacher"
    if not path.exists():
        raise UserError(
            f"{target}: no such file or folder; give a run, an exported backbone, a .safetensors or .pth file"
        )
    return path, branch


def _open(path: Path, branch: Branch) -> _Source:
    if path.is_file():
        config = path.parent / "config.json"
        if path.suffix == ".safetensors" and path.name == "model.safetensors" and config.is_file():
            return _open_folder(path.parent)
        run = path.parent.parent.parent / "config.yaml"
        if path.name == "model.safetensors" and path.parent.parent.name == "checkpoints" and run.is_file():
            return _open_checkpoint(path.parent, branch)
        layout, state = _convert(path, branch)
        return _Source(layout, state)
    if (path / "config.json").is_file():
        return _open_folder(path)
    if branch == "teacher" and (path / "backbone" / "config.json").is_file():
        return _open_folder(path / "backbone")
    if (path / "model.safetensors").is_file() and path.parent.name == "checkpoints":
        return _open_checkpoint(path, branch)
    if (path / "config.yaml").is_file():
        return _open_checkpoint(newest_checkpoint(path), branch)
    raise UserError(f"{path}: neither a run (config.yaml, checkpoints/) nor an exported backbone (config.json)")


def newest_checkpoint(run: Path) -> Path:
    """The newest checkpoint of a run: what `latest` names, or else the highest step."""
    folder = run / "checkpoints"
    found = sorted(folder.glob("step_*/model.safetensors"))
    try:
        named = (folder / "latest").read_text().strip()
    except (OSError, ValueError):  # missing or damaged; ValueError: no text
        named = ""
    if named in {weights.parent.name for weights in found}:
        return folder / named
    if not found:
        raise UserError(f"{run}: the run has no backbone/ and no checkpoint yet; train it first")
    return found[-1].parent


def _open_folder(path: Path) -> _Source:
    try:
        recorded = json.loads((path / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}/config.json: cannot be read: {one_line(error)}") from None
    if not isinstance(recorded, dict) or "architecture" not in recorded:
        raise UserError(f"{path}/config.json: not timm's: no 'architecture'; give the weights file and name=TIMM_NAME")
    if fault := _fault(recorded):
        raise UserError(f"{path}/config.json: {one_line(fault)}")
    files = [path / "model.safetensors", path / "pytorch_model.bin", *sorted(path.glob("*.safetensors"))]
    weights = next((f for f in files if f.is_file()), None)
    if weights is None:
        raise UserError(f"{path}: config.json without weights; model.safetensors is needed beside it")
    source = _Source("timm", _convert(weights, "teacher")[1], recorded)
    size = recorded.get("model_args", {}).get("img_size")
    size = size or recorded.get("pretrained_cfg", recorded).get("input_size", (3, 224, 224))[1:]
    kernel = source.state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4:
        h, w = _pair(size)
        source.grid = (h // kernel.shape[2], w // kernel.shape[3])
    elif recorded["architecture"].startswith("vit3d"):
        source.grid = grid_of(recorded.get("model_args", {}))
    return source


def _fault(recorded: dict[str, Any]) -> str:
    """What in a config.json cannot be used; '' if nothing is."""
    cfg = recorded.get("pretrained_cfg", recorded)
    tables = {
        "model_args": recorded.get("model_args", {}),
        "pretrained_cfg": cfg,
        "selfsup": recorded.get("selfsup", {}),
    }
    for key, value in tables.items():
        if not isinstance(value, dict):
            return f"{key} is {value!r}; a table is needed"
    if not isinstance(recorded["architecture"], str):
        return f"architecture is {recorded['architecture']!r}; a name of timm's is needed"
    size = cfg.get("input_size", (3, 224, 224))
    if not _numbers(size, int) or len(size) != 3 or min(size) < 1:
        return f"input_size is {size!r}; [channels, height, width] is needed"
    for key in ("mean", "std"):
        if not _numbers(cfg.get(key, (0.5,)), (int, float)):
            return f"{key} is {cfg[key]!r}; a list of numbers is needed"
    if (interp := tables["selfsup"].get("pos_interp", "timm")) not in typing.get_args(PosInterp):
        return f"selfsup.pos_interp is {interp!r}; known are {', '.join(typing.get_args(PosInterp))}"
    if owned := (OWNED.keys() - {"num_classes"}) & tables["model_args"].keys():
        return f"model_args.{min(owned)} has no place there"  # some would load other files
    channels, size = (tables["model_args"].get(key, 3) for key in ("in_chans", "img_size"))
    if not _numbers([channels], int) or channels < 1:
        return f"model_args.in_chans is {channels!r}; a number is needed"
    axes = 3 if recorded["architecture"].startswith("vit3d") else 2
    if not (_numbers([size], int) or (_numbers(size, int) and len(size) == axes)):
        shape = "[depth, height, width]" if axes == 3 else "[height, width]"
        return f"model_args.img_size is {size!r}; a number or {shape} is needed"
    return ""


def _numbers(values: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)


def _open_checkpoint(path: Path, branch: Branch) -> _Source:
    run = configuration.load(str(path.parent.parent / "config.yaml"))
    layout, state = _convert(path / "model.safetensors", branch)
    source = _Source(layout, state)
    source.run = run
    return source


def _convert(path: Path, branch: Branch) -> tuple[str, State]:
    try:
        return convert(read_weights(path), branch)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def read_weights(path: Path) -> dict[str, Any]:
    """What a .safetensors or a torch file holds; nothing but tensors and plain containers is ever unpickled."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix not in _TORCH_SUFFIXES:
            raise UserError(f"{path}: weights are read from .safetensors, {', '.join(_TORCH_SUFFIXES)}")
        # DINO's training checkpoints carry their arguments: an argparse.Namespace is a plain container too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).split("Unsupported global: GLOBAL ")
        what = f"it holds a {reason[1].split(' ')[0]}" if len(reason) > 1 else "it is no torch file, or damaged"
        raise UserError(f"{path}: not loaded: {what}; save its state dict alone, or as .safetensors") from None
    except Exception as error:  # OSError, SafetensorError, RuntimeError; of a damaged pickle IndexError, TypeError, ...
        raise UserError(f"{path}: cannot be read: {one_line(error, 160) or type(error).__name__}") from None


# ----------------------------------------------------------------------------------------------------------- matching


def _load(
    backbone: Backbone, source: _Source, target: str, allow_partial: bool, adapt: bool = False
) -> tuple[int, int]:
    """Load what fits, say how much, refuse less than everything."""
    model = backbone.model
    own = model.state_dict()
    state = _adapt(dict(source.state), own, backbone, source.grid)
    if "deformable" in backbone.options and not any(".offset." in key for key in state):
        from selfsup.backbones.deformable import offsets

        print(f"{target}: of a net whose convolutions do not deform: offsets begin at zero", file=sys.stderr)
        state |= {key: torch.zeros_like(own[key]) for key in offsets(model)}
    if adapt:
        state = adapt_channels(state, model, target)
    fits = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    missing, unknown = _unmatched(state, own)
    n, m = len(fits), len(fits) + len(missing) + len(unknown)
    interp = f", pos_interp={backbone.pos_interp}" if can_choose(model) else ""
    print(f"{target}: {source.layout} keys, {backbone.name}{interp}: matched {n}/{m} tensors", file=sys.stderr)
    if (n < m and not allow_partial) or n == 0:
        raise UserError(
            f"{target}: only {n} of {m} tensors match {backbone.name} ({_differences(missing, unknown, state, own)}); "
            "give the right name=/options, or allow_partial=True"
        )
    model.load_state_dict(fits, strict=False)
    return n, m


def _adapt(state: State, own: State, backbone: Backbone, grid: tuple[int, ...] | None) -> State:
    """Position embeddings to the model's grid; other projects' keys through timm's own filter of that model."""
    model = backbone.model
    pos = state.get("pos_embed")
    mine = own.get("pos_embed")
    new = tuple(getattr(getattr(model, "patch_embed", None), "grid_size", ()))
    if (
        pos is not None
        and mine is not None
        and pos.ndim == mine.ndim == 3
        and (pos.shape, grid or new) != (mine.shape, new)
    ):
        prefix = mine.shape[1] - math.prod(new)
        patches = max(pos.shape[1] - prefix, 0)
        old = grid or ((round(patches ** (1 / 3)),) * 3 if len(new) == 3 else (math.isqrt(patches),) * 2)
        if (
            len(new) == len(old)
            and prefix >= 0
            and pos.shape[2] == mine.shape[2]
            and math.prod(old) + prefix == pos.shape[1]
        ):
            state["pos_embed"] = resample_tokens(pos, old, new, backbone.pos_interp, prefix)
    converter = _timm_filter(model)
    if converter is not None and _faults(state, own):
        try:
            converted = converter(dict(state), model)
        except (KeyError, RuntimeError, AttributeError, ValueError, TypeError, IndexError, AssertionError):
            return state  # not a layout it knows: the count of matched tensors says what is wrong
        if _faults(converted, own) < _faults(state, own):
            return converted
    return state


def _unmatched(state: State, own: State) -> tuple[list[str], list[str]]:
    """(tensors of the model that `state` has not in that shape, tensors of `state` that no model part is for)."""
    missing = [
        k for k in own if not k.endswith("num_batches_tracked") and (k not in state or state[k].shape != own[k].shape)
    ]
    return missing, [k for k in state if k not in own and not HEADS.match(k)]


def _faults(state: State, own: State) -> int:
    missing, unknown = _unmatched(state, own)
    return len(missing) + len(unknown)


def _timm_filter(model: nn.Module) -> Any:
    """timm's `checkpoint_filter_fn` of this architecture: original keys of XCiT, Swin, ConvNeXt, ... to its own."""
    if can_choose(model):
        return None  # plain ViTs are converted in keys.py; timm's would resize patch kernels in silence
    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)


def _differences(missing: list[str], unknown: list[str], state: State, own: dict[str, Tensor]) -> str:
    shapes = [k for k in missing if k in state]
    if shapes:
        k = shapes[0]
        return f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
    parts = [f"missing {missing[0]}"] if missing else []
    parts += [f"not part of it {unknown[0]}"] if unknown else []
    return ", ".join(parts)
