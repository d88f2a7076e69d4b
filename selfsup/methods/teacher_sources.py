"""`teacher=X`: a timm name, a run, a checkpoint, an exported folder, a file, the bundled one of the demos, or a module from
Python, as a `Teacher`."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import is_model, list_models, list_pretrained
from torch import Tensor, nn

from selfsup.backbones import Backbone, load_backbone
from selfsup.backbones.create import wrap
from selfsup.backbones.load import newest_checkpoint, read_weights
from selfsup.config import Config, TeacherConfig, parse_yaml, suggest
from selfsup.errors import UserError
from selfsup.heads import DINOHead
from selfsup.methods.teachers import ForeignNet, FrozenNet, Teacher
from selfsup.wording import one_line

_SUFFIXES = ("@student", "@teacher")
_DEMO = Path(__file__).parent.parent / "data" / "fashion" / "teacher"


def open_teacher(config: Config, given: nn.Module | None = None) -> Teacher:
    """The teacher that `config.teacher` names, on the CPU, frozen, in eval mode, for views of `config.views.global`.

    given: a module from Python instead (`selfsup.train(..., teacher=module)`); it is frozen where it is, not copied.
    `teacher.mean`, `teacher.std` and `teacher.size` win over what the teacher's files say; a module that says nothing
    takes the student's. Raises UserError if there is no such teacher, or none with trained weights.
    """
    wish = config.teacher
    if given is None and wish.path is None:
        raise UserError(
            f"method={config.method.name} learns from a teacher and there is none; give teacher=RUN, an exported folder, "
            "a checkpoint or a timm name"
        )
    temperature = None
    net: FrozenNet | ForeignNet
    with torch.random.fork_rng(devices=[]):  # initial values are overwritten; leave the generator alone
        if given is not None:
            name, net = type(given).__name__, _frozen(given)
        else:
            name = str(wish.path)
            net, temperature = _open(name, wish)
    recorded: dict[str, Any] = {}
    if isinstance(net, FrozenNet):
        b = net.backbone
        recorded = {"mean": b.mean, "std": b.std, "size": b.image_size}
    size = (wish.size, wish.size) if wish.size else recorded.get("size")
    if isinstance(net, FrozenNet) and wish.size:
        try:
            net.backbone.check_size(wish.size)
        except UserError as error:
            raise UserError(f"teacher.size={wish.size}: {error}") from None
    mean = wish.mean or recorded.get("mean", config.mean)
    std = wish.std or recorded.get("std", config.std)
    if isinstance(net, FrozenNet) and (len(mean), len(std)) != (net.backbone.in_chans,) * 2:
        raise UserError(
            f"teacher.mean, teacher.std: {len(mean)} and {len(std)} values; {name} takes {net.backbone.in_chans} channels"
        )
    return Teacher(
        name,
        net,
        mean=mean,
        std=std,
        size=size,
        student_mean=config.mean,
        student_std=config.std,
        view_size=config.views.global_.size,
        temperature=temperature,
    )


def _frozen(module: nn.Module) -> FrozenNet | ForeignNet:
    return FrozenNet(module) if isinstance(module, Backbone) else ForeignNet(module)


def _open(target: str, wish: TeacherConfig) -> tuple[FrozenNet | ForeignNet, float | None]:
    """(network, temperature of its prototypes)."""
    path, role = Path(target), "teacher"
    if target == "demo":  # a folder of that name is ./demo
        return _from_run(_DEMO, role, target)
    try:
        there = path.exists()
    except (OSError, ValueError):  # ValueError: a NUL in the name
        there = False
    if not there and target.endswith(_SUFFIXES):
        text, _, role = target.rpartition("@")
        path = Path(text)
        if not path.exists():
            raise UserError(f"teacher={target}: no such run {text}")
        return _from_run(path, role, target)
    if there:
        return _from_run(path, role, target)
    if is_model(target):
        return _from_timm(target, wish.pretrained), None
    if ":" in target:
        return _from_python(target), None
    hint = suggest(target.split(".")[0], list_models())
    raise UserError(
        f"teacher={one_line(target)!r}: no such file or folder, and timm has no such model{hint}; give a run, a folder, "
        "a checkpoint, a timm name, or package.module:function"
    )


def _from_timm(name: str, pretrained: bool) -> FrozenNet:
    """With its published weights and its classifier."""
    if not pretrained:
        raise UserError(
            f"teacher={name}, teacher.pretrained=false: a teacher without loaded weights teaches noise; leave "
            "teacher.pretrained out, or give a run, a folder or a checkpoint"
        )
    architecture, _, tag = name.partition(".")
    tags = [m.partition(".")[2] for m in list_pretrained(f"{architecture}.*")]
    if not tags or (tag and tag not in tags):
        which = f"{tag!r}{suggest(tag, tags)}" if tags else "at all"
        raise UserError(
            f"teacher={name}: timm has no weights {which} for {architecture}: a teacher without loaded weights"
        )
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as error:
        raise UserError(
            f"teacher={name}: a teacher without loaded weights: they could not be fetched or read "
            f"({one_line(error, 160)}); check the network, or give a run, a folder or a file"
        ) from None
    cfg: Any = model.pretrained_cfg
    options = {"in_chans": cfg["input_size"][0]}
    size = (cfg["input_size"][1], cfg["input_size"][2])
    return FrozenNet(wrap(model, name, options, mean=cfg["mean"], std=cfg["std"], input_size=size, pos_interp="timm"))


def _from_python(target: str) -> FrozenNet | ForeignNet:
    """`package.module:function`, called without arguments, gives an nn.Module with its weights."""
    module, _, attribute = target.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"teacher={one_line(target)!r}: cannot be imported and called: {one_line(error)}") from None
    if not isinstance(made, nn.Module):
        raise UserError(
            f"teacher={target!r}: gives a {type(made).__name__}; a function that returns an nn.Module is needed"
        )
    return _frozen(made)


def _from_run(path: Path, role: str, target: str) -> tuple[FrozenNet, float | None]:
    """A run, a checkpoint, an exported folder or a file: the backbone, and whatever head its files hold."""
    branch: Any = role
    if role == "teacher":
        for folder in (path, path / "classifier"):
            if _classes_of(folder):
                return FrozenNet(_with_classifier(folder)), None
    checkpoint = _checkpoint_of(path)
    if checkpoint is None:
        return FrozenNet(load_backbone(path, branch=branch)), None
    backbone = load_backbone(checkpoint, branch=branch)
    state = read_weights(checkpoint / "model.safetensors")
    tensors = _head_tensors(state, role)
    if "last_layer.weight_v" in tensors:
        center = state.get("center")
        return FrozenNet(backbone, prototypes=_dino_head(tensors), center=center), _temperature(checkpoint)
    return FrozenNet(backbone, head=_linear(tensors)), None


def _classes_of(folder: Path) -> int:
    """Of an exported classifier; 0 if the folder is none."""
    try:
        recorded = json.loads((folder / "config.json").read_text())
        return int(recorded.get("num_classes") or 0)
    except (OSError, ValueError, TypeError, AttributeError):  # damaged ones are told of when they are loaded
        return 0


def _with_classifier(folder: Path) -> Backbone:
    """The backbone of an exported classifier, its timm model with the classifier put back."""
    backbone = load_backbone(folder)
    model: Any = backbone.model
    model.reset_classifier(_classes_of(folder))
    files = [folder / "model.safetensors", folder / "pytorch_model.bin"]
    state = read_weights(next(file for file in files if file.is_file()))
    heads = {k: v for k, v in model.state_dict().items() if k not in state or state[k].shape != v.shape}
    if heads:
        raise UserError(f"{folder}: its classifier does not fit ({', '.join(heads)}); export it again")
    model.load_state_dict(state)
    return backbone.eval()


def _checkpoint_of(path: Path) -> Path | None:
    """The folder of a checkpoint of ours that `path` is, holds, or is a file of; None for other files and folders."""
    if path.is_file():
        inside = path.name == "model.safetensors" and path.parent.parent.name == "checkpoints"
        return path.parent if inside else None
    if path.parent.name == "checkpoints" and (path / "model.safetensors").is_file():
        return path
    has = (path / "config.yaml").is_file() and any((path / "checkpoints").glob("step_*/model.safetensors"))
    return newest_checkpoint(path) if has else None


def _head_tensors(state: Mapping[str, Tensor], role: str) -> dict[str, Tensor]:
    """Of the head of this role; of the student's for a run without averaged weights."""
    for name in (role, "student"):
        prefix = f"{name}.head."
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if found:
            return found
    return {}


def _linear(tensors: dict[str, Tensor]) -> nn.Linear | None:
    """A plain classifier, or None if the head is another thing."""
    if not {"weight"} <= tensors.keys() <= {"weight", "bias"} or tensors["weight"].ndim != 2:
        return None
    classes, width = tensors["weight"].shape
    linear = nn.Linear(width, classes, bias="bias" in tensors)
    linear.load_state_dict(tensors)
    return linear


def _dino_head(tensors: dict[str, Tensor]) -> DINOHead:
    """The projection head that has these tensors."""
    linear = [value for key, value in tensors.items() if key.startswith("mlp.") and value.ndim == 2]
    order = sorted((key for key in tensors if key.startswith("mlp.") and tensors[key].ndim == 2), key=_number)
    head = DINOHead(
        tensors[order[0]].shape[1],
        tensors["last_layer.weight_v"].shape[0],
        hidden_dim=tensors[order[0]].shape[0],
        bottleneck_dim=tensors[order[-1]].shape[0],
        layers=len(linear),
        batch_norm=any(key.endswith("running_mean") for key in tensors),
    )
    head.load_state_dict(tensors)
    return head


def _number(key: str) -> int:
    return int(key.split(".")[1])


def _temperature(checkpoint: Path) -> float | None:
    """The teacher temperature its run ended with."""
    try:
        text = (checkpoint.parent.parent / "config.yaml").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    method = parse_yaml(text, "config.yaml").get("method")
    value = method.get("teacher_temp") if isinstance(method, dict) else None
    return float(value) if isinstance(value, (int, float)) else None
