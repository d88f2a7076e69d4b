"""What srun does on a cluster, for one machine: the ranks of one start of a job, their logs, signals and exit codes.

Of the standard library alone and run by its path, after the setup lines of the cluster, by the supervisor's Python:

    python -I local_ranks.py --count 2 --logs LOGS/JOB --parent PID 'COMMAND of a rank, a line of shell'

TERM, INT and HUP reach the ranks as TERM, USR1 and USR2 as they are; QUIT kills them. When one has ended with an error the
others are told to end, and killed if they do not, as without their parent. The exit code is that of the first which failed.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from types import FrameType

PATIENCE_S = 30.0
"""Between being told to end and being killed."""
_POLL_S = 0.05


class Ranks:
    """The processes, each the leader of its own group, to which its loader workers belong."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._kill_at = float("inf")
        self._early: list[int] | None = []
        """Signals until all are started."""

    def start(self, command: str, count: int, logs: str) -> None:
        """All of them, or none."""
        try:
            for rank in range(count):
                self.processes.append(self._start(command, rank, count, logs))
        except OSError:
            self.send(signal.SIGKILL)
            raise
        early, self._early = self._early or [], None
        for number in early:
            self.on_signal(number, None)

    def _start(self, command: str, rank: int, count: int, logs: str) -> "subprocess.Popen[bytes]":
        place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
        with open(f"{logs}_{rank}_log.out", "ab", buffering=0) as log:
            return subprocess.Popen(
                ["/bin/bash", "-c", f"exec {command}"],
                env={**os.environ, **{name: str(value) for name, value in place.items()}},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def send(self, number: int) -> None:
        """To every process of every rank: of one that has ended, its workers may be left."""
        for process in self.processes:
            if process.poll() is None or number == signal.SIGKILL:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """As Slurm does: to all ranks."""
        if self._early is not None:
            self._early.append(number)
        elif number == signal.SIGQUIT:
            self.send(signal.SIGKILL)
        else:
            self.send(number if number in (signal.SIGUSR1, signal.SIGUSR2) else signal.SIGTERM)

    def end(self) -> None:
        """Tell those that run to end, and have them killed some time later."""
        if self._kill_at == float("inf"):
            self._kill_at = time.monotonic() + PATIENCE_S
            self.send(signal.SIGTERM)

    def wait(self, parent: int) -> int:
        """0, or the exit code of the first that failed: those that it takes along may die of being told to.

        128 + n for one that was killed by signal n; the highest, if several have failed at once.
        """
        first = 0
        while True:
            codes = [process.poll() for process in self.processes]
            first = first or max((128 - code if code < 0 else code for code in codes if code is not None), default=0)
            if None not in codes:
                break
            if first or os.getppid() != parent:
                self.end()
            if time.monotonic() > self._kill_at:
                self.send(signal.SIGKILL)
            time.sleep(_POLL_S)
        self.send(signal.SIGKILL)
        return first


def main(argv: list[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Run the ranks of one start of a job on this machine.")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--logs", required=True, help="start of the names of logs")
    parser.add_argument("--parent", type=int, required=True, help="the supervisor's process id")
    parser.add_argument("command")
    given = parser.parse_args(argv)
    ranks = Ranks()
    for number in ("TERM", "INT", "HUP", "USR1", "USR2", "QUIT"):
        signal.signal(getattr(signal, f"SIG{number}"), ranks.on_signal)
    ranks.start(given.command, given.count, given.logs)
    return ranks.wait(given.parent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
