"""What `selfsup logs` prints, of jobs of a real Slurm and of files; as a process where it is followed."""

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selfsup.errors import UserError
from selfsup.launch import logs
from selfsup.launch.cluster import Cluster, load
from selfsup.launch.script import Sbatch
from tests.launch.written_runs import QUIET, SLEEP, ended, forgetful, happened, here, no_slurm, submitted, trained
from tests.slurm.cluster import ROOT, Slurm

__all__ = ["forgetful", "here", "no_slurm"]

LINES = "".join(f"line {n}\n" for n in range(60))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A completed run of two ranks, in a folder with an awkward name."""
    folder = tmp_path / "mein Lauf, größer"
    cluster = Cluster(kind="slurm", tasks_per_node=2, gpus_per_node=0)
    run = ended(happened(submitted(folder, "12", cluster=cluster), "12", "start"), "12", 0)
    (run / "logs").mkdir()
    for rank in range(2):
        (run / "logs" / f"12_{rank}_log.out").write_text(f"rank {rank}\n")
    (run / "logs" / "12_log.out").write_text(LINES)
    (run / "logs" / "11_0_log.out").write_text("an earlier job\n")
    return run


def shown(capsys: pytest.CaptureFixture[str], run: Path, rank: int | None = None, follow: bool = False) -> str:
    logs.show(run, rank=rank, follow=follow)
    return capsys.readouterr().out


def test_ranks(no_slurm: None, run: Path, capsys: pytest.CaptureFixture[str]):
    assert shown(capsys, run) == "rank 0\n" == shown(capsys, run, 0)
    assert shown(capsys, run, 1) == "rank 1\n" == shown(capsys, run, 1, follow=True), "of one that is over, follow ends"
    with pytest.raises(UserError, match=r"--rank 2: .* has 2 rank\(s\)"):
        logs.show(run, rank=2, follow=False)


def test_a_failed_run_shows_its_script_too(no_slurm: None, run: Path, capsys: pytest.CaptureFixture[str]):
    ended(run, "12", 2)
    (run / "logs" / "12_0_log.out").write_text("no end of line")
    text = shown(capsys, run).splitlines()
    assert text[0] == "no end of line" and text[1].startswith("--- the job's script, ") and text[-1] == "line 59"
    assert len(text) == 42
    (run / "logs" / "12_0_log.out").unlink()
    logs.show(run, rank=None, follow=False)
    told = capsys.readouterr()
    assert told.out.endswith("line 59\n") and "failed" in told.err and "no log" in told.err


def test_any_bytes(no_slurm: None, run: Path, capsys: pytest.CaptureFixture[str]):
    """Characters are not torn apart between two blocks, what is none is escaped, progress stays as it is."""
    log = run / "logs" / "12_0_log.out"
    log.write_bytes(b"x" + "走".encode() * 100_000 + b"\rstep 1\rstep 2\n\xff\xfe\n" + "ö".encode()[:1])
    assert shown(capsys, run) == "x" + "走" * 100_000 + "\rstep 1\rstep 2\n\\xff\\xfe\n\\xc3\n"


def test_a_sweep(no_slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its logs are shared; a run's are those of its own job in the array."""
    sweep = submitted(tmp_path / "sweep", "12", runs=["seed=0", "seed=1"], sweep={"seed": [0, 1]})
    (sweep / "logs").mkdir()
    for index in range(2):
        run = submitted(sweep / f"seed={index}", f"12_{index}", index=index, part_of="..", logs="../logs")
        ended(run, f"12_{index}", 0)
        (sweep / "logs" / f"12_{index}_0_log.out").write_text(f"run {index}\n")
    assert shown(capsys, sweep / "seed=1") == "run 1\n"
    with pytest.raises(UserError, match=r"is a sweep of 2 runs; name one of them, as in .*seed=0"):
        logs.show(sweep, rank=None, follow=False)


def test_what_was_not_submitted(tmp_path: Path):
    with pytest.raises(UserError, match=r"was not submitted: .* its figures are in .*metrics\.jsonl"):
        logs.show(trained(tmp_path / "plain", 3), rank=None, follow=False)
    with pytest.raises(UserError, match="no such folder"):
        logs.show(tmp_path / "none", rank=None, follow=False)


def test_a_reader_that_has_enough(run: Path):
    """`selfsup logs RUN | head -1` of a long log: no traceback."""
    (run / "logs" / "12_0_log.out").write_text("a line\n" * 1_000_000)
    command = [sys.executable, "-m", "selfsup.cli", "logs", str(run)]
    env = {**os.environ, "SLURM_CONF": "/dev/null", "PATH": "/nowhere"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=env) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"a line\n"
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait(60) == 0


# -------------------------------------------------------------------------------------------------- on a real Slurm


class Following:
    """`selfsup logs RUN --follow` as a process."""

    def __init__(self, slurm: Slurm, run: Path, job: str) -> None:
        self.job = job
        command = [sys.executable, "-m", "selfsup.cli", "logs", str(run), "--follow"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=slurm.env()
        )
        self.text = {"stdout": b"", "stderr": b""}

    def until(self, text: str, stream: str = "stdout", timeout: float = 60) -> None:
        """Until it has printed this."""
        pipe = getattr(self.process, stream)
        end = time.monotonic() + timeout
        while text.encode() not in self.text[stream]:
            ready, _, _ = select.select([pipe], [], [], max(0, end - time.monotonic()))
            assert ready, f"it does not print {text!r}, but {self.text}"
            raw = os.read(pipe.fileno(), 1 << 16)
            assert raw, f"it ends: {self.text}"
            self.text[stream] += raw


@pytest.fixture
def follow(here: Slurm, tmp_path: Path) -> Iterator[Following]:
    """Of a run that waits, and prints in each of its starts."""
    run = tmp_path / "run"
    cluster = load("slurm", ["partition=low", "time=20", "gpus_per_node=0", "cpus_per_task=1", "sbatch.hold=true"])
    job = Sbatch(
        cluster, run / "logs", "sh -c 'echo begun ${SLURM_RESTART_COUNT-0}; exec sleep 600'", name="x"
    ).launch()
    submitted(run, job, cluster=cluster)
    following = Following(here, run, job)
    yield following
    following.process.kill()
    following.process.communicate()


def test_follow(here: Slurm, follow: Following, tmp_path: Path):
    """From before its start, over a requeue, to its end."""
    job = follow.job
    follow.until("waiting", "stderr")
    assert "queued (waits: JobHeldUser)" in follow.text["stderr"].decode()
    here.command("scontrol", "release", job)
    follow.until("begun 0\n")
    here.command("scontrol", "requeue", job)
    follow.until("begun 1\n", timeout=90)
    here.cancel(job)
    out, err = follow.process.communicate(timeout=60)
    assert follow.process.returncode == 0 and b"Traceback" not in err
    lines = (follow.text["stdout"] + out).decode().splitlines()
    assert [line for line in lines if line.startswith("begun")] == ["begun 0", "begun 1"]
    log = tmp_path / "run" / "logs" / f"{job}_0_log.out"
    assert lines == log.read_text().splitlines(), "each line once, with what Slurm itself says there"


def test_follow_is_ended_by_ctrl_c(here: Slurm, follow: Following):
    here.command("scontrol", "release", follow.job)
    follow.until("begun 0\n")
    follow.process.send_signal(signal.SIGINT)
    _, err = follow.process.communicate(timeout=60)
    assert follow.process.returncode == 130 and b"Traceback" not in err


def test_a_run_that_waits(here: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = submitted(tmp_path / "run", here.submit(*QUIET, "--hold", script=SLEEP))
    assert shown(capsys, run) == ""
    logs.show(run, rank=None, follow=False)
    assert "queued (waits: JobHeldUser); there is no log yet in " in capsys.readouterr().err
