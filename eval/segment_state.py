"""A training of a segmentation head that was stopped: what is kept of it, in one file, and how it is taken up again.

FOLDER/training-KEY.safetensors holds the weights that move, the optimizer's moments, the step that comes next and the last loss
that was looked at. It is written aside, synced and renamed, so that a kill leaves the old one or the new one. KEY is a digest of
everything that the training is a function of: the same command finds the file again, any other leaves it alone.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from selfsup import durable, tensorfile
from selfsup.errors import UserError
from selfsup.optim_state import load_state_tensors, state_tensors
from selfsup.wording import one_line

_EVERY_S = 60.0
_SHARE = 50
"""Saving takes at most about one part in so many of the time."""


class TrainingState:
    """The state of one training under `folder`; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, key: str, every: int | None = None) -> None:
        """every: steps between two saves; default: about a minute, or longer where a save takes long."""
        self.path = None if folder is None else folder / f"training-{key[:16]}.safetensors"
        self.every = every
        self._saved, self._took = time.monotonic(), 0.0

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """(the step that comes next, the last loss), both put back; (0, nan) where there is nothing, or nothing whole."""
        if self.path is None or not self.path.is_file():
            return 0, float("nan")
        try:
            found = tensorfile.read(self.path)
            step, loss = int(found["step"]), float(found["loss"])
            weights = _fitting(model, _part(found, "model|"))
            load_state_tensors(optimizer, _part(found, "optimizer|"))  # changes nothing where it does not fit
        except (OSError, SafetensorError, KeyError) as error:
            print(f"{self.path}: left alone, the training begins anew: {one_line(error, 160)}", file=sys.stderr)
            return 0, float("nan")
        with torch.no_grad():
            for name, value in moving(model).items():
                value.copy_(weights[name])
        print(f"goes on at step {step:,} of {self.path}", file=sys.stderr)
        return step, loss

    def due(self, step: int) -> bool:
        """Whether it is time to save, `step` steps being done."""
        if self.path is None:
            return False
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self._saved >= max(_EVERY_S, _SHARE * self._took)

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, loss: float) -> None:
        """Replace the file, `step` steps being done. Raises UserError where it cannot be written."""
        if self.path is None:
            return
        began = time.monotonic()
        tensors = {f"model|{name}": value for name, value in moving(model).items()}
        tensors |= {f"optimizer|{name}": value for name, value in state_tensors(optimizer).items()}
        tensors |= {"step": torch.tensor(step), "loss": torch.tensor(loss, dtype=torch.float64)}
        write(self.path, tensors)
        self._saved = time.monotonic()
        self._took = self._saved - began

    def remove(self) -> None:
        """The training is done, and its result is kept elsewhere."""
        if self.path is not None:
            durable.remove(self.path)


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a `Segmenter`: everything, or with a frozen trunk the head."""
    frozen = getattr(model, "frozen", False)
    return {name: value for name, value in model.state_dict().items() if not (frozen and name.startswith("trunk."))}


def _fitting(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {name: value.shape for name, value in moving(model).items()}
    if wanted != {name: value.shape for name, value in tensors.items()}:
        raise KeyError(f"{len(tensors)} tensors of another model")
    return tensors


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file, replaced in one step and synced: its sha256. Raises UserError naming it if it cannot be written."""
    plain = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    temporary = path.with_name(f"{durable.TEMPORARY}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _, digest = durable.write(temporary, tensorfile.pieces(plain))
        durable.fsync(temporary)
        durable.rename(temporary, path)
        durable.fsync(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; name another file with --out") from None
    return digest
