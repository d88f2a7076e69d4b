"""The test cluster does what real ones do: ranks, devices, preemption, requeues, lost nodes; and leaves nothing behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster, host
from tests.slurm.cluster import ROOT, Slurm, base_folder, parse_job

# Every rank writes what happens to it; it ends on a signal named in sys.argv[2], rank 0 after it asked for a requeue.
RANK = """
import os, signal, subprocess, sys, time
folder, last = sys.argv[1:]
me = f"{folder}/{os.environ['SLURM_PROCID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
def say(word):
    with open(me, "a") as file:
        file.write(word + "\\n")
def on(number, frame):
    name = signal.Signals(number).name.removeprefix("SIG")
    say(name)
    if name == last:
        if os.environ["SLURM_PROCID"] == "0":
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        os._exit(0)
for name in ("USR1", "USR2", "TERM", "INT"):
    signal.signal(getattr(signal, "SIG" + name), on)
say(os.environ["SLURMD_NODENAME"])
while True:
    time.sleep(0.05)
"""


class Job:
    """Four ranks on two nodes that report their signals."""

    def __init__(self, slurm: Slurm, folder: Path, *, last: str = "", options: tuple[str, ...] = ()) -> None:
        self.slurm, self.folder = slurm, folder
        (folder / "rank.py").write_text(RANK)
        command = f"srun {sys.executable} {folder}/rank.py {folder} '{last}'"
        self.id = slurm.submit(
            "--nodes=2",
            "--ntasks-per-node=2",
            "--requeue",
            "--time=20",
            "--signal=USR2@60",
            f"--output={folder}/job.out",
            "--open-mode=append",
            *options,
            script=f"#!/bin/sh\n{command}\n",
        )
        self.started(0)

    def seen(self, restarts: int) -> list[list[str]]:
        """What each rank reported in this incarnation."""
        files = [self.folder / f"{rank}.{restarts}" for rank in range(4)]
        return [file.read_text().split() if file.exists() else [] for file in files]

    def started(self, restarts: int, timeout: float = 90) -> None:
        """All four ranks run."""
        self.slurm.wait(self.id, "RUNNING", restarts=restarts, timeout=timeout)
        self.until(lambda: all(self.seen(restarts)), 30, f"not all ranks started: {self.seen(restarts)}")

    def until(self, condition, timeout: float, otherwise: str) -> None:
        """Wait for it, then say what the job printed."""
        try:
            self.slurm.poll(condition, timeout, otherwise)
        except AssertionError as error:
            printed = (self.folder / "job.out").read_text() if (self.folder / "job.out").exists() else ""
            raise AssertionError(f"{error}\n{[self.seen(n) for n in range(3)]}\n{printed}") from None


def processes(conf: Path) -> list[int]:
    """Those that have this configuration in their environment."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [pid for pid in pids if host.environ(pid).get(b"SLURM_CONF") == bytes(conf)]


def test_ranks_and_devices(slurm: Slurm):
    """Four ranks on two nodes, two devices each, on hosts that resolve."""
    show = "echo $SLURM_PROCID $SLURM_LOCALID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $(getent ahosts $SLURMD_NODENAME)"
    out = slurm.command("srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "sh", "-c", show)
    assert sorted(line.split()[:5] for line in out.splitlines()) == [
        ["0", "0", "n1", "0,1", "127.0.0.1"],
        ["1", "1", "n1", "0,1", "127.0.0.1"],
        ["2", "0", "n2", "0,1", "127.0.0.1"],
        ["3", "1", "n2", "0,1", "127.0.0.1"],
    ]


@pytest.mark.parametrize("spelling", ["--gres=gpu:1", "--gpus-per-node=1", "--gpus=1"])
def test_a_device_is_given_once(slurm: Slurm, spelling: str, tmp_path: Path):
    """Two jobs on one node see different ones."""
    script = f"#!/bin/sh\necho $CUDA_VISIBLE_DEVICES > {tmp_path}/$SLURM_JOB_ID\nexec sleep 600\n"
    jobs = [slurm.submit("--nodelist=n1", spelling, "--output=/dev/null", script=script) for _ in range(2)]
    files = [tmp_path / job for job in jobs]
    slurm.poll(lambda: all(f.exists() and f.read_text() for f in files), 30, "jobs do not start")
    assert sorted(f.read_text().strip() for f in files) == ["0", "1"]


def test_preemption_with_user_signal(slurm: Slurm, tmp_path: Path):
    """The signal of --signal at once; after GraceTime SIGTERM, SIGKILL and a requeue, by Slurm itself."""
    slurm.reconfigure(GraceTime=5)  # looked at every 30 s
    job = Job(slurm, tmp_path)
    high = slurm.preempt()
    job.until(lambda: all("USR2" in seen for seen in job.seen(0)), 30, "USR2 has not come")
    assert not any("TERM" in seen for seen in job.seen(0))
    slurm.wait(high, "RUNNING", timeout=90)
    assert all("TERM" in seen for seen in job.seen(0))
    slurm.wait(job.id, "PENDING", restarts=1)
    slurm.cancel(high)
    job.started(1)


def test_preemption_without_user_signal(slurm: Slurm, tmp_path: Path):
    """SIGTERM is all that comes; a job that asks for its requeue then goes at once."""
    slurm.reconfigure(user_signal=False)
    job = Job(slurm, tmp_path, last="TERM")
    high = slurm.preempt()
    slurm.wait(high, "RUNNING", timeout=60)
    assert all("TERM" in seen and "USR2" not in seen for seen in job.seen(0))
    slurm.wait(job.id, "PENDING", restarts=1)
    slurm.cancel(high)
    job.started(1)


def test_requeue_by_hand(slurm: Slurm, tmp_path: Path):
    job = Job(slurm, tmp_path, last="TERM")
    slurm.command("scontrol", "requeue", job.id)
    job.started(1)


def test_a_lost_node(slurm: Slurm, tmp_path: Path):
    """kill -9 of slurmd: NODE_FAIL and a requeue, while the tasks on that node live on."""
    slurm.reconfigure(SlurmdTimeout=10)
    job = Job(slurm, tmp_path)
    slurm.kill_slurmd("n2")
    slurm.wait(job.id, "PENDING", restarts=1, timeout=120)
    assert slurm.nodes()["n2"] == "down*"
    assert "NODE_FAIL" in slurm.command("sacct", "-c", "-n", "-j", job.id, "-o", "state")
    first = [seen[0] for seen in job.seen(0)]
    assert sorted(first) == ["n1", "n1", "n2", "n2"]
    alive = [p for p in processes(slurm.conf) if f"{tmp_path}/rank.py".encode() in _cmdline(p)]
    assert len(alive) == 2, "the old ranks of the lost node run: what is written must be fenced"
    slurm.start_slurmd("n2")
    job.started(1)


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_scancel_and_accounting(slurm: Slurm, tmp_path: Path):
    job = Job(slurm, tmp_path)
    slurm.command("scancel", "--signal=USR1", job.id)  # to the ranks, not to the script
    job.until(lambda: all("USR1" in seen for seen in job.seen(0)), 30, "USR1 has not come")
    slurm.cancel(job.id)
    assert slurm.wait(job.id, "CANCELLED", timeout=60)["Restarts"] == "0"
    sacct = ("sacct", "-c", "-n", "-j", job.id, "-o", "state")
    slurm.poll(lambda: "CANCELLED" in slurm.command(*sacct), 30, "sacct -c does not say so")
    status, _, err = slurm.try_command("sacct", "-j", job.id)
    assert status == 1 and "disabled" in err, "plain sacct needs a database"
    slurm.reconfigure(sacct=False)
    status, _, err = slurm.try_command(*sacct)
    assert status == 1 and "disabled" in err
    assert slurm.job(job.id)["JobState"] == "CANCELLED"
    assert slurm.job("9999999") == {}


def test_a_killed_starter(slurm: Slurm, tmp_path: Path):
    """What it left is found and stopped by the next one in the folder, beside another cluster that goes on."""
    folder = base_folder() / f"killed{os.getpid()}"
    code = f"""
        import pathlib, time
        from tests.slurm.cluster import Slurm
        slurm = Slurm(pathlib.Path("{folder}")).start()
        print(slurm.submit("--nodes=2", "--output=/dev/null", script="#!/bin/sh\\nsrun sleep 600\\n"), flush=True)
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    starter = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    other = Slurm(folder)
    try:
        assert starter.stdout
        job = starter.stdout.readline().strip()
        other.wait(job, "RUNNING", timeout=30)
        mine = slurm.submit("--output=/dev/null", script="#!/bin/sh\nsleep 600\n")
        slurm.wait(mine, "RUNNING", timeout=30)
        starter.send_signal(signal.SIGKILL)
        starter.wait(10)
        before = set(processes(other.conf))
        assert len(before) > 6 and other.running()
        other.start()
        assert not before & set(processes(other.conf))
        assert other.command("squeue", "--noheader") == ""
        assert host.HOSTS.read_text().count(str(folder)) == 1
    finally:
        starter.kill()
        other.stop()
        shutil.rmtree(folder)
    assert processes(other.conf) == []
    assert str(folder) not in host.HOSTS.read_text()
    assert slurm.job(mine)["JobState"] == "RUNNING"


@pytest.fixture
def folder(slurm: Slurm) -> Iterator[Path]:
    """For a cluster of the command line; there is Slurm on this machine."""
    chosen = base_folder() / f"people{os.getpid()}"
    yield chosen
    Slurm(chosen).stop()
    shutil.rmtree(chosen)


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert cluster.main(["status", str(folder)]) == 1
    assert cluster.main(["up", str(folder)]) == 0
    out = capsys.readouterr().out
    conf = re.search(r"export SLURM_CONF=(\S+)", out)
    assert conf and len(re.findall(r"^n[12] .* idle ", out, re.M)) == 4, out
    shell = {"PATH": os.environ["PATH"], "SLURM_CONF": conf.group(1)}
    assert subprocess.run(["srun", "echo", "hello"], env=shell, capture_output=True, timeout=30).stdout == b"hello\n"
    pids = processes(Path(conf.group(1)))
    assert cluster.main(["up", str(folder)]) == 0
    assert set(processes(Path(conf.group(1)))) <= set(pids), "it was up already"  # but for what srun left behind
    assert cluster.main(["status", str(folder)]) == 0
    assert cluster.main(["down", str(folder)]) == 0
    assert cluster.main(["down", str(folder)]) == 0
    assert processes(Path(conf.group(1))) == []
    assert cluster.main(["up", "/tmp/a b"]) == 2
    assert cluster.main(["upp"]) == 2


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(cluster, "PROGRAMS", ("no-such-program", "sh"))
    assert cluster.main(["up"]) == 2
    err = capsys.readouterr().err
    assert "no-such-program" in err and "apt-get install slurm-wlm munge" in err and "sh," not in err


def test_root_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cluster, "PROGRAMS", ())
    if os.geteuid() == 0:
        os.seteuid(65534)
        try:
            assert "not root" in str(cluster.missing())
        finally:
            os.seteuid(0)
    else:
        assert "not root" in str(cluster.missing())


@pytest.mark.parametrize("text", ["127.0.0.1 localhost\n", "127.0.0.1 localhost", "", "::1 a\r\n\n# b\n"])
def test_hosts_are_left_as_they_were(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hosts = tmp_path / "hosts"
    hosts.write_bytes(text.encode())
    monkeypatch.setattr(host, "HOSTS", hosts)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "127.0.0.1")
    names = ("n1", "n2")
    first, second = tmp_path / "1", tmp_path / "11"
    for folder in (first, second, first):
        host.name_nodes(names, folder)
    assert hosts.read_text().count("127.0.0.1 n1 n2 #") == 2
    host.name_nodes(names, first, remove=True)
    assert hosts.read_text().count("127.0.0.1 n1 n2 #") == 1
    host.name_nodes(names, second, remove=True)
    host.name_nodes(names, second, remove=True)
    assert hosts.read_bytes() == text.encode()


def test_parse_job():
    text = """JobId=5 ArrayJobId=4 JobName=a b=c
   UserId=root(0) GroupId=root(0) MCS_label=N/A
   Socks/Node=* NtasksPerN:B:S:C=2:0:*:* CoreSpec=*
   Command=/tmp/a B=c/x.sh
   Power=
   TresPerNode=gres:gpu:2

JobId=6 JobName=x
   JobState=RUNNING
"""
    found = parse_job(text)
    assert found["JobId"] == "5" and found["JobName"] == "a b=c" and found["ArrayJobId"] == "4"
    assert found["Command"] == "/tmp/a B=c/x.sh" and found["UserId"] == "root(0)" and "JobState" not in found
    assert found["NtasksPerN:B:S:C"] == "2:0:*:*" and found["Power"] == "" and found["TresPerNode"] == "gres:gpu:2"
