"""dino's files as modules, from a clone; what has to be put in their way on a machine without CUDA or network."""

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType

NO_NETWORK = "dino: torch.hub.list, which main_dino calls to offer XCiT, gives nothing here: it would ask GitHub"
NO_CUDA = "dino: without CUDA, Tensor.cuda, Module.cuda and torch.cuda.synchronize do nothing"


def load(path: str | None, module: str) -> ModuleType:
    """A file of the clone, imported unmodified."""
    if path is None or not (Path(path) / "main_dino.py").is_file():
        raise FileNotFoundError(f"--peer dino={path}: no main_dino.py there; give a clone of facebookresearch/dino")
    import torch

    torch.hub.list = lambda *a, **k: []
    sys.path.insert(0, str(Path(path).resolve()))
    warnings.filterwarnings("ignore", category=FutureWarning)
    return importlib.import_module(module)


def without_cuda() -> None:
    """See `NO_CUDA`."""
    import torch

    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
        torch.nn.Module.cuda = lambda self, *a, **k: self  # type: ignore[method-assign]
        torch.cuda.synchronize = lambda *a, **k: None
