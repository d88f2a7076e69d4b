"""`init_from`: start a method from a run or a published checkpoint, its heads fresh or loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from selfsup.backbones.keys import Branch, select
from selfsup.backbones.load import load_into, newest_checkpoint, read_weights
from selfsup.config import Config
from selfsup.errors import UserError


def initialise(method: Any, config: Config) -> None:
    """Load `init_from.path` into the backbones of `method`, and into its heads with `init_from.heads=load`.

    With fresh heads every role starts from the target's exported weights (for DINO the teacher's), so that student
    and teacher are the same at first; with loaded heads each role continues with its own weights.
    Raises UserError for targets without what is asked for.
    """
    path = config.init_from.path
    if path is None:
        if config.init_from.head_only is not None:
            raise UserError(
                "init_from.head_only needs init_from: without it there is no trained backbone to hold still"
            )
        return
    for role, backbone in method.backbones().items():
        if role not in ("student", "teacher"):  # a further student is another architecture
            continue
        own: Branch = "student" if role == "student" and config.init_from.heads == "load" else "teacher"
        load_into(backbone, path, branch=own, channels="adapt")
        if config.init_from.heads == "load":
            _load_head(getattr(method, role).head, _heads(Path(path), own), path)


def _heads(path: Path, branch: Branch) -> dict[str, Tensor]:
    """The head's tensors of a run, a checkpoint or an exported classifier, by their names inside the head."""
    if path.is_dir():
        folder = path if (path / "model.safetensors").is_file() else newest_checkpoint(path)
        path = folder / "model.safetensors"
    _, state = select(read_weights(path), branch)
    # a run without averaged weights has its student alone, as for the backbone
    return _below(state, (*_exported(path), f"{branch}.head.", "student.head.", "module.head.", "head.", "dino_head."))


def _exported(path: Path) -> tuple[str, ...]:
    """What timm calls the classifier of the folder this file is in; () where no config.json tells."""
    try:
        name = json.loads((path.parent / "config.json").read_text())["pretrained_cfg"]["classifier"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
    return (f"{name}.",) if isinstance(name, str) else ()


def _below(state: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    for prefix in prefixes:
        found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if found:
            return found
    return {}


def _load_head(head: nn.Module, found: dict[str, Tensor], target: str) -> None:
    own = head.state_dict()
    fits = found.keys() == own.keys() and all(found[k].shape == own[k].shape for k in own)
    if not fits:
        have = {k: tuple(v.shape) for k, v in found.items()}
        need = next((f"{k} {tuple(v.shape)}" for k, v in own.items() if have.get(k) != tuple(v.shape)), "other names")
        raise UserError(
            f"init_from.path={target}: its head does not fit ({len(found)} tensors; needed {need}); "
            "give the method the options it was trained with (and as many classes), or init_from.heads=fresh"
        )
    head.load_state_dict(found)
