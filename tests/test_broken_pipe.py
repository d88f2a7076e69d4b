"""`selfsup VERB | head -1`: a verb whose reader has gone ends without a word, and never with a traceback or exit 1."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import selfsup
from tests.methods.tiny import tiny_config, write_images


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run and its images."""
    folder = tmp_path_factory.mktemp("pipe")
    images = write_images(folder / "images", classes=2)
    config = tiny_config("dino", f"data={images}", "precision=fp32", "steps=2")
    selfsup.train(config, out=folder / "run", quiet=True)
    return {"RUN": str(folder / "run"), "IMAGES": str(images), "OUT": str(folder / "out")}


def unread(*arguments: str) -> tuple[int, str]:
    """(exit code, stderr) with a pipe for stdout whose other end is closed from the beginning."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "selfsup.cli", *arguments]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300)
    finally:
        os.close(writer)
    return done.returncode, done.stderr


VERBS = [
    "--help",
    "recipes dino_vits16",
    "train demo --print-config",
    "eval knn RUN data=IMAGES workers=0",
    "doctor IMAGES",
    "health RUN",
    "status RUN",
    *(
        pytest.param(verb, marks=pytest.mark.slow)
        for verb in (
            "demo --print-config",
            "eval knn RUN --print-config",
            "export RUN OUT",
            "doctor IMAGES --json",
            "health RUN --json",
            "status RUN --json --verify",
            "submit demo --cluster local --dry-run --out OUT",
        )
    ),
]


@pytest.mark.parametrize("verb", VERBS)
def test_nobody_reads(places: dict[str, str], verb: str) -> None:
    words = [places.get(word, word.replace("IMAGES", places["IMAGES"])) for word in verb.split()]
    code, err = unread(*words)
    assert code in (0, 141), err
    assert "Traceback" not in err and "BrokenPipe" not in err and "Errno" not in err and "Exception ignored" not in err
    if verb.startswith("eval knn RUN data"):  # what was measured is kept
        assert (Path(places["RUN"]) / "eval" / "knn.json").is_file()
    if verb.startswith("export"):
        assert (Path(places["OUT"]) / "model.safetensors").is_file()


def test_head_closes_it() -> None:
    """A real `head`, which reads a line first, of more than a pipe holds."""
    command = f"{sys.executable} -m selfsup.cli recipes | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[1] in ("0", "141") and done.stderr == ""


def test_a_pipe_that_breaks_elsewhere_is_a_defect(tmp_path: Path) -> None:
    """As between processes, while stdout and stderr are read: exit 1, with the traceback."""
    lines = (
        "from selfsup.methods.dino import DINO",
        "class Broken(DINO):",
        "    def views(self):",
        "        raise BrokenPipeError(32, 'x')",
    )
    (tmp_path / "broken_method.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "selfsup.cli", "train", "demo", "method=broken_method:Broken", "steps=1"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "BrokenPipeError" in done.stderr
