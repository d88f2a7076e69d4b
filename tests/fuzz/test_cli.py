"""Whole commands with one thing or another wrong: exit code 0 or 2, two lines on stderr, no traceback, nothing overwritten."""

import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from selfsup.cli import main
from selfsup.config import dump, load
from selfsup.launch.state import STATES
from tests.fuzz.cases import Edit, check_message, digest, edits, fuzz
from tests.fuzz.test_checkpoints import FIXTURE, HAPPENED, happen
from tests.launch.written_runs import ended, forgetful, no_slurm, submitted
from tests.launch.written_runs import happened as happening
from tests.methods.tiny import METHOD_OPTIONS, TINY_RUN, write_images

__all__ = ["forgetful", "no_slurm"]

SHORT = ["steps=1", "workers=0", "threads=1", "device=cpu", "precision=fp32", "tensorboard=false", "eval.every=null"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, images, and things that are neither."""
    root = tmp_path_factory.mktemp("cli")
    write_images(root / "images", count=10)
    (root / "empty").mkdir()
    (root / "file").write_text("text")
    (root / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
    (root / "bad.yaml").write_text("steps: [\n")
    (root / "names.txt").write_text("images/image_000.png\nnothing.png\n")
    os.mkfifo(root / "pipe.zip")
    config = load(None, [*TINY_RUN, *METHOD_OPTIONS["dino"], f"data={root / 'images'}", *SHORT])
    (root / "tiny.yaml").write_text(dump(config))
    return root


@contextmanager
def folder(place: Path) -> Iterator[Path]:
    """The current directory of one case, with a finished run in it; what lies beside it must not change."""
    before, beside = os.getcwd(), digest(place)
    outer = Path(tempfile.mkdtemp())
    shutil.copytree(FIXTURE, outer / "run")
    (outer / "file").write_text("mine")
    os.chdir(outer)
    try:
        yield outer
        assert digest(place) == beside and (outer / "file").read_text() == "mine"
    finally:
        os.chdir(before)
        shutil.rmtree(outer)


def command(arguments: list[str]) -> tuple[int, str, str]:
    """(exit code, stderr, stdout) of `selfsup ...`, in this process."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    argv, out, err = sys.argv, io.BytesIO(), io.BytesIO()
    sys.argv = ["selfsup", *arguments]
    told = io.TextIOWrapper(err, "utf-8", errors="backslashreplace", write_through=True)  # as Python's own
    shown = io.TextIOWrapper(out, "utf-8", errors="surrogateescape", write_through=True)
    try:
        with redirect_stdout(shown), redirect_stderr(told):
            main()
    except SystemExit as end:
        return int(end.code or 0), err.getvalue().decode(), out.getvalue().decode(errors="replace")
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError("main returned")


def check(arguments: list[str]) -> int:
    code, err, _ = command(arguments)
    assert code in (0, 2), f"exit code {code}\n{err}"
    assert "Traceback" not in err, err
    if code == 2:
        check_message(err[err.index("selfsup: ") :])
    return code


def kept(before: dict[str, tuple[Any, ...]], here: Path) -> bool:
    """Whether nothing was removed or changed; a lock or a new folder may have come."""
    after = digest(here)
    return {path: after.get(path) for path in before} == before


WORDS = ["", "-", "--", "--out", "--help", "-h", "--resume", "--nonsense", "=", "a=b", "steps=1", "demo", "train",
         "run", "file",
         "a\nb\nc", "\x1b[2J", "-1", "9" * 400, "run@student", "run@nobody", "pixels", "random:run", "random:", "knn",
         "linear",
         "recipes", "/dev/null", "/nonexistent/x", ".", "run/checkpoints", "run/checkpoints/step_00000005",
         "é" * 300]  # fmt: skip
VERBS = ["train", "eval", "export", "recipes", "status", "replay", "demo", "trian", "submit", "logs", "cancel"]
LOOK = {verb: ["--print-config"] for verb in ("train", "eval", "demo")} | {"submit": ["--dry-run"]}


@fuzz(
    60, verb=st.sampled_from(VERBS), words=st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=6)), max_size=3)
)
def test_words(place: Path, verb: str, words: list[str]) -> None:
    with folder(place) as here:
        before = digest(here)
        check([verb, *words, *LOOK.get(verb, [])])
        if verb != "export":
            assert digest(here) == before


DATA = [
    "images",
    "empty",
    "file",
    "bad.zip",
    "pipe.zip",
    "names.txt",
    "nothing",
    "images/image_000.png",
    "tiny.yaml",
    "",
]
OUTS = ["new", "new", "run", "file", "file/x", "/proc/x", "", "a\nb\nc", "x/y/z", "run/config.yaml"]
ODD = ["views.global.size=36", "global_batch=64", "backbone=no_such", "backbone.depth=[1]", "method=nobody",
       "method.out_dim=0",
       "data.mean=[0.5]", "optimizer=lars", "init_from=run", "init_from=nothing", "precision=fp16",
       "backbone.in_chans=1"]  # fmt: skip


@fuzz(60, recipe=st.sampled_from(["tiny.yaml", "tiny.yaml", "tiny.yaml", "bad.yaml", "demo", "images"]),
      data=st.sampled_from(DATA),
      out=st.sampled_from(OUTS), odd=st.lists(st.sampled_from(ODD), max_size=1), resume=st.booleans())  # fmt: skip
def test_train(place: Path, recipe: str, data: str, out: str, odd: list[str], resume: bool) -> None:
    with folder(place) as here:
        before = digest(here)
        name = recipe if recipe == "demo" else str(place / recipe)
        arguments = [
            name,
            f"data={place / data if data else ''}",
            *odd,
            *SHORT,
            "--out",
            out,
            *(["--resume"] if resume else []),
        ]
        code = check(["train", *arguments])
        assert kept(before, here)  # the run too: it is another configuration's, and never gone on with
        if code == 0:
            assert (here / out / "backbone" / "config.json").is_file()


@fuzz(40, happened=st.lists(HAPPENED, max_size=2), verb=st.sampled_from(["train", "export", "status", "eval"]))
def test_run_folders(place: Path, happened, verb: str) -> None:
    """That something happened to, given to every verb that takes one."""
    with folder(place) as here:
        for what in happened:
            happen(here / "run", *what)
        before = digest(here)
        if verb == "train":
            check(["train", "run/config.yaml", "stop_at=null", "--out", "run", "--resume"])
            return
        check({"export": ["export", "run", "out"], "status": ["status", "run", "--verify"],
               "eval": ["eval", "knn", "run", "data=demo:val", "max_train=50", "max_val=20", "workers=0", "cache=false",
                        "device=cpu", "--out", "knn.json"]}[verb])  # fmt: skip
        assert kept(before, here)


JOBS = {
    "status": ["status", "run", "--json"],
    "logs": ["logs", "run"],
    "cancel": ["cancel", "run"],
    "submit": ["submit", "run/config.yaml", "--out", "run", "--resume", "--dry-run"],
}


@fuzz(60, happened=st.lists(st.tuples(st.sampled_from(["submission.json", "history.jsonl", "outcome.json"]), edits()),
                            min_size=1, max_size=2), verb=st.sampled_from([*JOBS]))  # fmt: skip
def test_what_tells_of_a_job(place: Path, no_slurm: None, happened: list[tuple[str, Edit]], verb: str) -> None:
    """Damaged, and no Slurm that knows better: the state is still one of six, and JSON is JSON."""
    with folder(place) as here:
        run = happening(ended(submitted(here / "run", "12"), "12", 75), "12", "start", "end", "requeue", code=75)
        for name, edit in happened:
            file = run / "job" / name
            file.write_bytes(edit(file.read_bytes()))
        before = digest(here)
        code, err, out = command(JOBS[verb])
        assert code in (0, 2) and "Traceback" not in err, err
        if code == 2:
            check_message(err[err.index("selfsup: ") :])
        if verb == "status":
            (told,) = json.loads(out, parse_constant=int)  # NaN is none
            assert told["state"] in STATES and told["run"] == "run"
        assert verb == "cancel" or kept(before, here)


@fuzz(15, edit=edits())
def test_recipes(place: Path, edit: Edit) -> None:
    with folder(place) as here:
        (here / "mine.yaml").write_bytes(edit((place / "tiny.yaml").read_bytes()))
        before = digest(here)
        check(["train", "mine.yaml", "--print-config"])
        assert digest(here) == before


def test_good_commands_do_something(place: Path) -> None:
    """Or nothing above would be near one."""
    with folder(place) as here:
        assert check(["train", str(place / "tiny.yaml"), "--out", "new"]) == 0
        assert check(["status", "run", "--verify"]) == 0 and check(["export", "run", "out"]) == 0
        assert check(["train", "run/config.yaml", "--out", "run", "--resume"]) == 0
        assert yaml.safe_load((here / "new" / "config.yaml").read_text())["steps"] == 1
