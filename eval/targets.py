"""What is evaluated: a run, one of its checkpoints or roles, a backbone folder or file, raw pixels, a random init.

RUN                  the exported backbone of a run, or of its newest checkpoint (for DINO the teacher)
RUN@student          another role of the newest checkpoint (`teacher`, `student`)
RUN/checkpoints/X    that checkpoint's teacher; `@student` works here as well
random:RUN           the run's backbone as it was initialised (also random:RECIPE)
pixels               no backbone: the images themselves
anything else        what `selfsup.load_backbone` takes
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfsup import checkpoint, config, dist
from selfsup.backbones import Backbone, create_backbone, load_backbone
from selfsup.config import Config
from selfsup.errors import UserError

_ROLES = ("teacher", "student")


@dataclass
class Target:
    """An opened target; `backbone` is None for pixels, else frozen and in eval mode on `device`."""

    name: str
    kind: str
    """'run', 'student', 'checkpoint', 'random', 'backbone', 'exported' (a classifier's folder) or 'pixels'."""
    backbone: Backbone | None
    checkpoint_hash: str
    """sha256 of the backbone's weights, the same for the same weights however they are stored; 'pixels' for pixels."""
    device: torch.device
    run: Path | None = None
    config: Config | None = None
    step: int | None = None

    def facts(self) -> dict[str, Any]:
        """What a result file says about it."""
        out: dict[str, Any] = {"name": self.name, "kind": self.kind, "checkpoint_hash": self.checkpoint_hash}
        if self.backbone is not None:
            out["backbone"] = self.backbone.name
            out["embed_dim"] = self.backbone.embed_dim
        if self.run is not None:
            out["run"] = str(self.run)
        if self.step is not None:
            out["step"] = self.step
        return out


def open_target(target: str, *, device: str = "auto") -> Target:
    """Open TARGET on a device. Raises UserError saying what is missing and what a target may be."""
    place = open_device(device)
    if target == "pixels":
        return Target("pixels", "pixels", None, "pixels", place)
    if target.startswith("random:"):
        found = _random(target)
    else:
        found = _trained(target)
    assert found.backbone is not None
    found.backbone.eval().requires_grad_(False).to(place)
    found.device = place
    return found


def open_device(device: str) -> torch.device:
    """`pick_device`, and the other ranks are joined."""
    place = pick_device(device)
    dist.init(place, timeout_s=4 * 3600)  # other ranks wait while rank 0 votes or searches
    return place


def pick_device(device: str) -> torch.device:
    """'auto' is CUDA (this rank's device) where there is one."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise UserError("device=cuda: this machine or this torch has no CUDA; use device=cpu")
    if device == "cpu" or not cuda:
        return torch.device("cpu")
    place = torch.device("cuda", dist.env_world()[2] % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return place


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, types, shapes and values of a module's state."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_config(run: Path) -> Config:
    """RUN/config.yaml. Raises UserError if this is no run folder."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml); give the folder that `selfsup train --out` wrote")
    return config.load(str(path))


def _build(settings: Config) -> Backbone:
    """The run's backbone with the weights it started from (see `methods.create`: seeded, backbone first)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return create_backbone(
            settings.backbone, mean=settings.mean, std=settings.std, input_size=settings.views.global_.size
        )


def _random(target: str) -> Target:
    name = target.removeprefix("random:")
    is_recipe = name in config.recipe_names() or name.endswith((".yaml", ".yml"))
    settings = config.load(name) if is_recipe else run_config(Path(name))
    settings = settings.model_copy(update={"backbone": settings.backbone.model_copy(update={"pretrained": False})})
    backbone = _build(settings)
    run = None if is_recipe else Path(name)
    return Target(target, "random", backbone, weights_hash(backbone.model), torch.device("cpu"), run, settings)


def _trained(target: str) -> Target:
    base, at, role = target.rpartition("@")
    if not at or Path(target).exists():
        base, role = target, ""
    elif role not in _ROLES:
        raise UserError(
            f"target {target!r}: no role {role!r}{config.suggest(role, _ROLES)}; known: {', '.join(_ROLES)}"
        )
    path = Path(base)
    is_checkpoint = path.parent.name == "checkpoints" and (path / "model.safetensors").is_file()
    run = path.absolute().parent.parent if is_checkpoint else path
    settings = run_config(run) if role or is_checkpoint or (run / "config.yaml").is_file() else None
    folder = path
    if role and not is_checkpoint:
        newest, problems = checkpoint.newest_valid(run / "checkpoints")
        if newest is None:
            why = f" ({problems[0]})" if problems else ""
            raise UserError(
                f"target {target!r}: {run / 'checkpoints'} holds no complete checkpoint{why}; train the run first"
            )
        folder = newest
    backbone = load_backbone(folder, branch="student" if role == "student" else "teacher")
    if settings is None:
        return Target(target, "backbone", backbone, weights_hash(backbone.model), torch.device("cpu"))
    kind = "student" if role == "student" else "checkpoint" if is_checkpoint else "run"
    step = next((n for n, p in checkpoint.steps(folder.parent) if p.name == folder.name), None)
    return Target(target, kind, backbone, weights_hash(backbone.model), torch.device("cpu"), tidy(run), settings, step)


def tidy(run: Path) -> Path:
    """Relative to the working directory where that is shorter."""
    here = Path.cwd()
    return run.relative_to(here) if run.is_relative_to(here) and run != here else run
