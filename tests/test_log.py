"""metrics.jsonl holds each step once whatever happened; progress is readable on a terminal and in a file."""

import contextlib
import io
import json
import math
import time
from pathlib import Path

import pytest

from selfsup.log import MetricsLog, Progress, TensorBoard, duration, last_step, read_metrics


def write(path: Path, steps: range, resume: int = 0, extra: str = "") -> None:
    log = MetricsLog(path, resume)
    log.write([{"step": s, "loss": 1.0 / s, "note": extra} for s in steps])
    log.close()


def found(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_each_step_once_after_a_kill(tmp_path: Path) -> None:
    """Killed past its checkpoint of step 6, in the middle of a line; resumed at 6; killed again; resumed at 8."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 11))
    with open(path, "ab") as file:
        file.write(b'{"step": 11, "lo')
    write(path, range(7, 12), resume=6, extra="second")
    assert found(path) == list(range(1, 12))
    with open(path, "ab") as file:
        file.write(b'{"step": 12}')  # whole, but without its end of line: it may be the half of a longer one
    write(path, range(9, 13), resume=8, extra="third")
    assert found(path) == list(range(1, 13))
    assert [line["note"] for line in read_metrics(path)] == [""] * 6 + ["second"] * 2 + ["third"] * 4
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_cut_anywhere(tmp_path: Path, cut: int) -> None:
    """Whatever byte a crash ended the file at, a resume at the last whole step has each step once."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    path.write_bytes(path.read_bytes()[:cut])
    whole = path.read_bytes().count(b"\n")
    assert found(path)[:whole] == list(range(1, whole + 1))
    write(path, range(whole + 1, 8), resume=whole)
    assert found(path) == list(range(1, 8))


def test_garbage_in_the_middle(tmp_path: Path) -> None:
    """Lines after one that cannot be read are not trusted."""
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    with open(path, "ab") as file:
        file.write(b"\x00\x00\x00\n" + json.dumps({"step": 4}).encode() + b"\n")
    write(path, range(4, 6), resume=5)
    assert found(path) == [1, 2, 3, 4, 5]


def test_fresh_start_over_an_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, range(1, 3), resume=0)
    assert found(path) == [1, 2]


def test_lines_are_on_disk_when_synced_and_are_json(tmp_path: Path) -> None:
    """Infinity and NaN are no JSON: they become text, at any depth. Other readers can read each line."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    log.write([{"step": 1, "loss": math.nan, "health": {"kl": -math.inf, "state": "ok"}}])
    log.sync()
    line = json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert line == {"step": 1, "loss": "nan", "health": {"kl": "-inf", "state": "ok"}}
    log.close()


def test_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []


# -------------------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_in_a_file_is_whole_lines() -> None:
    """The first, then one every 50 steps, and the last; no carriage returns."""
    stream = io.StringIO()
    progress = Progress(200, 0, every=50, stream=stream)
    for step in range(10, 201, 10):
        progress.show(step, f"loss {step}", last=step == 200)
    text = stream.getvalue()
    assert "\r" not in text and text.endswith("\n")
    assert [line.split()[1] for line in text.splitlines()] == ["10/200", "60/200", "110/200", "160/200", "200/200"]
    assert all("eta" in line for line in text.splitlines())


def test_progress_on_a_terminal_is_one_line() -> None:
    stream = Terminal()
    progress = Progress(20, 0, stream=stream)
    progress.show(10, "a long text with figures")
    progress.show(20, "short", last=True)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.count("\r") == 2
    first, second = text.rstrip("\n").split("\r")[1:]
    assert len(second) >= len(first)  # nothing of the longer line stays


def test_notes_do_not_stick_to_the_progress_line() -> None:
    stream = Terminal()
    progress = Progress(20, 0, stream=stream)
    progress.show(10, "figures")
    progress.note("something happened")
    assert stream.getvalue().endswith("\rsomething happened\n")


def test_silent_ranks() -> None:
    stream = io.StringIO()
    progress = Progress(20, 0, stream=stream, enabled=False)
    progress.show(10, "x", last=True)
    progress.note("y")
    assert stream.getvalue() == ""


def test_eta_of_a_resumed_run_counts_its_own_steps() -> None:
    """Resumed at step 900 of 1,000 and just begun: minutes to go, not a tenth of what was done before."""
    stream = io.StringIO()
    progress = Progress(1000, 900, stream=stream)
    progress._began -= 100  # 10 steps took 100 seconds
    progress.show(910, "x")
    assert "eta 15:00" in stream.getvalue()


def test_duration() -> None:
    assert [duration(s) for s in (0, 3.4, 63, 3600, 3723)] == ["0s", "3s", "1:03", "1:00:00", "1:02:03"]
    assert duration(math.inf) == duration(math.nan) == "?"


def test_tensorboard_is_optional(tmp_path: Path) -> None:
    """Numbers of a line, nested ones too, and text left out; without the package nothing happens."""
    board = TensorBoard(tmp_path / "tb", 0)
    board.write({"step": 1, "loss": 0.5, "health": {"kl": 1.0, "state": "ok"}, "time": 3})
    board.close()
    if board._writer is not None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tb")).Reload()
        assert {"loss", "health/kl"} <= set(events.Tags()["scalars"])
        assert events.Scalars("loss")[0].step == 1


def test_a_run_does_not_end_for_want_of_tensorboard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in the way, a path that is not UTF-8: said once, and nothing more."""
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "tb", tmp_path / "\udcff" / "tb"):
        board = TensorBoard(folder, 0)
        board.write({"step": 1, "loss": 0.5})
        board.close()
        assert capsys.readouterr().err.count("no TensorBoard files") == 1


def test_progress_on_a_disk_that_is_full() -> None:
    """Or on a terminal that was closed: no reason to end a run of weeks."""
    with open("/dev/full", "w") as stream:
        progress = Progress(20, 0, stream=stream)
        progress.show(10, "figures")
        progress.note("something happened")
        with contextlib.suppress(OSError):
            stream.close()


def test_a_tail_of_zeros(tmp_path: Path) -> None:
    """As a crash leaves them on some file systems: passed over in no time, however long, and cut off by a resume."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + bytes(200 << 20))
    began = time.monotonic()
    assert last_step(path) == 2
    MetricsLog(path, 2).close()
    assert time.monotonic() - began < 10
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
