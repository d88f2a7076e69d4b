"""A trained method, as its run or one of its checkpoints holds it."""

from pathlib import Path
from typing import Any

from torch import nn

from selfsup import checkpoint, methods
from selfsup import config as configuration
from selfsup.classifier import Trained
from selfsup.errors import UserError


def load_classifiers(target: str | Path) -> Trained:
    """What tells classes in a run (its newest valid checkpoint) or in RUN/checkpoints/step_N, on the CPU, in eval mode.

    {} for a method that tells none. Raises UserError where there is no run, or no complete checkpoint.
    """
    path = Path(target).absolute()
    one = path.parent.name == "checkpoints" and (path / "model.safetensors").is_file()
    run = path.parent.parent if one else path
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{target}: not a run folder (no config.yaml); give the folder that `selfsup train --out` wrote"
        )
    config = methods.complete(configuration.load(str(run / "config.yaml")))
    folder, problems = (path, []) if one else checkpoint.newest_valid(run / "checkpoints")
    if folder is None:
        why = f" ({problems[0]})" if problems else ""
        raise UserError(f"{target}: {run / 'checkpoints'} holds no complete checkpoint{why}; train the run first")
    state = {k: v for k, v in checkpoint.load(folder, 0).model.items() if not k.startswith("loss_scale.")}
    kind: Any = methods.find(config.method.name)
    try:
        if hasattr(kind, "classifiers_from"):  # what it learned from need not be there any more
            found: dict[str, nn.Module] = kind.classifiers_from(config, state)
            return Trained(found, config, checkpoint.step_of(folder))
        method = methods.create(config)
        method.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())
        raise UserError(f"{folder}: does not fit its run's configuration: {first[:300]}") from None
    return Trained(method.eval().classifiers(), config, checkpoint.step_of(folder))
