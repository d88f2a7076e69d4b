"""Run folders, checkpoints and weights that something happened to: found valid, passed over, or refused in words.

The folder is that of tests/fixtures/format_1: five steps of a tiny run.
"""

import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import selfsup
from selfsup import checkpoint, runfolder, status
from selfsup.checkpoint import InvalidCheckpoint
from selfsup.config import load
from selfsup.errors import EarlyStop
from selfsup.launch.status import describe
from selfsup.log import last_step, read_metrics
from tests.fuzz.cases import Edit, check_message, digest, edits, fuzz, told

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "format_1"
FOLDER = FIXTURE / "checkpoints" / "step_00000005"
STEP = f"checkpoints/{FOLDER.name}"
PARTS = [f"{STEP}/{p.name}" for p in sorted(FOLDER.iterdir())]
FILES = [*PARTS, *PARTS, "checkpoints/latest", "config.yaml", "metrics.jsonl"]
TENSORS = ["model", "optimizer", "rank_00000"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@contextmanager
def copy(place: Path) -> Iterator[Path]:
    """A run folder for one case."""
    outer = Path(tempfile.mkdtemp(dir=place))
    try:
        yield Path(shutil.copytree(FIXTURE, outer / "run"))
    finally:
        shutil.rmtree(outer)


# ------------------------------------------------------------------------------------------------ what happened to files

OTHERS = ["step_00000004", "step_00000006", "step_99999999999999999999999", "step_5", "step_-0000005", "latest",
          ".tmp-x",
          "step_00000007.png", "\udcff", "step_00000005 ", "STEP_00000005",
          "step_٠٠٠٠٠٠٠٥", "step_000000005", "step_00000005\n", "step_0000000²"]  # fmt: skip
HAPPENED = st.tuples(
    st.sampled_from(["edit", "edit", "edit", "json", "json", "delete", "empty", "swap", "copy", "rename", "folder",
                     "link",
                     "loop", "zeros", "long"]),
    st.sampled_from(FILES),
    st.sampled_from([*FILES, *OTHERS]),
    edits(),
)  # fmt: skip
JSON = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -1, 5, 99, 10**30, 0.5, math.nan, math.inf, "", "1", "x", "a\nb\nc",
                     "../x", "\0",
                     "/etc/passwd", "\ud800", "model.safetensors", "MANIFEST.json", "ok"]),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


def happen(run: Path, kind: str, name: str, other: str, edit: Edit) -> None:
    path = run / name
    target = run / other if "/" in other or (run / other).exists() else path.with_name(other)
    if not path.exists():
        return
    match kind:
        case "edit" if path.is_file():
            path.write_bytes(edit(path.read_bytes()))
        case "json" if path.is_file():
            path.write_text(changed(path.read_text(errors="replace"), edit.seed))
        case "delete":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        case "empty" if path.is_file():
            path.write_bytes(b"")
        case "swap" if path.is_file() and target.is_file() and path != target:
            a, b = path.read_bytes(), target.read_bytes()
            path.write_bytes(b)
            target.write_bytes(a)
        case "copy" if path.is_file() and target.parent.is_dir() and not target.is_dir() and not target.is_symlink():
            target.write_bytes(path.read_bytes())
        case "rename":
            folder = run / STEP
            if folder.is_dir() and "/" not in other and not folder.with_name(other).exists():
                folder.rename(folder.with_name(other))
        case "folder" if path.is_file():
            path.unlink()
            path.mkdir()
        case "link" if path.is_file():
            path.unlink()
            path.symlink_to(target)
        case "loop" if path.is_file():
            path.unlink()
            path.symlink_to(path.name)
        case "zeros" if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
        case "long" if path.is_file():
            path.write_bytes(path.read_bytes() + bytes(edit.seed % 100_000))


def changed(text: str, seed: int) -> str:
    """JSON of which one value or key became another; text that is no JSON becomes such."""
    rng = random.Random(seed)
    value = rng.choice(
        [None, True, 0, -1, 10**30, 0.5, math.nan, "", "x", "a\nb\nc", "../x", "\0", [], {}, [1], {"x": 1}, "9" * 5000]
    )
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return rng.choice(["[" * 100_000, "{}", "[]", "null", '{"format": 1}', "9" * 5000, '"\\ud800"', "NaN"])
    places: list[tuple[Any, Any]] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
        places += [(node, key) for key in keys]
        stack += [node[key] for key in keys]
    if places:
        node, key = rng.choice(places)
        if rng.random() < 0.2 and isinstance(node, dict):
            node[str(value)] = node.pop(key)
        elif rng.random() < 0.2:
            del node[key]
        else:
            node[key] = value
    return json.dumps(tree)


@fuzz(600, happened=st.lists(HAPPENED, min_size=1, max_size=4))
def test_what_is_looked_at(place: Path, happened) -> None:
    """Verifying, describing and reading change nothing, raise nothing else, and believe no damaged file."""
    with copy(place) as run:
        for what in happened:
            happen(run, *what)
        before = digest(run)
        root = run / "checkpoints"
        found, problems = None, []
        with told():
            found, problems = checkpoint.newest_valid(root)
        for problem in problems:
            check_message(problem)
        for _, folder in checkpoint.steps(root):
            try:
                manifest = checkpoint.verify(folder)
            except InvalidCheckpoint as error:
                check_message(str(error))
                continue
            for name in ("model.safetensors", "optimizer.safetensors", "trainer.json"):
                assert checkpoint.sha256(folder / name) == manifest["files"][name]["sha256"]
        if found is not None:
            with told():
                checkpoint.load(found, 0)
        with told():
            status.verify(run)
        with told():
            assert [each.state for each in describe([run])] != ["running"]
        with told():
            runfolder.stored_config(run)
        with told():
            last_step(run / "metrics.jsonl")
            read_metrics(run / "metrics.jsonl")
        assert digest(run) == before


@fuzz(250, happened=st.lists(HAPPENED, min_size=1, max_size=3), branch=st.sampled_from(["", "@student", "@teacher"]))
def test_what_is_evaluated(place: Path, happened, branch: str) -> None:
    """`selfsup eval knn RUN` and `selfsup export RUN` begin with load_backbone."""
    with copy(place) as run:
        for what in happened:
            happen(run, *what)
        before = digest(run)
        for target in (f"{run}{branch}", str(run / STEP), str(run / STEP / "model.safetensors")):
            with told():
                selfsup.load_backbone(target)
        assert digest(run) == before


# ------------------------------------------------------------------------------------------- true digests, strange content


@dataclass(frozen=True)
class Tensors:
    """One change to the tensors of a file."""

    seed: int

    def __call__(self, path: Path) -> None:
        rng, tensors = random.Random(self.seed), load_file(path)
        name = rng.choice(sorted(tensors))
        old = tensors[name]
        match rng.randrange(9):
            case 0:
                del tensors[name]
            case 1:
                strange = ["x", "", "student.x", "teacher.backbone.model.x", "nobody|exp_avg", "|", "rng.torch"]
                tensors[rng.choice(strange)] = old
            case 2:
                tensors[name] = old.flatten()[: rng.randrange(old.numel() + 1)].clone()
            case 3:
                tensors[name] = torch.zeros([rng.randrange(1, 4) for _ in range(rng.randrange(5))])
            case 4:
                tensors[name] = old.to(
                    rng.choice([torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.uint8])
                )
            case 5 if old.is_floating_point():
                tensors[name] = torch.full_like(old, rng.choice([math.nan, math.inf, 1e38, 0.0]))
            case 6:
                other = rng.choice(sorted(tensors))
                tensors[name], tensors[other] = tensors[other], tensors[name]
            case 7:
                tensors = {f"module.{k}": v for k, v in tensors.items()}
            case 8:
                tensors = {}
        save_file({k: v.clone() for k, v in tensors.items()}, path)


def make_true(folder: Path) -> None:
    """A manifest that vouches for the files as they are."""
    manifest = json.loads((FOLDER / "MANIFEST.json").read_text())
    files = [folder / name for name in manifest["files"] if (folder / name).is_file()]
    manifest["files"] = {p.name: {"bytes": p.stat().st_size, "sha256": checkpoint.sha256(p)} for p in files}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


WEIGHTS = st.one_of(
    st.builds(Tensors, st.integers(0, 2**32)),
    edits(),
    st.tuples(st.sampled_from(["keys", "value"]), st.integers(0, 2**32)),
)


@fuzz(50, name=st.sampled_from(TENSORS), change=st.one_of(st.builds(Tensors, st.integers(0, 2**32)), edits()),
      trainer=st.one_of(st.none(), st.none(), st.integers(0, 2**32)))  # fmt: skip
def test_what_is_resumed(place: Path, name: str, change: Tensors | Edit, trainer: int | None) -> None:
    """Files with right digests that are not what a run writes: training goes on, or says why not and changes nothing."""
    with copy(place) as run:
        folder = run / STEP
        path = folder / f"{name}.safetensors"
        if isinstance(change, Edit):
            path.write_bytes(change(path.read_bytes()))
        else:
            change(path)
        if trainer is not None:
            (folder / "trainer.json").write_text(changed((folder / "trainer.json").read_text(), trainer))
        make_true(folder)
        before = digest(folder)
        with told(60):
            try:
                selfsup.train(load(str(run / "config.yaml"), ["stop_at=6"]), out=run, resume=True, quiet=True)
            except EarlyStop:
                return  # went on; the checkpoint may be pruned by now
        assert digest(folder) == before


# ------------------------------------------------------------------------------------------------------ weights of others


@fuzz(
    150,
    suffix=st.sampled_from([".pth", ".pt", ".safetensors", ".bin"]),
    edit=st.one_of(st.none(), edits()),
    change=JSON,
    nested=st.booleans(),
)
def test_weights(place: Path, suffix: str, edit: Edit | None, change: Any, nested: bool) -> None:
    """Files of torch and of safetensors, whole and damaged, with whatever is in them."""
    tensors = {k.removeprefix("teacher.backbone.model."): v for k, v in load_file(FOLDER / "model.safetensors").items()
               if k.startswith("teacher.backbone.model.")}  # fmt: skip
    outer = Path(tempfile.mkdtemp(dir=place))
    path = outer / f"weights{suffix}"
    try:
        if suffix == ".safetensors":
            save_file({k: v.clone() for k, v in tensors.items()}, path)
        else:
            content: Any = {**tensors, "extra": change}
            torch.save({"teacher": content, "epoch": 3} if nested else content, path)
        if edit is not None:
            path.write_bytes(edit(path.read_bytes()))
        before = digest(outer)
        with told():
            selfsup.load_backbone(path, num_heads=2)
        with told():
            selfsup.load_backbone(path, name="vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=1,
                                  num_heads=2, in_chans=1)  # fmt: skip
        assert digest(outer) == before
    finally:
        shutil.rmtree(outer)


@pytest.fixture(scope="module")
def exported(place: Path) -> Path:
    from selfsup.backbones.export import export_timm

    export_timm(selfsup.load_backbone(FIXTURE), place / "exported")
    return place / "exported"


@fuzz(
    200,
    seed=st.integers(0, 2**32),
    edit=st.one_of(st.none(), st.none(), edits()),
    weights=st.one_of(st.none(), edits()),
)
def test_exported_folders(place: Path, exported: Path, seed: int, edit: Edit | None, weights: Edit | None) -> None:
    outer = Path(tempfile.mkdtemp(dir=place))
    try:
        run = Path(shutil.copytree(exported, outer / "backbone"))
        config = run / "config.json"
        config.write_text(changed(config.read_text(), seed))
        if edit is not None:
            config.write_bytes(edit(config.read_bytes()))
        if weights is not None:
            path = run / "model.safetensors"
            path.write_bytes(weights(path.read_bytes()))
        before = digest(outer)
        with told():
            selfsup.load_backbone(run)
        assert digest(outer) == before
    finally:
        shutil.rmtree(outer)


def test_the_fixture_itself_is_good(place: Path) -> None:
    """Or nothing here would be near a good one."""
    with copy(place) as run:
        make_true(run / STEP)
        assert checkpoint.newest_valid(run / "checkpoints") == (run / STEP, [])
        selfsup.load_backbone(run)
        with pytest.raises(EarlyStop):
            selfsup.train(load(str(run / "config.yaml"), ["stop_at=6"]), out=run, resume=True, quiet=True)
