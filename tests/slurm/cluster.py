"""A real Slurm of two nodes on this machine, for tests and for people: `python -m tests.slurm.cluster up`.

    with Slurm(folder) as slurm:
        job = slurm.submit("--nodes=2", "--ntasks-per-node=2", script="#!/bin/bash\nsrun hostname\n")
        slurm.wait(job, "COMPLETED")

Two nodes n1 and n2 of eight CPUs and two GPUs each, whatever this machine has (the GPUs are not real: jobs compute on the
CPU); a partition `low`, whose jobs those of the partition `high` preempt. Needs Debian's slurm-wlm and munge, and root.
"""

import contextlib
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.slurm import host
from tests.slurm.conf import gres_conf, slurm_conf

ROOT = Path(__file__).resolve().parents[2]
NODES = ("n1", "n2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "sacct", "scancel")
DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd")
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"}
"""States after which a job changes no more. PREEMPTED and NODE_FAIL are not among them: a requeue follows."""

# The longest name made in the folder is that of a socket, spool/n1/n1_JOB.STEP, which may have 107 bytes.
_LONGEST = 80
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str | None:
    """What this machine lacks for a Slurm, in words; None if nothing."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"{', '.join(lacking)}: not found; on Debian or Ubuntu: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "not root: the daemons of this Slurm run as root, and the names of its nodes go into /etc/hosts"
    if not os.access(host.HOSTS, os.W_OK):
        return f"{host.HOSTS} cannot be written: the names of the nodes go into it"
    return None


def base_folder() -> Path:
    """Where clusters are kept unless told otherwise: this user's alone, and the same for every process."""
    folder = Path(tempfile.gettempdir()) / f"selfsup-slurm-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    seen = folder.lstat()
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.geteuid() or seen.st_mode & 0o022:
        raise RuntimeError(f"{folder} is not a folder of this user's alone; remove it")
    return folder


class Slurm:
    """A cluster in a folder of its own, whose daemons outlive this object unless it is used as a context manager.

    sacct: whether `sacct -c` answers (plain `sacct` never does: it needs a database). user_signal: whether jobs get the
    signal of `sbatch --signal` when they are preempted, else SIGTERM. settings: further lines of slurm.conf, which win.
    """

    def __init__(
        self, folder: Path, *, sacct: bool = True, user_signal: bool = True, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = Path(folder).absolute()
        self.conf = self.folder / "slurm.conf"
        self.log = self.folder / "log"
        self.sacct, self.user_signal, self.settings = sacct, user_signal, dict(settings or {})
        self._given = (sacct, user_signal, dict(self.settings))
        self._ports: list[int] = []
        if len(bytes(self.folder)) > _LONGEST or re.search(r"[\s#%\\,\[\]]", str(self.folder)):
            raise ValueError(f"{self.folder}: at most {_LONGEST} bytes, and no spaces, #, %, commas or brackets")

    def __enter__(self) -> "Slurm":
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    # ------------------------------------------------------------------------------------------------ start and stop

    def start(self, timeout: float = 60) -> "Slurm":
        """Start it and wait until both nodes are idle; what an earlier one left in this folder is stopped first."""
        if reason := missing():
            raise RuntimeError(reason)
        self.stop()
        for attempt in range(3):
            for name in ("munge", "state", "spool", "run", "log"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in ("munge", "state", "run", "log", *(f"spool/{node}" for node in NODES)):
                (self.folder / name).mkdir(mode=0o755 if name != "munge" else 0o711, parents=True)
            for number in range(2):
                if not (gpu := self.folder / f"gpu{number}").exists():
                    os.mknod(gpu, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            key = self.folder / "munge" / "key"
            key.touch(mode=0o600)
            key.write_bytes(secrets.token_bytes(128))
            self._ports = host.free_ports(1 + len(NODES))
            self._write()
            try:
                host.name_nodes(NODES, self.folder)
                self._run_daemon(*self._munged())
                self._run_daemon("slurmctld", "-c")
                for node in NODES:
                    self.start_slurmd(node, wait=False)
                self.wait_idle(timeout)
            except BaseException as error:
                in_use = "Address already in use" in self._logs()
                self.stop()
                if in_use and attempt < 2 and isinstance(error, Exception):
                    continue  # a port was taken between the look at it and its use
                raise
            return self
        raise AssertionError

    def stop(self) -> None:
        """End the daemons, all jobs, and what else belongs to this folder's cluster, also if another process started it."""
        for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES)):
            self._end(name)
        self._kill()  # slurmd leaves slurmstepd and its jobs behind
        host.name_nodes(NODES, self.folder, remove=True)

    def running(self) -> bool:
        """Whether all four daemons run."""
        return all(self.pid(name) for name in ("munged", "slurmctld", *(f"slurmd-{node}" for node in NODES)))

    def reconfigure(self, *, timeout: float = 30, **changes: Any) -> None:
        """Change `sacct`, `user_signal` or lines of slurm.conf while jobs run; slurmctld is started again."""
        self.sacct = changes.pop("sacct", self.sacct)
        self.user_signal = changes.pop("user_signal", self.user_signal)
        self.settings |= changes
        self._restart_slurmctld(timeout)

    def _restart_slurmctld(self, timeout: float) -> None:
        self._write()
        self.stop_slurmctld()
        self.start_slurmctld(timeout)

    def stop_slurmctld(self) -> None:
        """Nothing is scheduled and nobody gets an answer; what runs goes on."""
        self._end("slurmctld")

    def start_slurmctld(self, timeout: float = 30) -> None:
        """Start it again, with the jobs that it had, and wait until it answers."""
        self._run_daemon("slurmctld")
        self.poll(lambda: self.try_command("scontrol", "ping")[0] == 0, timeout, "slurmctld does not answer")
        self.command("scontrol", "reconfigure")

    def reset(self, timeout: float = 60) -> None:
        """As after the start: no jobs, both nodes idle, the first configuration. Jobs are killed, not asked."""
        if not (self.pid("munged") and self.pid("slurmctld")):
            self.start(timeout)
        for node in NODES:
            if not self.pid(f"slurmd-{node}"):
                self.start_slurmd(node, wait=False)

        def empty() -> bool:
            jobs = sorted(set(self.command("squeue", "--noheader", "--format=%A").split()))
            self._kill(jobs_only=True)
            if jobs:  # again and again: one that asks for a requeue when it is told to end comes back
                self.try_command("scancel", *jobs)
            return not jobs

        self.poll(empty, timeout, lambda: f"jobs do not end: {self.command('squeue')}")
        if self._given != (self.sacct, self.user_signal, self.settings):
            self.sacct, self.user_signal, self.settings = *self._given[:2], dict(self._given[2])
            self._restart_slurmctld(timeout)
        self.wait_idle(timeout)

    def kill_slurmd(self, node: str) -> None:
        """kill -9, as when a node loses power, except that its tasks live on."""
        pid = self.pid(f"slurmd-{node}")
        assert pid, f"slurmd of {node} does not run"
        os.kill(pid, signal.SIGKILL)
        self.poll(lambda: not self.pid(f"slurmd-{node}"), 10, f"slurmd of {node} does not end")

    def start_slurmd(self, node: str, *, wait: bool = True) -> None:
        """Start it (again). wait: until the node can take jobs."""
        self._run_daemon("slurmd", "-N", node)
        if wait:
            usable = ("idle", "mixed", "allocated", "completing")
            self.poll(lambda: self.nodes().get(node) in usable, 60, f"{node} does not come back")

    # --------------------------------------------------------------------------------------------------------- to use

    def env(self, **more: str) -> dict[str, str]:
        """The environment for programs that use this cluster: this process's own, without marks of any other."""
        kept = {k: v for k, v in os.environ.items() if not re.match(r"SLURM|SBATCH_|SALLOC_|SQUEUE_|SACCT_|SINFO_", k)}
        return {**kept, "SLURM_CONF": str(self.conf), **more}

    def command(self, *command: str, stdin: str = "", timeout: float = 60) -> str:
        """A program's standard output, stripped; AssertionError with what it said if it fails."""
        status, out, err = self.try_command(*command, stdin=stdin, timeout=timeout)
        assert status == 0, f"{' '.join(command)}: exit {status}: {err.strip() or out.strip()}"
        return out.strip()

    def try_command(self, *command: str, stdin: str = "", timeout: float = 60) -> tuple[int, str, str]:
        """A program's exit status, output and standard error."""
        done = subprocess.run(command, input=stdin, env=self.env(), capture_output=True, text=True, timeout=timeout)
        return done.returncode, done.stdout, done.stderr

    def submit(self, *options: str, script: str) -> str:
        """`sbatch OPTIONS` of a script; its job id."""
        return self.command("sbatch", "--parsable", *options, stdin=script)

    def preempt(self, nodes: int = 2, seconds: float = 600) -> str:
        """Submit a job of the partition `high` that takes whole nodes for so long; its job id. `cancel` ends it earlier."""
        options = ("--partition=high", f"--nodes={nodes}", "--exclusive", "--job-name=preemptor", "--output=/dev/null")
        return self.submit(*options, script=f"#!/bin/sh\nexec sleep {seconds:g}\n")

    def cancel(self, job: str) -> None:
        """scancel."""
        self.command("scancel", job)

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job`, of an array that of its first task; {} if Slurm does not know it (any more)."""
        status, out, err = self.try_command("scontrol", "show", "job", job)
        if status:
            assert "Invalid job id" in out + err, out + err
            return {}
        return parse_job(out)

    def wait(self, job: str, *states: str, restarts: int | None = None, timeout: float = 60) -> dict[str, str]:
        """The job once it is in one of these states (and was requeued so many times); AssertionError if it ends otherwise."""

        wanted = f"{' or '.join(states)} ({restarts=})"

        def there() -> dict[str, str] | None:
            seen = self.job(job)
            state, times = seen.get("JobState"), seen.get("Restarts")
            if state in states and restarts in (None, int(times or 0)):
                return seen
            assert state not in ENDED, f"job {job} is {state}, not {wanted}: {seen}"
            return None

        return self.poll(there, timeout, lambda: f"job {job} is not {wanted}: {self.job(job)}")

    def nodes(self) -> dict[str, str]:
        """State by name: idle, mixed, allocated, completing, down, each with a * if the node does not answer."""
        out = self.command("sinfo", "--noheader", "--Node", "--format=%N %T")
        return dict(line.split(maxsplit=1) for line in out.splitlines())

    def wait_idle(self, timeout: float = 60) -> None:
        """Until both nodes are idle."""

        def idle() -> bool:
            with contextlib.suppress(AssertionError):  # slurmctld does not answer yet
                return self.nodes() == dict.fromkeys(NODES, "idle")
            return False

        self.poll(idle, timeout, lambda: f"not idle: {self.try_command('sinfo', '--Node', '--long')}\n{self._logs()}")

    # ------------------------------------------------------------------------------------------------------ internals

    def pid(self, name: str) -> int | None:
        """The process of `munged`, `slurmctld` or `slurmd-NODE` that the pid file names, if it is still that one."""
        try:
            pid = int((self.folder / "run" / f"{name}.pid").read_text())
        except (OSError, ValueError):
            return None
        ours = host.program(pid) == name.split("-")[0] and host.environ(pid).get(b"SLURM_CONF") == bytes(self.conf)
        return pid if ours else None

    def _end(self, name: str) -> None:
        if not (pid := self.pid(name)):
            return
        for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            with contextlib.suppress(AssertionError):
                self.poll(lambda: not self.pid(name), patience, "")
                return
        raise RuntimeError(f"{name} (pid {pid}) does not end")

    def _kill(self, *, jobs_only: bool = False) -> None:
        """SIGKILL to jobs and daemons of this cluster, known by their environment. A person's shell is neither."""

        def ours() -> list[int]:
            found, spared = [], host.ancestors()
            for pid in (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
                environ = host.environ(pid)
                if environ.get(b"SLURM_CONF") == bytes(self.conf) and pid not in spared:
                    daemon = host.program(pid) in DAEMONS
                    if (b"SLURM_JOB_ID" in environ and not daemon) or (daemon and not jobs_only):
                        found.append(pid)
            return found

        def gone() -> bool:
            for pid in (found := ours()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not found

        self.poll(gone, 20, lambda: f"processes of jobs do not end: {ours()}")

    def _munged(self) -> list[str]:
        files = {"socket": "munge/sock", "key-file": "munge/key", "pid-file": "run/munged.pid"}
        files |= {"log-file": "log/munged.log", "seed-file": "munge/seed"}
        return ["munged", "--force", *(f"--{key}={self.folder / name}" for key, name in files.items())]

    def _run_daemon(self, *command: str) -> None:
        """It goes into the background by itself, with nothing of this process's but its own environment."""
        with open(self.log / "start.log", "ab") as log:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": _PATH, "SLURM_CONF": str(self.conf)},
                umask=0o022,
                start_new_session=True,
                timeout=60,
            )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{self._logs()}")

    def _write(self) -> None:
        chosen = {"sacct": self.sacct, "user_signal": self.user_signal, **self.settings}
        self.conf.write_text(slurm_conf(self.folder, NODES, self._ports, **chosen))
        (self.folder / "gres.conf").write_text(gres_conf(self.folder, NODES))

    def poll(self, condition: Callable[[], Any], timeout: float, otherwise: str | Callable[[], str]) -> Any:
        """What `condition` returned once it was true; AssertionError with `otherwise` after so many seconds."""
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"after {timeout:g} s: {otherwise if isinstance(otherwise, str) else otherwise()}")
            time.sleep(0.1)
        return found

    def _logs(self) -> str:
        """The last lines of every log."""
        last = {p.name: p.read_text(errors="replace").splitlines()[-10:] for p in sorted(self.log.glob("*.log"))}
        return "\n".join(f"{name}: {line}" for name, lines in last.items() for line in lines)


def parse_job(text: str) -> dict[str, str]:
    """`scontrol show job` as a dict, of several jobs the first; values may hold spaces."""
    found: dict[str, str] = {}
    for line in text.strip().split("\n\n")[0].splitlines():
        alone = re.search(r"(?:^|\s)(JobName|Command|WorkDir|StdErr|StdIn|StdOut|Comment)=(.*)", line)
        if alone:  # to the end of the line, whatever is in it
            found[alone[1]], line = alone[2], line[: alone.start()]
        parts = re.split(r"(?:^|\s+)([A-Z][\w:./-]*)=", line.strip())
        found |= dict(zip(parts[1::2], parts[2::2]))
    return found


# ------------------------------------------------------------------------------------------------------- command line


def main(arguments: list[str]) -> int:
    """up, down or status. Exit code 0, 1 if there is none to show, 2 if the machine lacks something."""
    if not 1 <= len(arguments) <= 2 or arguments[0] not in ("up", "down", "status"):
        print("usage: python -m tests.slurm.cluster up|down|status [FOLDER]", file=sys.stderr)
        return 2
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    try:
        slurm = Slurm(Path(arguments[1]) if len(arguments) > 1 else base_folder() / "up")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments[0] == "down":
        slurm.stop()
        print(f"stopped: {slurm.folder}")
        return 0
    if not slurm.running():
        if arguments[0] == "status":
            print(f"not running: {slurm.folder}")
            return 1
        slurm.start()
    print(slurm.command("sinfo", "--Node", "--long"))
    print(slurm.command("squeue"))
    print(f"export SLURM_CONF={slurm.conf}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
