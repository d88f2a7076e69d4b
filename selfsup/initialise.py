"""`init_from`: start a method from a run or a published checkpoint, its heads fresh or loaded."""

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
        load_into(backbone, path, branch=own)
        if config.init_from.heads == "load":
            _load_head(getattr(method, role).head, _heads(Path(path), own), path)


def _heads(path: Path, branch: Branch) -> dict[str, Tensor]:
    """The projection head's tensors of a run, a checkpoint folder or file, by their names inside the head."""
    if path.is_dir():
        folder = path if (path / "model.safetensors").is_file() else newest_checkpoint(path)
        path = folder / "model.safetensors"
    _, state = select(read_weights(path), branch)
    return _below(state, (f"{branch}.head.", "module.head.", "head.", "dino_head."))


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
            "give its out_dim and hidden_dim, or init_from.heads=fresh"
        )
    head.load_state_dict(found)
