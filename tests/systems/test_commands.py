"""Each row's commands end well and leave what they say they write."""

import importlib
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import composed
from selfsup import config
from tests.eval.conftest import RUN, unpack
from tests.systems.commands import COMMANDS, SHORT


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What commands are given by name: see `commands`."""
    root = tmp_path_factory.mktemp("systems")
    images, val = unpack(root / "images", 12), unpack(root / "val", 6, start=100)
    (root / "unlabelled").mkdir()
    for path in sorted(images.rglob("*.png")):
        shutil.copy(path, root / "unlabelled" / f"{path.parent.name}_{path.name}")
    composed.build(root / "mixed", 8, 4, size=28)
    train = importlib.import_module("selfsup.train").train
    labelled = [
        f"data={images}",
        f"eval.train={images}",
        f"eval.val={val}",
        "report=false",
        "pictures=false",
        "steps=2",
    ]
    deep = [*RUN, "backbone.depth=4"]  # UNETR joins maps of four depths
    train(config.load(None, [*deep, *labelled]), out=root / "run", quiet=True)
    labelled[2] = f"data.val={val}"
    train(config.load("supervised_demo", [*labelled, "global_batch=16", *SHORT]), out=root / "classifier", quiet=True)
    names = {name: root / name for name in ("images", "val", "unlabelled", "run", "classifier")}
    return {**names, "mixed": root / "mixed" / "train"}


def _rows() -> list:
    return [pytest.param(row, marks=pytest.mark.systems(row), id=row[:40]) for row in COMMANDS]


@pytest.mark.parametrize("row", _rows())
def test_commands(
    row: str,
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from selfsup.cli import main

    monkeypatch.chdir(tmp_path)
    for command in COMMANDS[row]:
        words = shlex.split(command.format(tmp=tmp_path, **places))
        given = {word.split("=")[0] for word in words}
        words += [word for word in SHORT if words[0] == "train" and word.split("=")[0] not in given]
        words += ["workers=0"] if words[0] == "eval" else []
        monkeypatch.setattr(sys, "argv", ["selfsup", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capfd.readouterr()
        assert caught.value.code in (0, None), f"{command}: exit {caught.value.code}\n{said.err[-2000:]}"
        if "--out" in words:
            out = Path(words[words.index("--out") + 1])
            assert out.stat().st_size > 0 if words[0] != "train" else (out / "backbone" / "model.safetensors").is_file()
