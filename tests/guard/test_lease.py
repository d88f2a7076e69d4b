"""The lease of a run folder, between real processes: killed, stopped, forked, racing, on "another host", without a disk."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selfsup.errors import UserError
from selfsup.guard import lease as lease_module
from selfsup.guard import processes
from selfsup.guard.lease import Lease, holder
from selfsup.guard.processes import Process

HOLDER = """
import errno, fcntl, os, sys, time
from pathlib import Path
from selfsup.errors import UserError
from selfsup.guard.lease import Lease

def tell(*words):
    print(*words, flush=True)

def on_error(call):
    try:
        call()
        tell("fine")
    except UserError as error:
        tell("refused", error)

lease = None

def acquire(run, interval, patience, at="0"):
    global lease
    while time.monotonic() < float(at):
        pass
    lease = Lease.acquire(Path(run), interval_s=float(interval), patience_s=float(patience), say=lambda t: tell("said", t))

def no_flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

for line in sys.stdin:
    verb, *arguments = line.split()
    if verb == "acquire":
        on_error(lambda: acquire(*arguments))
    elif verb == "check":
        on_error(lease.check)
    elif verb == "release":
        on_error(lease.release)
    elif verb == "mtime":
        tell("mtime", os.fstat(lease._fd).st_mtime_ns)
    elif verb == "no_flock":
        fcntl.flock = no_flock
        tell("fine")
    elif verb == "break":
        os.close(lease._fd)
    elif verb == "mend":
        os.dup2(os.open(lease._path, os.O_RDWR), lease._fd)
    elif verb == "fork":
        pid = os.fork()
        if pid == 0:
            try:
                with lease:  # left by an exception, as in a loader worker that dies
                    raise SystemExit
            finally:
                os.close(1)
                os.close(2)
                time.sleep(60)
                os._exit(0)
        tell("forked", pid)
"""


class Other:
    """Another process that takes orders."""

    def __init__(self, *prefix: str) -> None:
        command = [*prefix, sys.executable, "-c", HOLDER]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def send(self, *words: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()

    def hear(self, quiet: bool = True) -> str:
        """The next line; what it merely said is passed over, unless asked for."""
        assert self.process.stdout is not None
        while True:
            line = self.process.stdout.readline().strip()
            if not (quiet and line.startswith("said")):
                return line

    def ask(self, *words: object) -> str:
        self.send(*words)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def other() -> Iterator[Callable[..., Other]]:
    started: list[Other] = []

    def start(*prefix: str) -> Other:
        started.append(Other(*prefix))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        for stream in (one.process.stdin, one.process.stdout):
            assert stream is not None
            stream.close()


def wait_for(condition: Callable[[], object], timeout: float = 30) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def acquire(run: Path, interval: float = 0.05, patience: float = 20, said: list[str] | None = None) -> Lease:
    return Lease.acquire(run, interval_s=interval, patience_s=patience, say=(said if said is not None else []).append)


def move_elsewhere(run: Path) -> None:
    """What a host of another boot sees: rewritten in place, so that the holder's heartbeat goes on touching it."""
    path = run / "lease.json"
    values = json.loads(path.read_text())
    with open(path, "r+") as file:
        file.write(json.dumps({**values, "boot": values["boot"][::-1]}) + "\n")
        file.truncate()


# ----------------------------------------------------------------------------------------------------------------- plain


def test_one_at_a_time_and_given_back(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with acquire(tmp_path) as lease:
        values = json.loads((tmp_path / "lease.json").read_text())
        assert values["token"] == lease.token and values["pid"] == os.getpid()
        assert set(values) == {"token", "host", "boot", "pid_namespace", "pid", "started", "since"}
        lease.check()
        assert f"process {os.getpid()} on host {values['host']} since {values['since']}" == holder(tmp_path)
        before = (tmp_path / "lease.json").stat().st_mtime_ns
        wait_for(lambda: (tmp_path / "lease.json").stat().st_mtime_ns > before)  # the heartbeat
        with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on host .* since .*; wait for it or"):
            acquire(tmp_path)
        lease.check()  # the one that was refused left it alone
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lease-lock"]
    lease.release()
    with pytest.raises(UserError, match="nothing more is written"):
        lease.check()
    with acquire(tmp_path) as second:
        lease.release()
        second.check()
        assert second.token != lease.token
    assert not [t for t in threading.enumerate() if t.name == "lease"]


def test_another_process_is_refused_at_once_and_its_death_frees_the_run(tmp_path: Path, other: Callable) -> None:
    first = other()
    assert first.ask("acquire", tmp_path, 0.05, 60) == "fine"
    began = time.monotonic()
    with pytest.raises(UserError, match=f"in use by process {first.process.pid} on host"):
        acquire(tmp_path, patience=60)
    os.kill(first.process.pid, signal.SIGSTOP)
    wait_for(lambda: Process.parse(json.loads((tmp_path / "lease.json").read_text())).state() == "stopped")  # type: ignore[union-attr]
    with pytest.raises(UserError, match=rf"process {first.process.pid} \(stopped\) on host"):
        acquire(tmp_path, patience=60)

    first.process.kill()  # not waited for: a zombie
    wait_for(lambda: holder(tmp_path) is None)
    said: list[str] = []
    with acquire(tmp_path, patience=60, said=said) as lease:
        lease.check()
    assert len(said) == 1 and f"process {first.process.pid} on host" in said[0] and "gone" in said[0]
    assert time.monotonic() - began < 30  # far less than the patience


def test_a_pid_that_went_to_another_process_is_no_holder(tmp_path: Path) -> None:
    with acquire(tmp_path):
        values = json.loads((tmp_path / "lease.json").read_text())
    (tmp_path / "lease.json").write_text(json.dumps({**values, "started": values["started"] - 100}))
    with acquire(tmp_path, patience=600) as lease:
        lease.check()


def test_exit_without_release(tmp_path: Path) -> None:
    """The interpreter ends although the heartbeat runs, silently; the next start does not wait."""
    code = (
        "import sys; from pathlib import Path; from selfsup.guard.lease import Lease;"
        "Lease.acquire(Path(sys.argv[1]), interval_s=0.001, patience_s=9, say=print)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "lease.json").exists() and holder(tmp_path) is None
    acquire(tmp_path, patience=600).release()


# --------------------------------------------------------------------------------------------------------- another host


def test_heartbeat_of_another_host(tmp_path: Path, other: Callable) -> None:
    """Refused as soon as it is seen to beat; taken over when it has not for the whole patience."""
    first = other()
    assert first.ask("acquire", tmp_path, 0.05, 60) == "fine"
    move_elsewhere(tmp_path)
    assert f"process {first.process.pid} on host" in str(holder(tmp_path))
    said: list[str] = []
    with pytest.raises(UserError, match=f"process {first.process.pid} .*heartbeat goes on"):
        acquire(tmp_path, patience=600, said=said)
    assert len(said) == 1 and "watching for 600 s" in said[0]
    assert first.ask("check") == "fine"

    first.kill()
    began = time.monotonic()
    with acquire(tmp_path, patience=0.5, said=said) as lease:
        assert time.monotonic() - began >= 0.5
        lease.check()
    assert "is silent" in said[-1]


def test_another_hosts_run_that_ends_while_it_is_watched(tmp_path: Path, other: Callable) -> None:
    first = other()
    assert first.ask("acquire", tmp_path, 1000, 60) == "fine"
    move_elsewhere(tmp_path)
    said: list[str] = []
    threading.Timer(0.3, lambda: first.send("release")).start()
    with acquire(tmp_path, patience=600, said=said) as lease:
        lease.check()


def test_a_heartbeat_by_a_clock_that_jumped_back_is_one(tmp_path: Path, other: Callable) -> None:
    first = other()
    assert first.ask("acquire", tmp_path, 1000, 60) == "fine"
    move_elsewhere(tmp_path)
    hour_ago = time.time() - 3600
    threading.Timer(0.3, lambda: os.utime(tmp_path / "lease.json", (hour_ago, hour_ago))).start()
    with pytest.raises(UserError, match="heartbeat goes on"):
        acquire(tmp_path, patience=600)


def test_a_holder_stopped_through_a_takeover_is_fenced_off(tmp_path: Path, other: Callable) -> None:
    old = other()
    assert old.ask("acquire", tmp_path, 0.02, 60) == "fine"
    move_elsewhere(tmp_path)
    os.kill(old.process.pid, signal.SIGSTOP)
    with acquire(tmp_path, interval=1000, patience=0.5) as lease:
        before = (tmp_path / "lease.json").stat()
        os.kill(old.process.pid, signal.SIGCONT)
        answer = old.ask("check")
        assert answer.startswith(f"refused {tmp_path} was taken over by process {os.getpid()} on host")
        assert "nothing more is written" in answer
        for _ in range(3):  # it still beats, on a file that is no more
            beat = old.ask("mtime")
            wait_for(lambda beat=beat: old.ask("mtime") != beat)
        assert old.ask("release") == "fine"
        after = (tmp_path / "lease.json").stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        lease.check()


def test_another_pid_namespace_is_another_host(tmp_path: Path, other: Callable) -> None:
    """A container with our host name: its pid means nothing here, whether or not we have a process of that number."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
    real = bool(shutil.which("unshare")) and subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
    inside = other(*unshare) if real else other()
    assert inside.ask("acquire", tmp_path, 0.05, 60) == "fine"
    values = json.loads((tmp_path / "lease.json").read_text())
    if real:
        assert values["pid"] < 10 and values["host"] == Process.current().host
        assert values["boot"] == Process.current().boot and values["pid_namespace"] != Process.current().pid_namespace
    else:
        move_elsewhere(tmp_path)
    process = Process.parse(json.loads((tmp_path / "lease.json").read_text()))
    assert process is not None and process.alive() is None and process.state() == "unknown"
    with pytest.raises(UserError, match="heartbeat goes on"):
        acquire(tmp_path, patience=600)
    assert inside.ask("check") == "fine"


# --------------------------------------------------------------------------------------------------------- at one time


@pytest.mark.parametrize("case", ["no lease", "dead here", "silent elsewhere", "dead here, no flock"])
def test_eight_at_once_and_one_wins(tmp_path: Path, other: Callable, case: str) -> None:
    contenders = [other() for _ in range(8)]
    first = other()
    assert first.ask("acquire", tmp_path, 1000, 60) == "fine"
    first.kill()
    if case == "silent elsewhere":
        move_elsewhere(tmp_path)
    if case.endswith("no flock"):
        assert all(c.ask("no_flock") == "fine" for c in contenders)
    rounds = {"no lease": 15, "dead here": 15, "silent elsewhere": 6, "dead here, no flock": 2}[case]
    for n in range(rounds):
        run = tmp_path / f"round_{n}"
        run.mkdir()
        if case != "no lease":
            shutil.copy(tmp_path / "lease.json", run)
        at = time.monotonic() + 0.02
        for c in contenders:
            c.send("acquire", run, 0.05, 0.2, at)
        answers = [c.hear() for c in contenders]
        winners = [c for c, answer in zip(contenders, answers) if answer == "fine" and c.ask("check") == "fine"]
        assert len(winners) == 1, answers
        if not case.endswith("no flock"):  # there, one held up for longer than a second may find out a little later
            assert answers.count("fine") == 1, answers
        assert all("is in use by process" in a or "was taken over" in a for a in answers if a != "fine"), answers
        assert json.loads((run / "lease.json").read_text())["pid"] == winners[0].process.pid
        assert winners[0].ask("release") == "fine"
        assert [p.name for p in run.iterdir()] == [".lease-lock"]


def test_somebody_sits_on_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process stopped in the middle of a takeover must not block the run for ever."""
    monkeypatch.setattr(lease_module, "_LOCK_WAIT_S", 0.2)
    with open(tmp_path / ".lease-lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with acquire(tmp_path) as lease:
            lease.check()


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with acquire(tmp_path) as lease:
        before = (tmp_path / "lease.json").stat().st_mtime_ns
        wait_for(lambda: (tmp_path / "lease.json").stat().st_mtime_ns > before)
        lease.check()
        with pytest.raises(UserError, match="in use"):
            acquire(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lease-lock"]


# --------------------------------------------------------------------------------------------------------------- forks


def test_forked_children_neither_beat_nor_release(tmp_path: Path, other: Callable) -> None:
    first = other()
    assert first.ask("acquire", tmp_path, 0.02, 60) == "fine"
    child = int(first.ask("fork").split()[1])
    try:
        assert first.ask("check") == "fine"
        first.kill()
        last = (tmp_path / "lease.json").stat().st_mtime_ns
        time.sleep(0.4)  # twenty heartbeats
        assert (tmp_path / "lease.json").stat().st_mtime_ns == last
        os.kill(child, 0)
        with acquire(tmp_path, patience=600) as lease:
            lease.check()
    finally:
        os.kill(child, signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------- disk


def test_run_folder_removed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    lease = acquire(run)
    try:
        (run / "lease.json").rename(tmp_path / "kept")
        with pytest.raises(UserError, match=r"lease\.json was removed .*nothing more is written"):
            lease.check()
        (tmp_path / "kept").rename(run / "lease.json")
        lease.check()
        shutil.rmtree(run)
        with pytest.raises(UserError, match=rf"^{run} was removed .*nothing more is written"):
            lease.check()
        run.mkdir()
        with acquire(run) as second:
            with pytest.raises(UserError, match="was taken over by"):
                lease.check()
            lease.release()
            second.check()
    finally:
        lease.release()
    assert list(tmp_path.iterdir()) == [run]


def test_heartbeat_outlives_a_disk_that_fails(tmp_path: Path, other: Callable) -> None:
    first = other()
    assert first.ask("acquire", tmp_path, 0.02, 60) == "fine"
    first.send("break")
    assert "cannot be renewed" in first.hear(quiet=False)
    assert first.ask("check") == "fine"  # said once, and goes on
    first.send("mend")
    assert "renewed again" in first.hear(quiet=False)
    before = (tmp_path / "lease.json").stat().st_mtime_ns
    wait_for(lambda: (tmp_path / "lease.json").stat().st_mtime_ns > before)


def test_nothing_left_of_a_lease_that_could_not_be_written(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from selfsup.guard.lease import Lease\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try: Lease.acquire(Path(sys.argv[1]), say=print)\n"
        "except Exception as error: print(repr(error))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(f"DiskError('{tmp_path}: cannot be written: File too large") and not done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [".lease-lock"]
    with pytest.raises(UserError, match="cannot be written: No such file"):
        acquire(tmp_path / "missing")


GARBAGE = [
    b"",
    b"\xff\xfe\x00",
    b"[1]",
    b"[" * 60000,
    b'{"token": 3, "pid": "x"}',
    b'{"host": "a\\nb", "boot": "", "pid_namespace": "", "pid": 1, "started": 1, "since": "\\u001b[2J"}',
    b'{"host": "", "boot": "", "pid_namespace": "", "pid": -1, "started": 1}',
    b'{"host": "", "boot": "", "pid_namespace": "", "pid": 1e400, "started": 1}',
    b'{"host": "", "boot": "", "pid_namespace": "", "pid": 123456789012345678901234567890, "started": null}',
    None,  # a named pipe, which would block whoever opens it
]


@pytest.mark.parametrize("content", GARBAGE, ids=[str(c)[:24] for c in GARBAGE])
def test_unreadable_lease_is_watched_then_taken_over(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "lease.json"
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    assert "unknown process" in str(holder(tmp_path))
    said: list[str] = []
    with acquire(tmp_path, patience=0.1, said=said) as lease:
        lease.check()
    assert "watching for 0.1 s" in said[0] and all(line.isprintable() for line in said)
    path.write_bytes(b"{")
    os.utime(path, (1, 1))
    assert holder(tmp_path) is None  # nobody renewed it for long
    threading.Timer(0.2, lambda: os.utime(path)).start()
    with pytest.raises(UserError, match="unknown process"):
        acquire(tmp_path, patience=600)


def test_a_folder_in_the_leases_place(tmp_path: Path) -> None:
    (tmp_path / "lease.json").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        acquire(tmp_path, patience=0.1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lease-lock", "lease.json"]


# ----------------------------------------------------------------------------------------------------------- processes


def test_stat_lines_of_any_name() -> None:
    tail = " S 1 2 3 0 -1 4194304 98 0 0 0 0 0 0 0 20 0 1 0 1154921 3133440 413"
    for name in (b"python", b"a b", b") R 7 (", b"((", b"))) Z", b"\xff\n) X"):
        assert processes.parse_stat(b"12 (" + name + b")" + tail.encode()) == ("S", 1154921)
    code = "open('/proc/self/comm','w').write(') Z 1 (2'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        letter, started = processes.parse_stat(Path(f"/proc/{child.pid}/stat").read_bytes())
        here = Process.current()
        process = Process(here.host, here.boot, here.pid_namespace, child.pid, started)
        assert letter in "SR" and started >= (here.started or 0) and process.alive() is True
        child.kill()
        wait_for(lambda: process.alive() is False)  # not waited for yet: a zombie
        assert process.state() == "gone"
    assert process.alive() is False


def test_a_zombie_with_a_living_thread_may_still_write() -> None:
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print(flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        stat = Path(f"/proc/{child.pid}/stat")
        wait_for(lambda: processes.parse_stat(stat.read_bytes())[0] == "Z")
        here = Process.current()
        process = Process(
            here.host, here.boot, here.pid_namespace, child.pid, processes.parse_stat(stat.read_bytes())[1]
        )
        assert process.alive() is True and process.state() == "ending"
        child.kill()
        wait_for(lambda: process.alive() is False)


def test_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Callable) -> None:
    """As on macOS: a pid that is absent is gone; one that is there may be another process's, so its heartbeat decides."""
    monkeypatch.setattr(processes, "_PROC", tmp_path / "no-proc")
    here = Process.current()
    assert (here.boot, here.pid_namespace, here.started) == ("", "", None)
    assert here.alive() is None and processes.age() > 0
    gone = other()
    gone.kill()
    assert Process(here.host, "", "", gone.process.pid, None).alive() is False
    with acquire(tmp_path) as lease:
        with pytest.raises(UserError, match="heartbeat goes on"):
            acquire(tmp_path, patience=600)
        lease.check()
        values = json.loads((tmp_path / "lease.json").read_text())
    (tmp_path / "lease.json").write_text(json.dumps({**values, "pid": gone.process.pid}))
    with acquire(tmp_path, patience=600) as lease:
        lease.check()


def test_age_of_this_process() -> None:
    code = (
        "import time; a = time.monotonic(); time.sleep(0.3); from selfsup.guard import processes; b = processes.age();"
        "print(b >= time.monotonic() - a - 0.02, b < 60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True"], done
