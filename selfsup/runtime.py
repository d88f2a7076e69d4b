"""What the machine gives: device, precision, threads, determinism. Settings are put back when training ends."""

import contextlib
import ctypes
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from selfsup import dist
from selfsup.config import Config
from selfsup.errors import UserError
from selfsup.randomness import mix


def pick_device(name: str) -> torch.device:
    """'auto', 'cpu' or 'cuda' -> this rank's device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("device=cuda: torch sees no CUDA device here; use device=cpu or device=auto")
        _, _, local, local_world = dist.env_world()
        device = torch.device("cuda", device_index(local, local_world, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def device_index(local: int, local_world: int, visible: int) -> int:
    """Which of the `visible` CUDA devices is that of local rank `local` of `local_world`.

    Where each process sees one device only, as when Slurm bound a GPU to each task, it is that one; that all have the
    same is found by `placement`. Raises UserError if there are too few.
    """
    if visible == 1 and local_world > 1:
        return 0
    if local >= visible:
        raise UserError(f"local rank {local} has no GPU: torch sees {visible}; start fewer processes a node")
    return local


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware: a GPU since Ampere, a CPU with AMX or AVX-512 bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def pick_precision(name: str, device: torch.device) -> str:
    """'auto' -> 'bf16' where the hardware has it, else 'fp32'."""
    if name == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16 needs a GPU; on a CPU use bf16 or fp32")
    return name


def pick_threads(threads: int | None) -> int:
    """Compute threads of this process: its CPUs shared among the ranks on this host. Independent of loader workers."""
    if threads is not None:
        return threads
    _, world, _, local_world = dist.env_world()
    return share_of_cpus(len(os.sched_getaffinity(0)), world, local_world, os.environ)


def share_of_cpus(cpus: int, world: int, local_world: int, environ: Mapping[str, str]) -> int:
    """This rank's share of the `cpus` that its process may use; in a job of Slurm never more than those of its task.

    Where Slurm confines each task to CPUs of its own, and each rank is a task, these are not shared with other ranks.
    """
    of_task, tasks = environ.get("SLURM_CPUS_PER_TASK", ""), environ.get("SLURM_NTASKS", "")
    if not (of_task.isdecimal() and int(of_task) > 0):
        return max(1, cpus // local_world)
    confined = cpus <= int(of_task) and tasks == str(world)
    return max(1, min(cpus if confined else cpus // local_world, int(of_task)))


def resolve(config: Config) -> Config:
    """`config` with 'auto' and null replaced by what will be used."""
    device = pick_device(config.device)
    return config.model_copy(
        update={
            "device": device.type,
            "precision": pick_precision(config.precision, device),
            "threads": pick_threads(config.threads),
            "deterministic": device.type == "cpu" if config.deterministic is None else config.deterministic,
        }
    )


@contextlib.contextmanager
def settings(config: Config) -> Iterator[None]:
    """Threads and kernel choices of a resolved configuration, for the duration of a run."""
    threads = torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark = torch.backends.cudnn.benchmark
    assert config.threads is not None
    torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=config.device == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not config.deterministic
    keeps = "heap" in config.shortcuts and config.device == "cpu" and keep_freed_memory(True)
    try:
        # nothing of ours draws from torch's global generator; a user's method may, and gets the same numbers every time
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if config.device == "cuda" else []):
            torch.manual_seed(mix(config.seed, dist.rank()) >> 1)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(was_deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark
        if keeps:
            keep_freed_memory(False)


def keep_freed_memory(keep: bool) -> bool:
    """Have the C library keep what is freed, so that the next step does not wait for the kernel to clear new pages.

    glibc maps each block of more than 32 MB anew: of a step of a ViT-S on a CPU that is 3 to 7 % of the time, while the
    peak stays what it was. False: give back what is free, and be as glibc is by itself after large blocks were freed.
    Returns whether this C library can be told.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # not glibc
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    limit = 2**30 if keep else 2**25  # 32 MB is the largest threshold that glibc chooses
    done = bool(mallopt(m_mmap_threshold, limit)) and bool(mallopt(m_trim_threshold, 2 * limit - 1))
    if not keep:
        trim(0)
    return done


def autocast(config: Config) -> Any:
    """The autocast context of a resolved configuration."""
    if config.precision in ("bf16", "fp16"):
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float16
        return torch.autocast(config.device, dtype=dtype)
    return contextlib.nullcontext()


def fingerprint() -> dict[str, Any]:
    """What bitwise equality depends on beside the configuration: kernels and their versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    return {
        "torch": torch.__version__,
        "kernels": device,
        "world_size": dist.world(),
        "threads": torch.get_num_threads(),
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch (on a GPU, or its allocator on the CPU) or Python had no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
