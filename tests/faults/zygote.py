"""Runs of the command line in tenths of a second: a process that has imported everything forks one child a run.

    runs = Zygote()
    p = runs.start(["train", "recipe.yaml", "--out", "run"], fault=("kill_at", {"call": 7}), env={"A": "b"})
    p.kill(); p.wait(20); p.stderr()

A child is a process like one started by a shell: its own session, signals as at start, no input, files for its output;
its threads are joined and its exit functions run. Only the imports are shared, and with them the seed of Python's hashes.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "torch",
    "torch.distributed",
    "torch.utils.data",
    "timm",
    "safetensors.torch",
    "selfsup.cli",
    "selfsup.train",
    "selfsup.backbones",
    "selfsup.eval.periodic",
    "selfsup.methods.dino",
)
"""What a run imports. Nothing of it is used before a fork: torch's autograd does not survive one."""

Fault = tuple[str, Mapping[str, Any]]
"""A function of tests.faults.injected, called with these arguments in the child before the command runs."""


# ------------------------------------------------------------------------------------------------------- the test's side


class Process:
    """One run. `status` is None while it runs, then as in subprocess: exit code, or minus the signal."""

    def __init__(self, arguments: Sequence[str], out: Path, err: Path) -> None:
        self.arguments, self.out, self.err = list(arguments), out, err
        self.pid = 0
        self.status: int | None = None
        self._begun, self._ended = threading.Event(), threading.Event()

    def __repr__(self) -> str:
        return f"<pid {self.pid}: selfsup {' '.join(self.arguments)[:200]}: {self.status}>"

    def send(self, number: int) -> None:
        """A signal, if it has not ended."""
        if self.status is None and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to this process; its loader workers are left to notice."""
        self.send(signal.SIGKILL)

    def ends_within(self, seconds: float) -> bool:
        """Whether it has ended after so many seconds at most."""
        return self._ended.wait(seconds)

    def wait(self, timeout: float = 60) -> int:
        """The status; TimeoutError with its stderr if it has not ended after so many seconds."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"{self} has not ended after {timeout:g} s; its stderr:\n{self.stderr()}")
        assert self.status is not None
        return self.status

    def wait_for(self, condition: Callable[[], Any], timeout: float = 30) -> Any:
        """What `condition` returned once it was true; AssertionError if the process ended or time ran out before."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.status is not None
            if found := condition():
                return found
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{self}: never came to be; its stderr:\n{self.stderr()}")
            time.sleep(0.005)

    def stdout(self) -> str:
        """What it has printed so far."""
        return self.out.read_text(errors="replace")

    def stderr(self) -> str:
        """What it has printed on stderr so far."""
        return self.err.read_text(errors="replace")

    def children(self) -> list[int]:
        """The processes it has started that still run: its loader workers."""
        found = []
        for task in Path(f"/proc/{self.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(pid) for pid in task.read_text().split()]
        return sorted(found)


class Zygote:
    """The process that forks. A context manager; `close` ends whatever still runs.

    folder: where the children's output goes; default a temporary one. Raises RuntimeError if it cannot start.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="zygote-")
        self.folder = Path(folder or self._temporary.name)  # type: ignore[union-attr]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.processes: dict[int, Process] = {}
        self._log = open(self.folder / "zygote.err", "wb")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._ready, self._lock = threading.Event(), threading.Lock()
        threading.Thread(target=self._read, daemon=True, name="zygote").start()

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(
        self,
        arguments: Iterable[Any],
        *,
        fault: Fault | Sequence[Fault] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Process:
        """`selfsup ARGUMENTS` in a process of its own; returns when it has a pid. env: added to this process's own."""
        faults = [] if fault is None else [fault] if isinstance(fault[0], str) else list(fault)
        with self._lock:
            number = len(self.processes)
            stem = self.folder / f"{number:04d}"
            process = Process([str(a) for a in arguments], stem.with_suffix(".out"), stem.with_suffix(".err"))
            self.processes[number] = process
            process.out.touch()
            process.err.touch()
            command = {
                "number": number,
                "arguments": process.arguments,
                "faults": faults,
                "env": dict(env or {}),
                "cwd": str(cwd or ROOT),
                "out": str(process.out),
                "err": str(process.err),
            }
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:
                raise RuntimeError(f"the zygote is gone: {self._says()}") from None
        if not process._begun.wait(120) or not process.pid:
            raise RuntimeError(f"the zygote does not answer: {self._says()}")
        return process

    def run(self, arguments: Iterable[Any], *, timeout: float = 60, **options: Any) -> Process:
        """`start`, and wait for its end."""
        process = self.start(arguments, **options)
        process.wait(timeout)
        return process

    def ranks(
        self,
        arguments: Iterable[Any],
        world: int = 2,
        *,
        fault: Mapping[int, Any] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> list[Process]:
        """A run of `world` processes on this host, as torchrun would start them. fault: by rank."""
        arguments = list(arguments)
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), **(env or {})}
        shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        return [
            self.start(arguments, fault=(fault or {}).get(r), env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(world)
        ]

    def end_all(self) -> None:
        """Kill what still runs, loader workers too: a test that failed must not disturb the next one."""
        for process in list(self.processes.values()):
            if process.status is None and process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(20)

    def close(self) -> None:
        """End all runs and the zygote."""
        self.end_all()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            process = self.processes[answer["number"]]
            if "pid" in answer:
                process.pid = answer["pid"]
                process._begun.set()
            else:
                process.status = os.waitstatus_to_exitcode(answer["status"])
                process._ended.set()
        for process in list(self.processes.values()):  # it is gone: nobody shall wait for ever
            process._begun.set()

    def _says(self) -> str:
        return (self.folder / "zygote.err").read_text(errors="replace")[-2000:]


# --------------------------------------------------------------------------------------------------------- the zygote's side


def _serve(requests: int, replies: int) -> dict[str, Any] | None:
    """Fork a child for each command. Returns the command in the child, None in the zygote when there are no more."""

    def reply(**values: Any) -> None:
        os.write(replies, json.dumps(values).encode() + b"\n")

    watched = selectors.DefaultSelector()
    watched.register(requests, selectors.EVENT_READ)
    pids: dict[int, tuple[int, int]] = {}  # pidfd -> (pid, number of the command)
    buffer = b""
    while True:
        for key, _ in watched.select():
            if key.fd != requests:
                pid, number = pids.pop(key.fd)
                watched.unregister(key.fd)
                os.close(key.fd)
                reply(number=number, status=os.waitpid(pid, 0)[1])
                continue
            got = os.read(requests, 1 << 16)
            if not got:
                for pid, _ in pids.values():
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                return None
            *lines, buffer = (buffer + got).split(b"\n")
            for line in lines:
                command = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    watched.close()
                    for fd in (*pids, requests, replies):
                        os.close(fd)
                    return dict(command)
                handle = os.pidfd_open(pid)
                pids[handle] = (pid, command["number"])
                watched.register(handle, selectors.EVENT_READ)
                reply(number=command["number"], pid=pid)


def _become(command: Mapping[str, Any]) -> None:
    """In the child: nothing of the zygote's but its imports."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives the zygote
    for path, fd, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (command["out"], 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND),
        (command["err"], 2, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        ignored = number in (signal.SIGPIPE, signal.SIGXFSZ)  # as Python does
        with contextlib.suppress(OSError, ValueError):  # real-time signals that the C library keeps to itself
            signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.update(command["env"])
    os.chdir(command["cwd"])
    sys.argv = ["selfsup", *command["arguments"]]
    random.seed()
    sys.modules["numpy"].random.seed()


def main() -> None:
    """The zygote: commands on standard input, answers on standard output; in a child, the command line."""
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    for name in (*IMPORTED, "tests.faults.injected"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: not all would be there after a fork"
    command = _serve(requests, replies)
    if command is None:
        return
    _become(command)
    for name, options in command["faults"]:
        getattr(sys.modules["tests.faults.injected"], name)(**options)
    code: object = 0
    try:
        sys.modules["selfsup.cli"].main()
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
        code = 1
    # as the interpreter ends, but for the destruction of modules, which takes a second after a fork
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    main()
