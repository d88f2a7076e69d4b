"""Who may import whom, by reading the sources; no unsafe loads; the command line answers without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unsafe import unsafe

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"selfsup": ROOT / "selfsup", "selfsup.eval": ROOT / "eval", "selfsup.launch": ROOT / "launch"}

# A part may import parts of its own level and below, except as FORBIDDEN says.
LEVELS = [
    {
        "errors",
        "wording",
        "schema",
        "config",
        "randomness",
        "schedules",
        "dist",
        "ema",
        "heads",
        "predictors",
        "batchnorm",
        "losses",
    }
    | {"optim", "optim_state", "durable", "tensorfile", "spikes", "early_stopping", "guard"},
    {"checkpoint", "checkpoint_writer", "log", "health", "runtime", "placement", "runfolder", "status", "signals"}
    | {"recorder", "profile", "diagnosis", "judges", "columns", "remedies"},
    {"backbones", "data", "classifier"},
    {"methods", "recipes", "initialise", "replay", "exits", "doctor", "catalogue", "augment"},
    {"run", "train"},
    {"eval", "launch"},
    {"cli", "cli_eval", "cli_jobs", "cli_advice", "cli_augment", "cli_report", "demo"},
]
LEVEL = {part: n for n, parts in enumerate(LEVELS) for part in parts}
# may reach eval, launch and the trainer, inside functions only
LAZY_TOP = {"", "cli", "cli_eval", "cli_jobs", "cli_advice", "cli_augment", "cli_report", "demo"}
NO_TORCH = {
    "",
    "errors",
    "wording",
    "schema",
    "config",
    "cli",
    "cli_eval",
    "cli_jobs",
    "cli_advice",
    "cli_augment",
    "cli_report",
    "recipes",
    "guard",
    "durable",
    "spikes",
    "early_stopping",
    "log",
}
FORBIDDEN = {  # part -> parts it must not import, although the levels would allow it
    "backbones": {"data"},
    "data": {"backbones"},
    "losses": {"dist", "schedules", "config", "heads", "checkpoint", "log"},
    "schedules": {"dist", "heads", "losses", "ema"},
    "guard": {"config", "dist", "optim"},
    "eval": {"methods", "train", "run", "replay", "launch"},
    "launch": {"eval", "methods", "train", "backbones", "data", "losses"},
}
LIGHTLY = ("lightly.loss", "lightly.models.modules", "lightly.models.utils", "lightly.transforms")
FRAMEWORKS = {"pytorch_lightning", "lightning", "hydra", "omegaconf", "xformers", "mmcv", "ignite", "accelerate"}
HEAVY = {
    "torch",
    "torchvision",
    "timm",
    "lightly",
    "torchmetrics",
    "sklearn",
    "matplotlib",
    "faiss",
    "submitit",
    "scipy",
    "pytorch_optimizer",
}


class Import(NamedTuple):
    """`name` imported by `module`; `lazy` when inside a function; `line` for the message."""

    module: str
    name: str
    lazy: bool
    line: int
    relative: bool = False


def module_name(path: Path) -> str:
    for prefix, folder in sorted(FOLDERS.items(), key=lambda item: -len(item[0])):
        if path.is_relative_to(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            return ".".join([prefix, *parts]).removesuffix(".__init__")
    raise AssertionError(path)


def sources() -> dict[str, tuple[ast.Module, bool]]:
    """module name -> (syntax tree, whether it is a package's __init__)."""
    paths = [p for folder in FOLDERS.values() for p in sorted(folder.rglob("*.py"))]
    return {module_name(p): (ast.parse(p.read_text(), str(p)), p.name == "__init__.py") for p in paths}


def imports(module: str, tree: ast.Module, package: bool) -> Iterator[Import]:
    """Every import of a module, `from x import y` as both x and x.y, relative ones resolved."""

    def visit(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(module, alias.name, lazy, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    here = module.split(".")
                    here = here[: len(here) - child.level + (1 if package else 0)]
                    base = ".".join([*here, *([child.module] if child.module else [])])
                for name in (base, *(f"{base}.{alias.name}" for alias in child.names)):
                    yield Import(module, name, lazy, child.lineno, bool(child.level))
            inner = (
                lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _type_checking(child)
            )
            yield from visit(child, inner)

    yield from visit(tree, False)


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def part_of(name: str) -> str | None:
    """'selfsup.data.views' -> 'data'; 'selfsup' -> ''; None for what is not ours."""
    pieces = name.split(".")
    return None if pieces[0] != "selfsup" else (pieces[1] if len(pieces) > 1 else "")


def faults(module: str, tree: ast.Module, package: bool, known: set[str]) -> list[str]:
    """What a module imports and should not, one line each."""
    me, found = part_of(module), []
    assert me is not None
    if me not in LEVEL and me != "":
        found.append(f"{module}: say in LEVELS where the part {me!r} belongs")
    for item in imports(module, tree, package):
        where = f"{module}:{item.line} imports {item.name}"
        top, other = item.name.split(".")[0], part_of(item.name)
        if other is not None:
            # `from selfsup import X`: X is a part, or a name that selfsup/__init__ defines.
            if other == me or other == "" or (item.name not in known and other not in LEVEL):
                if me in ("eval", "launch") and other == me and not item.relative:
                    found.append(f"{where}: siblings in {me}/ are imported relatively")
                continue
            if me in LAZY_TOP:
                if other in ("eval", "launch", "train", "methods", "backbones", "data") and not item.lazy:
                    found.append(f"{where}: import it inside the function that needs it")
            elif other in ("eval", "launch"):
                found.append(f"{where}: only the command line composes these")
            elif LEVEL.get(other, 99) > LEVEL.get(me, -1) or other in FORBIDDEN.get(me, ()):
                found.append(f"{where}: {me} may not import {other}")
        if top == "faiss" and module != "selfsup.eval.search":
            found.append(f"{where}: faiss belongs to selfsup.eval.search alone")
        if top == "submitit" and me != "launch":
            found.append(f"{where}: submitit belongs to launch/ alone")
        if top == "lightly" and not item.name.startswith(LIGHTLY) and item.name not in ("lightly.models",):
            found.append(f"{where}: of lightly only {', '.join(LIGHTLY)}")
        if top in FRAMEWORKS or top in ("tests", "benchmarks", "eval", "launch"):
            found.append(f"{where}: not in the library")
        if me in NO_TORCH and top in HEAVY and not item.lazy:
            found.append(f"{where}: {me or 'selfsup'} must load without it")
        if me == "losses" and item.name.startswith("torch.distributed"):
            found.append(f"{where}: losses know no process group")
    return found


def test_import_rules():
    every = sources()
    found = [line for name, (tree, package) in every.items() for line in faults(name, tree, package, set(every))]
    assert not found, "\n" + "\n".join(found)


def test_nothing_unsafe():
    """In the library and the benchmarks."""
    benchmarks = {f"benchmarks.{p.stem}": ast.parse(p.read_text()) for p in (ROOT / "benchmarks").rglob("*.py")}
    every = {**{name: tree for name, (tree, _) in sources().items()}, **benchmarks}
    assert len(benchmarks) > 5 and "selfsup.eval.features" in every
    found = [line for name, tree in every.items() for line in unsafe(name, tree)]
    assert not found, "\n" + "\n".join(found)


def test_every_file_has_an_owner():
    names = [p.relative_to(ROOT) for folder in FOLDERS.values() for p in folder.rglob("*.py")]
    assert not [n for n in names if n.name in ("utils.py", "helpers.py", "misc.py", "common.py")]
    assert len(names) > 10


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("selfsup.train", "from selfsup.eval import knn"),
        ("selfsup.train", "def f():\n    import selfsup.launch"),
        ("selfsup.methods.dino", "from ..train import run"),
        ("selfsup.losses.dino", "from selfsup import dist"),
        ("selfsup.losses.dino", "import torch.distributed as d"),
        ("selfsup.data.loader", "from selfsup.backbones import create_backbone"),
        ("selfsup.eval.knn", "import faiss"),
        ("selfsup.eval.knn", "from selfsup.eval.search import search"),
        ("selfsup.eval.knn", "from selfsup.train import run"),
        ("selfsup.train", "import submitit"),
        ("selfsup.cli", "import torch"),
        ("selfsup.cli", "from selfsup.eval import knn"),
        ("selfsup.config", "import timm"),
        ("selfsup.methods.dino", "import lightly"),
        ("selfsup.methods.dino", "from lightly.embedding import embedding"),
        ("selfsup.train", "import pytorch_lightning"),
        ("selfsup.novelty", "import os"),
    ],
)
def test_rules_catch(module: str, source: str):
    assert faults(module, ast.parse(source), False, {*sources(), "selfsup.train"})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("selfsup.cli", "def f():\n    from selfsup.eval import knn\n    import torch"),
        ("selfsup.eval.knn", "from .search import search\nfrom selfsup.data import sources\nimport torch"),
        ("selfsup.eval.search", "import torch\nimport faiss"),
        ("selfsup.methods.dino", "from selfsup.backbones import create_backbone\nfrom lightly.loss import DINOLoss"),
        ("selfsup.launch.cluster", "import submitit\nfrom selfsup.config import Config"),
    ],
)
def test_rules_allow(module: str, source: str):
    assert not faults(module, ast.parse(source), False, set(sources()))


UNSAFE = r"""
import pickle; pickle.load(f) | from pickle import loads | import pickle as p; p.loads(b) | import dill | import shelve
import cloudpickle as c | from joblib import load | import marshal | import pickle; read = pickle
import torch; torch.load(p) | import torch; torch.load(p, weights_only=False) | import torch as t; t.load(p)
from torch import load; load(p) | import torch; read = torch.load | import torch; torch.load(p, weights_only=flag)
import torch.serialization; torch.serialization.load(p) | import torch; torch.jit.load(p) | import torch; torch.hub.load(r, m)
import torch; torch.package.PackageImporter(p) | from torch import hub; hub.load_state_dict_from_url(u)
import torch; torch.serialization.add_safe_globals([C])
import numpy as np; np.load(p) | import numpy as np; np.load(p, allow_pickle=True) | from numpy import load as r; r(p)
import numpy; numpy.lib.format.read_array(f) | import pandas as pd; pd.read_pickle(p)
import yaml; yaml.load(t) | import yaml; yaml.load(t, Loader=yaml.Loader) | import yaml; yaml.unsafe_load(t)
import yaml; yaml.full_load(t) | from yaml import load; load(t) | from yaml import FullLoader | import yaml; yaml.CLoader(t)
import yaml\nclass L(yaml.UnsafeLoader):\n  pass
eval(t) | exec(t) | run = eval | __import__(n)
import subprocess; subprocess.run(c, shell=True) | import os; os.system(c) | from os import popen; popen(c)
from subprocess import getoutput; getoutput(c) | import asyncio as a; a.f(c, shell=x)
import zipfile; zipfile.ZipFile(p).extractall(d) | archive.extract(member) | import shutil; shutil.unpack_archive(p)
with tarfile.open(p) as t:\n  t.extractall(d, filter="data")
from transformers import AutoModel; AutoModel.from_pretrained(n, trust_remote_code=True)
"""
SAFE = r"""
import torch; torch.load(p, weights_only=True) | import torch as t; t.load(p, map_location="cpu", weights_only=True)
import numpy as np; np.load(p, allow_pickle=False) | import numpy as np; np.save(p, a)
import yaml; yaml.safe_load(t) | import yaml; yaml.load(t, Loader=yaml.SafeLoader)
import yaml\nclass L(yaml.SafeLoader):\n  pass
model.eval() | import json; json.load(f) | import pickle\ntry:\n  f()\nexcept pickle.UnpicklingError:\n  pass
from pickle import UnpicklingError | import subprocess; subprocess.run([c], shell=False)
from .features import extract; extract(t) | from . import features; features.extract(t)
from zipfile import ZipFile; ZipFile(p).read(n)
import re; re.compile(t) | model.load(p)
"""


def snippets(text: str) -> list[str]:
    return [part.strip().replace(r"\n", "\n") for line in text.strip().splitlines() for part in line.split("|")]


@pytest.mark.parametrize("source", snippets(UNSAFE))
def test_unsafe_is_caught(source: str):
    assert unsafe("selfsup.x", ast.parse(source))


@pytest.mark.parametrize("source", snippets(SAFE))
def test_safe_is_not(source: str):
    assert not unsafe("selfsup.x", ast.parse(source))


# The child refuses every heavy import, then uses the command line as a person would.
_BLOCKED = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(HEAVY)!r}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
sys.argv = ["selfsup", *sys.argv[1:]]
from selfsup.cli import main
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--help"], 0, "train"),
        (["train", "--help"], 0, "RECIPE"),
        (["recipes", "--names"], 0, "dino_vits16"),
        (["recipes", "demo"], 0, "global_batch"),
        (["train", "demo", "--print-config", "globl_batch=3"], 2, "global_batch"),
    ],
)
def test_cli_needs_no_torch(arguments: list[str], code: int, expected: str):
    done = subprocess.run([sys.executable, "-c", _BLOCKED, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr[-2000:]
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_quick():
    """`selfsup --help` in under a second of processor time, which a busy machine does not change."""
    code = (
        "import resource, subprocess, sys;"
        "subprocess.run([sys.executable, '-m', 'selfsup.cli', '--help'], check=True, stdout=subprocess.DEVNULL);"
        "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    seconds = min(float(run.stdout) for run in runs)
    assert seconds < 1.0
