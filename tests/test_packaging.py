"""The wheel that users install: subpackages, recipes, bundled files, and nothing outside the selfsup namespace."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"selfsup": "selfsup", "eval": "selfsup/eval", "launch": "selfsup/launch"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build/ or egg-info is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("selfsup", "eval", "launch"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(out)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked, as pip does it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_every_module_is_in_the_wheel(installed: Path):
    for source, target in SOURCES.items():
        for path in (ROOT / source).rglob("*.py"):
            assert (installed / target / path.relative_to(ROOT / source)).is_file(), f"{path} is not in the wheel"


def test_every_data_file_is_in_the_wheel(installed: Path):
    kinds = set()
    for source, target in SOURCES.items():
        for path in (p for p in (ROOT / source).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")):
            copy = installed / target / path.relative_to(ROOT / source)
            assert copy.is_file() and copy.stat().st_size == path.stat().st_size, f"{path} is not in the wheel"
            kinds.add(f"{source}: {path.suffix or path.name}")
    assert {"selfsup: .yaml", "selfsup: .zip", "selfsup: LICENSE", "selfsup: .typed", "launch: .yaml"} <= kinds


def test_nothing_else_is_in_the_wheel(installed: Path):
    tops = {p.name for p in installed.iterdir()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"selfsup"}


def test_licence_and_metadata(installed: Path):
    info = next(installed.glob("*.dist-info"))
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert (info / "licenses" / "LICENSE").is_file()
    assert (info / "licenses" / "selfsup" / "data" / "fashion" / "LICENSE").is_file()
    assert "selfsup = selfsup.cli:main" in (info / "entry_points.txt").read_text()


def test_the_wheel_alone_runs(installed: Path, tmp_path: Path):
    """`selfsup.eval` comes from the unpacked wheel, not from the checkout, and its recipes load."""
    code = (
        "import sys, pathlib; here = pathlib.Path(sys.argv[1]); sys.path.insert(0, str(here));"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
        "import selfsup, selfsup.eval, selfsup.launch.cluster, selfsup.config;"
        "modules = (selfsup, selfsup.eval, selfsup.launch);"
        "assert all(here in pathlib.Path(m.__file__).parents for m in modules), modules;"
        "names = selfsup.config.recipe_names(); [selfsup.config.load(n) for n in names]; print(*names);"
        "names = selfsup.launch.cluster.cluster_names(); [selfsup.launch.cluster.load(n) for n in names]; print(*names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(installed)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = {"demo", "dino_vits16", "dino_vits16_smalldata", "dino_resnet50", "local", "slurm"}
    assert expected <= set(done.stdout.split())


def test_eval_and_launch_map_into_the_namespace():
    """In the checkout too, and no top-level module `eval` or `launch` appears in anyone's environment."""
    import selfsup.eval
    import selfsup.launch

    assert Path(selfsup.eval.__file__) == ROOT / "eval" / "__init__.py"
    assert Path(selfsup.launch.__file__) == ROOT / "launch" / "__init__.py"
    code = "import importlib.util as u; print([n for n in ('eval', 'launch') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_packages_are_all_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for source, target in SOURCES.items():
        for path in (ROOT / source).rglob("__init__.py"):
            found.add(".".join([*Path(target).parts, *path.parent.relative_to(ROOT / source).parts]))
    assert listed == found


def test_lower_bounds_not_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    assert not [d for d in every if "==" in d or "<" in d or "~=" in d]


def test_constraints_are_exact_and_cover_the_dependencies():
    lines = [x for x in (ROOT / "tests" / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", x) for x in lines)
    pinned = {re.sub(r"[-_.]+", "-", x.partition("==")[0]).lower() for x in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    wanted = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=! ]", d)[0]).lower() for d in every} - {"selfsup"}
    assert wanted <= pinned, wanted - pinned
