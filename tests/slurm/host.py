"""What a cluster shares with the rest of this machine: processes, ports, and the names in /etc/hosts."""

import contextlib
import fcntl
import os
import random
import socket
from collections.abc import Sequence
from pathlib import Path

HOSTS = Path("/etc/hosts")


def program(pid: int) -> str:
    """The name of its program, without Debian's suffix; '' if it is gone."""
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name.removesuffix("-wlm")
    except OSError:
        return ""


def environ(pid: int) -> dict[bytes, bytes]:
    """The environment a process was started with; {} if it is gone."""
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    return {key: value for key, _, value in (item.partition(b"=") for item in text.split(b"\0"))}


def ancestors() -> set[int]:
    """This process and those above it."""
    found, pid = set(), os.getpid()
    while pid:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            break
    return found


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below those that the system gives to outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            found += [port] if port not in found else []
    return found


def name_nodes(names: Sequence[str], folder: Path, *, remove: bool = False) -> None:
    """Add the line of the cluster in this folder to /etc/hosts, or remove it; nothing else of the file changes."""
    line = f"127.0.0.1 {' '.join(names)} # the test Slurm in {folder}"
    with open(HOSTS, "r+", encoding="utf-8", errors="surrogateescape", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = text = file.read()
        lines = [each.rstrip("\r\n") for each in text.splitlines(keepends=True)]
        if remove:
            text = text.replace(f"{line}\n", "").removesuffix(f"\n{line}")
        elif line not in lines:
            text += f"{line}\n" if text.endswith("\n") or not text else f"\n{line}"
        if text != before:  # in place: in a container the file cannot be replaced
            file.seek(0)
            file.write(text)
            file.truncate()
    if not remove:
        for node in names:
            if (address := socket.gethostbyname(node)) != "127.0.0.1":
                raise RuntimeError(f"{node} is {address} on this machine; the test Slurm needs it to be 127.0.0.1")
