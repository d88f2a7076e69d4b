"""Which rank this process is, and where: from Slurm's variables, or from those that the local supervisor sets."""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from selfsup.errors import UserError

LOCAL_HOST = "127.0.0.1"
OF_A_RANK = {"RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
OF_A_RANK |= {"SELFSUP_JOB", "SELFSUP_RESTART"}
"""Variables that `export` sets: a rank that starts another job must not hand them on."""


@dataclass(frozen=True)
class Place:
    """A rank among the others of its job."""

    job: str
    """12, of a run of an array 12_3, without Slurm local-..."""
    restart: int
    """How often the job was requeued."""
    rank: int
    world: int
    local_rank: int
    local_world: int
    """Ranks on this node."""
    node_rank: int
    node: str
    """The name of this node."""
    hosts: tuple[str, ...]
    """Of each rank, the host that the scheduler puts it on: `world` names."""

    @property
    def key(self) -> str:
        """Of this incarnation of the job."""
        return f"{self.job}.{self.restart}"

    @property
    def main_host(self) -> str:
        """Where rank 0 is."""
        return self.hosts[0]


def find(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process. Raises UserError naming a variable that is missing or is no number."""
    if "SLURM_PROCID" in environ and "SLURM_JOB_ID" in environ:
        return _of_slurm(environ)
    if "RANK" in environ:
        return _of_supervisor(environ)
    raise UserError(
        "not in a job: neither SLURM_PROCID and SLURM_JOB_ID nor RANK is set; use `selfsup submit` or `train`"
    )


def _of_slurm(environ: Mapping[str, str]) -> Place:
    job = environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environ:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{_number(environ, 'SLURM_ARRAY_TASK_ID')}"
    rank, world, node_rank = (_number(environ, name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODEID"))
    # those of the step count: a job may have nodes that the step does not use
    nodes = expand_hosts(_first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    counts = expand_counts(_first(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if len(nodes) != len(counts) or sum(counts) != world or node_rank >= len(nodes) or rank >= world:
        raise UserError(
            f"Slurm's variables do not agree: SLURM_NTASKS={world}, SLURM_PROCID={rank}, SLURM_NODEID={node_rank}, "
            f"nodes {','.join(nodes)} with {','.join(map(str, counts))} tasks"
        )
    return Place(
        job=job,
        restart=_number(environ, "SLURM_RESTART_COUNT", "0"),
        rank=rank,
        world=world,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world=counts[node_rank],
        node_rank=node_rank,
        node=environ.get("SLURMD_NODENAME", nodes[node_rank]),
        hosts=_lay_out(nodes, counts, cyclic=environ.get("SLURM_DISTRIBUTION", "").startswith("cyclic")),
    )


def _of_supervisor(environ: Mapping[str, str]) -> Place:
    rank, world, local, local_world = (
        _number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if not rank < world or not local < local_world:
        raise UserError(f"RANK={rank} of WORLD_SIZE={world}, LOCAL_RANK={local} of LOCAL_WORLD_SIZE={local_world}")
    return Place(
        job=_first(environ, "SELFSUP_JOB"),
        restart=_number(environ, "SELFSUP_RESTART"),
        rank=rank,
        world=world,
        local_rank=local,
        local_world=local_world,
        node_rank=_number(environ, "GROUP_RANK", "0"),
        node=socket.gethostname(),
        hosts=(LOCAL_HOST,) * world,
    )


def export(place: Place, port: int | None = None) -> None:
    """Set the variables that torchrun would, and those of the incarnation; devices stay as the scheduler gave them.

    port: of the store where the ranks have met; None before that.
    """
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world),
        LOCAL_RANK=str(place.local_rank),
        LOCAL_WORLD_SIZE=str(place.local_world),
        GROUP_RANK=str(place.node_rank),
        MASTER_ADDR=place.main_host,
        SELFSUP_JOB=place.job,
        SELFSUP_RESTART=str(place.restart),
    )
    if port is None:
        os.environ.pop("MASTER_PORT", None)
    else:
        os.environ["MASTER_PORT"] = str(port)


def expand_hosts(text: str) -> tuple[str, ...]:
    """'n[1-2,05-07],gpu3' -> its names, as `scontrol show hostnames` says; a container need not have that program."""
    found: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        names = [""]
        for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", item):
            ends = [part] if part[0] != "[" else list(_numbers(part[1:-1], text))
            names = [name + end for name in names for end in ends]
        found += names
    if not found:
        raise UserError(f"no list of nodes: {text!r}")
    return tuple(found)


def _numbers(ranges: str, text: str) -> Iterator[str]:
    for item in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None:
            raise UserError(f"no list of nodes: {text!r}")
        first, last = match[1], match[2] or match[1]
        yield from (f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1))


def expand_counts(text: str) -> tuple[int, ...]:
    """'2(x3),1' -> (2, 2, 2, 1)."""
    found: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise UserError(f"SLURM_TASKS_PER_NODE={text!r}: expected counts like 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return tuple(found)


def _lay_out(nodes: tuple[str, ...], counts: tuple[int, ...], cyclic: bool) -> tuple[str, ...]:
    """The host of each rank: node after node, or one on each in turn."""
    placed = [(place, node) for node, count in enumerate(counts) for place in range(count)]
    return tuple(nodes[node] for _, node in (sorted(placed) if cyclic else placed))


def _first(environ: Mapping[str, str], *names: str) -> str:
    for name in names:
        if environ.get(name):
            return environ[name]
    raise UserError(f"{names[-1]} is not set: this is no task that the scheduler started")


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None:
        raise UserError(f"{name} is not set: this is no task that the scheduler started")
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name}={text!r}: expected a number")
    return int(text)
