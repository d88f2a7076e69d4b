"""The command: exit codes, help without torch, configurations that load, stopping and going on."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from selfsup import methods
from selfsup.config import recipe_names
from selfsup.log import read_metrics
from tests.methods.tiny import METHOD_OPTIONS, TINY_RUN, write_images

TINY = [*TINY_RUN, *METHOD_OPTIONS["dino"], "precision=fp32"]

Command = Callable[..., tuple[int, str, str]]

BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "torchvision", "faiss", "numpy", "matplotlib", "lightly", "submitit"):
            raise ImportError(f"{name} must not be imported here")

sys.meta_path.insert(0, Refuse())
sys.argv = ["selfsup", *sys.argv[1:]]
from selfsup.cli import main
main()
"""


@pytest.fixture
def selfsup(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Call the entry point in this process: (exit code, stdout, stderr)."""
    from selfsup.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["selfsup", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def recipe(tmp_path: Path, images: Path) -> Path:
    """A YAML file of ten tiny steps."""
    from selfsup.config import dump, load

    path = tmp_path / "tiny.yaml"
    path.write_text(dump(load(None, [*TINY, f"data={images}"])))
    return path


# --------------------------------------------------------------------------------------------------------- without torch


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--help"], ["demo", "train", "eval", "export", "recipes"]),
        (["train", "--help"], ["--resume", "--out", "--print-config", "KEY=VALUE"]),
        (["eval", "--help"], ["TARGET", "knn", "linear", "--print-config"]),
        (["export", "--help"], ["--format"]),
        (["demo", "--help"], ["--out"]),
        (["recipes"], ["demo", "dino_vits16", "dino_resnet50"]),
        (["recipes", "--names"], ["demo", "dino_vits16_smalldata"]),
        (["recipes", "demo"], ["backbone"]),
    ],
)
def test_help_where_torch_cannot_be_imported(arguments: list[str], expected: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(word.lower() in done.stdout.lower() for word in expected), done.stdout
    assert done.stderr == ""


def test_bad_overrides_where_torch_cannot_be_imported() -> None:
    """A typing error is answered at once."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "train", "demo", "optimizer.lrr=1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "did you mean optimizer.lr?" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


# --------------------------------------------------------------------------------------------------------------- recipes


def test_recipes(selfsup: Command) -> None:
    code, out, _ = selfsup("recipes")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 4 for line in lines)  # a name and what it is
    _, out, _ = selfsup("recipes", "--names")
    assert out.split() == recipe_names()
    _, out, _ = selfsup("recipes", "--demo", "--names")
    assert out.split() and set(out.split()) <= set(recipe_names()) and "dino_vits16" not in out.split()
    code, out, _ = selfsup("recipes", "demo")
    assert code == 0 and yaml.safe_load(out)["data"]["path"] == "demo"
    code, _, err = selfsup("recipes", "demoo")
    assert code == 2 and "did you mean demo?" in err


# ---------------------------------------------------------------------------------------------------------- print-config


@pytest.mark.parametrize("name", recipe_names())
def test_print_config_is_loadable_and_complete(selfsup: Command, tmp_path: Path, name: str) -> None:
    """What is shown is a recipe of itself: resolved, with the method's options; nothing is written."""
    code, out, _ = selfsup("train", name, "seed=3", "--print-config", "--out", tmp_path / "run")
    assert code == 0 and not (tmp_path / "run").exists()
    values = yaml.safe_load(out)
    assert values["seed"] == 3 and values["precision"] != "auto" and values["device"] != "auto"
    assert values["threads"] >= 1 and values["deterministic"] in (True, False)
    assert set(methods.find(values["method"]["name"]).Options.model_fields) <= values["method"].keys()  # type: ignore[attr-defined]
    path = tmp_path / "shown.yaml"
    path.write_text(out)
    code, again, _ = selfsup("train", path, "--print-config")
    assert code == 0 and again == out


@pytest.mark.parametrize("task", ["knn", "linear"])
def test_print_config_of_an_evaluation(selfsup: Command, task: str) -> None:
    code, out, err = selfsup("eval", task, "pixels", "data=FOLDER", "data.val=OTHER", "--print-config")
    assert code == 0, err
    values = yaml.safe_load(out)
    assert values["seed"] is not None and "FOLDER" in out and "OTHER" in out


def test_print_config_of_the_demo(selfsup: Command) -> None:
    """Any subcommand has it."""
    code, out, err = selfsup("demo", "steps=3", "--print-config")
    assert code == 0, err
    assert yaml.safe_load(out)["steps"] == 3


def test_export_says_how_to_load(selfsup: Command, recipe: Path, tmp_path: Path) -> None:
    """A run's backbone as a folder for timm, with the parity printed: exactly 0."""
    assert selfsup("train", recipe, "stop_at=1", "--out", tmp_path / "run")[0] == 75
    code, out, err = selfsup("export", tmp_path / "run", tmp_path / "out")
    assert code == 0, err
    assert f"local-dir:{tmp_path / 'out'}" in out and out.rstrip().endswith(" 0")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


# ----------------------------------------------------------------------------------------------------- wrong command lines


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["trian", "demo"], "trian"),
        (["train"], "RECIPE"),
        (["train", "demo", "--ouf", "x"], "--ouf"),
        (["train", "demo", "--out"], "--out"),
        (["train", "nonsense"], "nonsense"),
        (["eval", "kn", "pixels"], "did you mean knn?"),
        (["eval", "knn"], "TARGET"),
        (["export", "x", "y", "--format", "onx"], "onx"),
        (["train", "demo", "--resume"], "--out"),
    ],
)
def test_wrong_command_line(selfsup: Command, arguments: list[str], named: str) -> None:
    code, _, err = selfsup(*arguments)
    assert code == 2 and named.lower() in err.lower() and "Traceback" not in err
    assert 1 <= len(err.strip().splitlines()) <= 2, err


# --------------------------------------------------------------------------------------------------------------- running


def test_train_stop_resume_done(selfsup: Command, recipe: Path, tmp_path: Path) -> None:
    """75 at stop_at with the words to go on; 0 at the end; each step once; then a second start is refused."""
    run = tmp_path / "run"
    code, out, err = selfsup("train", recipe, "stop_at=4", "--out", run)
    assert code == 75 and out == ""
    assert "stopped at step 4 of 10" in err and f"--resume --out {run}" in err and "Traceback" not in err
    code, out, err = selfsup("train", recipe, "--out", run, "--resume")
    assert code == 0, err
    assert "resuming at step 4" in err and str(run / "backbone") in out
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, 11))
    code, _, err = selfsup("train", recipe, "--out", run, "--resume")  # nothing left to do
    assert code == 0 and [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, 11))
    code, _, err = selfsup("train", recipe, "--out", run)
    assert code == 2 and "already holds a run" in err
    code, out, err = selfsup("train", run / "config.yaml", "--out", tmp_path / "again")  # the run folder is a recipe
    assert code == 0, err
    losses = [[line["loss"] for line in read_metrics(r / "metrics.jsonl")] for r in (run, tmp_path / "again")]
    assert losses[0] == losses[1]


def test_resume_of_nothing_starts_at_the_beginning(selfsup: Command, recipe: Path, tmp_path: Path) -> None:
    code, _, err = selfsup("train", recipe, "stop_at=2", "--out", tmp_path / "run", "--resume")
    assert code == 75 and "starting at step 0" in err


def test_resume_of_a_stopped_run_by_its_own_config(selfsup: Command, recipe: Path, tmp_path: Path) -> None:
    """`train RUN/config.yaml --resume --out RUN` goes on: the stop of the first start is not a property of the run."""
    run = tmp_path / "run"
    assert selfsup("train", recipe, "stop_at=4", "--out", run)[0] == 75
    code, _, err = selfsup("train", run / "config.yaml", "--out", run, "--resume")
    assert code == 0, err


def test_default_folder(selfsup: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/RECIPE, then runs/RECIPE-2: nothing is overwritten."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert selfsup("train", recipe, "stop_at=1")[0] == 75
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]


def test_a_defect_is_exit_1_with_a_traceback(
    selfsup: Command, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_method.py").write_text(
        "from selfsup.methods.dino import DINO\n\n\nclass Broken(DINO):\n    def views(self):\n        return {}['x']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, _, err = selfsup("train", recipe, "method=broken_method:Broken", "--out", tmp_path / "run")
    assert code == 1 and "Traceback" in err and "KeyError" in err


def test_closed_output_is_no_traceback(tmp_path: Path) -> None:
    """`selfsup train dino_vits16 --print-config | head -1`."""
    command = f"{sys.executable} -m selfsup.cli recipes dino_vits16 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


def test_spinning_threads_are_tamed_before_torch(tmp_path: Path) -> None:
    """GOMP_SPINCOUNT has a default, and a user's own value wins."""
    script = "import os, sys; sys.argv = ['selfsup', 'recipes']\nfrom selfsup.cli import main\n"
    script += "try:\n    main()\nexcept SystemExit:\n    print('spin', os.environ['GOMP_SPINCOUNT'])\n"
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    for given, expected in (({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        done = subprocess.run([sys.executable, "-c", script], env={**env, **given}, capture_output=True, text=True)
        assert re.search(r"spin (\d+)", done.stdout)[1] == expected


@pytest.mark.parametrize("stream", ["1>/dev/full", "2>/dev/full", "1>/dev/full 2>/dev/full", "2>&-"])
def test_an_output_on_a_full_disk_changes_nothing(recipe: Path, tmp_path: Path, stream: str) -> None:
    """The run ends as it would: a scheduler goes by the exit code, which is not 1 and not Python's 120."""
    command = f"{sys.executable} -m selfsup.cli train {recipe} --out {tmp_path / 'run'}"
    for more, code in (("stop_at=5", 75), ("--resume", 0), ("--resume no_such_key=1", 2)):
        assert subprocess.run(f"{command} {more} {stream}", shell=True, timeout=100).returncode == code
    assert (tmp_path / "run" / "backbone" / "model.safetensors").is_file()
