"""The history of a run's jobs: whole lines, whoever writes, whatever was cut off."""

import subprocess
import sys
from pathlib import Path

import pytest

from selfsup.launch import history


def test_append_and_read(tmp_path: Path):
    assert history.read(tmp_path) == []
    history.append(tmp_path, "start", job="12_3", restart=0, task="train", host="n1", world=4, step=0)
    history.append(tmp_path, "end", job="12_3", restart=0, task="train", code=75, why="SIGUSR2 größer", step=7)
    first, second = history.read(tmp_path)
    assert (first["event"], first["job"], first["restart"], first["task"], first["host"]) == (
        "start",
        "12_3",
        0,
        "train",
        "n1",
    )
    assert (second["code"], second["why"]) == (75, "SIGUSR2 größer") and second["time"] >= first["time"] > 0
    assert (tmp_path / history.FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("rest", [b'{"event": "st', b"\xff\xfe", b"[1]\n", b"{}\n", b'"x"\n', b"\0" * 40, b"[" * 9999])
def test_what_a_crash_left_is_passed_over(tmp_path: Path, rest: bytes):
    """And takes no whole line along, before it or after."""
    history.append(tmp_path, "start", job="1", restart=0, task="train")
    with open(tmp_path / history.FILE, "ab") as file:
        file.write(rest)
    history.append(tmp_path, "end", job="1", restart=0, task="train")
    assert [event["event"] for event in history.read(tmp_path)] == ["start", "end"]


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
import history
for n in range(200):
    history.append(sys.argv[2], "start", job=sys.argv[3], restart=n, task="train", text="x" * 200)
"""


def test_several_writers(tmp_path: Path):
    """Processes without this package append at once; no line is lost or mixed."""
    assert history.__file__
    command = [sys.executable, "-c", WRITER, str(Path(history.__file__).parent), str(tmp_path)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    events = history.read(tmp_path)
    for number in range(3):
        assert [event["restart"] for event in events if event["job"] == str(number)] == list(range(200))


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "job").write_text("a file")
    with pytest.raises(OSError):
        history.append(tmp_path, "start", job="1", restart=0, task="train")
    assert history.read(tmp_path) == []
