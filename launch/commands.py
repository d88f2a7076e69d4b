"""The lines of shell that a job consists of: what its tasks run, and what its script does when they have ended."""

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from .cluster import Cluster


def training(folder: Path, cluster: Cluster, code: Path) -> str:
    """Of each rank. folder: of the run, or of the sweep, whose job array takes its own run from it."""
    return selfsup(cluster, code, "job", "train", str(folder.absolute()))


def evaluation(folder: Path, cluster: Cluster, code: Path, task: str, overrides: Iterable[str] = ()) -> str:
    """`selfsup eval` of the run, or of each run of a sweep."""
    return selfsup(cluster, code, "job", "eval", str(folder.absolute()), task, *overrides)


def table(folder: Path, cluster: Cluster, code: Path) -> str:
    """The table of a sweep."""
    return selfsup(cluster, code, "job", "table", str(folder.absolute()))


def afterwards(folder: Path, cluster: Cluster, code: Path, task: str) -> list[str]:
    """What follows srun: the decision whether the job goes on in another one, and its exit code. On the host itself."""
    python = cluster.host_python or ("python3" if cluster.container else sys.executable)
    policy = cluster.requeue
    options = {
        "task": task,
        "timeouts": "unlimited" if policy.timeouts is None else policy.timeouts,
        "crashes": policy.crashes,
        "delay": f"{policy.delay_s:g}",
        "max-delay": f"{policy.max_delay_s:g}",
        "signal-before": cluster.signal_before_s,
    }
    # -E: not with the variables that lines of `setup` have set for the Python of the tasks
    words = [python, "-E", str(code.absolute() / "selfsup/launch/requeue.py"), str(folder.absolute())]
    words += [f"--{name}={value}" for name, value in options.items()]
    # ignored from here on, also while Python starts: it decides although the job is told to end
    return ["code=$?", "trap '' TERM USR1 USR2", f"exec {shlex.join(words)} --code=$code"]


def selfsup(cluster: Cluster, code: Path, *words: str) -> str:
    """`python -m selfsup.cli` with the code of the snapshot.

    -P: the working directory, which may be a clone, is no place to take it from. -u: logs are read while they are written.
    """
    path = f"PYTHONPATH={shlex.quote(str(code.absolute()))}" + '"${PYTHONPATH:+:$PYTHONPATH}"'
    command = shlex.join([cluster.python or sys.executable, "-P", "-u", "-m", "selfsup.cli", *words])
    return f"env {path} {command}"
