"""What this machine gives: CPUs, memory, devices, and the disk that a run folder will be on."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from selfsup.runtime import has_fast_bf16

_UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Device:
    """A GPU that torch sees."""

    name: str
    memory: int
    """Bytes."""
    free: int
    bf16: bool
    """Whether it computes in bf16 in hardware."""


@dataclass(frozen=True)
class Machine:
    """Bytes, and counts of what this process may use."""

    cpu: str
    cpus: int
    bf16: bool
    """Whether the CPU multiplies matrices in bf16 in hardware."""
    memory: int
    free: int
    disk: str
    """The folder that was asked about, or the nearest above it that exists."""
    disk_size: int
    disk_free: int
    shared_free: int | None
    """Of /dev/shm, through which loader workers hand over batches; None where there is none."""
    gpus: tuple[Device, ...] = ()


def look(out: Path) -> Machine:
    """At this machine. out: where a run folder is to be."""
    memory, free = _memory()
    folder = out.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    shm = Path("/dev/shm")
    return Machine(
        cpu=_cpu_name(),
        cpus=_cpus(),
        bf16=has_fast_bf16(torch.device("cpu")),
        memory=memory,
        free=free,
        disk=str(folder),
        disk_size=disk.total,
        disk_free=disk.free,
        shared_free=shutil.disk_usage(shm).free if shm.is_dir() else None,
        gpus=tuple(_gpu(i) for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else (),
    )


def _gpu(index: int) -> Device:
    device = torch.device("cuda", index)
    free, total = torch.cuda.mem_get_info(device)
    with torch.cuda.device(device):
        bf16 = has_fast_bf16(device)
    return Device(torch.cuda.get_device_name(device), total, free, bf16)


def _cpus() -> int:
    """Those that this process may run on, and no more than its control group's quota allows."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = (_of_group("cpu.max") or "").split()
    if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
        count = min(count, max(1, -(-int(words[0]) // int(words[1]))))
    return count


def _memory() -> tuple[int, int]:
    """(in all, free) bytes: the machine's, or less if the control group of this process has a limit."""
    fields = {}
    for line in (_read("/proc/meminfo") or "").splitlines():
        key, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            fields[key] = int(words[0]) * 1024
    total, free = fields.get("MemTotal", 0), fields.get("MemAvailable", 0)
    limit, used = _of_group("memory.max"), _of_group("memory.current")
    if limit and limit.isdecimal() and int(limit) < min(total or _UNLIMITED, _UNLIMITED):
        total = int(limit)
        if used and used.isdecimal():
            free = min(free, max(0, total - int(used)))
    return total, free


def _of_group(name: str) -> str | None:
    """A file of this process's control group (version 2), or of the root as a container sees it."""
    path = next((line[3:] for line in (_read("/proc/self/cgroup") or "").splitlines() if line.startswith("0::")), "/")
    return _read(f"/sys/fs/cgroup{path.rstrip('/')}/{name}") or _read(f"/sys/fs/cgroup/{name}")


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None


def _cpu_name() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
