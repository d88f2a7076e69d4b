"""The copy of the program that jobs run: complete, alone, and deaf to what is edited afterwards."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfsup.config import Config, load
from selfsup.errors import UserError
from selfsup.launch import snapshot

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"selfsup": ROOT / "selfsup", "selfsup/eval": ROOT / "eval", "selfsup/launch": ROOT / "launch"}

WHERE = """
import sys, selfsup, selfsup.cli, selfsup.eval.settings, selfsup.launch.cluster, selfsup.launch.commands, selfsup.config
print(*(m.__file__ for n, m in sorted(sys.modules.items()) if n.split(".")[0] == "selfsup"), sep="\\n")
selfsup.config.load("demo"), selfsup.launch.cluster.load("local")
"""


def python(code: Path, program: str, cwd: Path = ROOT, **env: str) -> str:
    """The output of a program that runs as a job's does."""
    command = ["env", f"PYTHONPATH={code}", sys.executable, "-P", "-c", program]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def method(name: str) -> Config:
    """A configuration with this method."""
    return load("demo", [f"method={name}"])


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot in a folder whose name has a space and letters that are not ASCII."""
    folder = tmp_path_factory.mktemp("größer, 走る")
    snapshot.take(folder, None)
    return folder


def test_complete(taken: Path):
    """Every source and every file of package data; no caches, no tests."""
    expected = {}
    for target, source in SOURCES.items():
        for path in source.rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                expected[taken / "code" / target / path.relative_to(source)] = path
    found = [path for path in (taken / "code").rglob("*") if path.is_file()]
    assert sorted(found) == sorted(expected)
    assert all(copy.read_bytes() == path.read_bytes() for copy, path in expected.items())
    kinds = {path.suffix or path.name for path in found}
    assert kinds == {".py", ".yaml", ".zip", ".typed", ".css", ".js", ".json", ".safetensors", "LICENSE"}
    assert [path.name for path in taken.iterdir()] == ["code"]


def test_imported_from_the_snapshot_alone(taken: Path):
    """In a clone whose editable install is active, from its root, where a folder `selfsup` lies."""
    assert (ROOT / "selfsup").is_dir()
    files = python(taken / "code", WHERE).split("\n")[:-1]
    assert len(files) > 10
    assert [file for file in files if not file.startswith(str(taken / "code" / "selfsup"))] == []


def test_a_snapshot_of_a_snapshot(taken: Path, tmp_path: Path):
    """As from an installed package, where eval and launch lie within it."""
    program = "from pathlib import Path; from selfsup.launch import snapshot;"
    program += f"print(snapshot.take(Path({str(tmp_path)!r}), None))"
    assert python(taken / "code", program).strip() == snapshot.take(taken, None)
    names = [sorted(p.relative_to(f) for p in (f / "code").rglob("*.py")) for f in (taken, tmp_path)]
    assert names[0] == names[1]


def test_edited_afterwards(taken: Path, tmp_path: Path):
    """The copy stays as it was; the next one is another, and takes the place of the first."""
    clone = tmp_path / "clone"
    first = snapshot.take(clone, None)
    program = (
        "import selfsup.errors; from pathlib import Path; from selfsup.launch import snapshot;"
        f"print(getattr(selfsup.errors, 'EDITED', 0), snapshot.take(Path({str(tmp_path / 'run')!r}), None))"
    )
    assert python(clone / "code", program).split() == ["0", first]
    with open(clone / "code/selfsup/errors.py", "a") as file:
        file.write("EDITED = 1\n")
    (clone / "code/selfsup/dist.py").rename(clone / "code/selfsup/distributed.py")
    show = "import selfsup.errors; print(getattr(selfsup.errors, 'EDITED', 0))"
    assert python(tmp_path / "run/code", show) == "0\n"
    edited, second = python(clone / "code", program).split()
    assert edited == "1" and second != first
    assert python(tmp_path / "run/code", show) == "1\n"
    assert not (tmp_path / "run/code/selfsup/dist.py").exists()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["code"]


def test_method_in_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Copied without being imported, alone of what lies beside it."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work/mine_alone.py").write_text("raise SystemExit('imported')")
    (tmp_path / "work/other.py").write_text("")
    monkeypatch.chdir(tmp_path / "work")
    digest = snapshot.take(tmp_path / "run", method("mine_alone:M"))
    assert sorted(p.name for p in (tmp_path / "run/code").iterdir()) == ["mine_alone.py", "selfsup"]
    (tmp_path / "work/mine_alone.py").write_text("print('edited')")
    assert snapshot.take(tmp_path / "again", method("mine_alone:M")) != digest
    assert python(tmp_path / "again/code", "import mine_alone", cwd=tmp_path) == "edited\n"
    (tmp_path / "work/mine_alone.py").write_text("print('edited again')")
    assert python(tmp_path / "again/code", "import mine_alone", cwd=tmp_path / "work") == "edited\n"


@pytest.mark.parametrize("init", [True, False])
def test_method_in_a_package_of_pythonpath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: bool):
    """With its data, without caches; also one that has no __init__.py."""
    package = tmp_path / f"lib/my_pack_{init}"
    for name in ("methods/deep.py", "tables/t.csv", ".git/config", "methods/__pycache__/deep.pyc"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("")
    (package / "methods/deep.py").write_text("print('deep')")
    if init:
        (package / "__init__.py").write_text("")
    (package / "loop").symlink_to(package)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    snapshot.take(tmp_path / "run", method(f"{package.name}.methods.deep:M"))
    copied = tmp_path / "run/code" / package.name
    expected = {"methods/deep.py", "tables/t.csv", *(["__init__.py"] if init else [])}
    assert {str(p.relative_to(copied)) for p in copied.rglob("*") if p.is_file()} == expected
    assert python(tmp_path / "run/code", f"import {package.name}.methods.deep") == "deep\n"


@pytest.mark.parametrize("name", ["dino", "selfsup.methods.dino:DINO", "timm.models:X", "json:X", "sys:X"])
def test_what_is_installed_is_not_copied(name: str, tmp_path: Path):
    snapshot.take(tmp_path, method(name))
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["selfsup"]


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"method\.name='nowhere_at_all\.x:M': no module 'nowhere_at_all'"):
        snapshot.take(tmp_path / "run", method("nowhere_at_all.x:M"))
    data = tmp_path / "with_data"
    data.mkdir()
    with open(data / "large.bin", "wb") as file:
        file.truncate(300_000_000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="keep data and runs outside") as caught:
        snapshot.take(tmp_path / "run", method("with_data.m:M"))
    assert str(data) in str(caught.value) and not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the code cannot be copied"):
        snapshot.take(tmp_path / "file", None)
    assert (tmp_path / "file").read_text() == ""
