"""Which rank computes where: said once at the start of a run of several processes, and refused if two share a GPU.

Such a run would not fail by itself, or only in words of the communication library; it would be slow.
"""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from selfsup import dist
from selfsup.errors import UserError

_SHOWN = 64


@dataclass(frozen=True)
class Place:
    """Where one rank computes."""

    host: str
    """Slurm's name of the node, else the host's own."""
    device: str
    """As in 'cpu' and 'cuda:0 NVIDIA H200'."""
    uuid: str = ""
    """'GPU-...', the same for one device under whatever index; '' where there is none."""

    @classmethod
    def current(cls, device: torch.device) -> "Place":
        """That of this process, which computes on `device`."""
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        if device.type != "cuda":
            return cls(host, str(device))
        properties = torch.cuda.get_device_properties(device)
        uuid = str(getattr(properties, "uuid", ""))
        return cls(host, f"{device} {properties.name}", f"GPU-{uuid}" if uuid else "")

    def __str__(self) -> str:
        return f"{self.host} {self.device}" + (f" ({self.uuid})" if self.uuid else "")


def survey(device: torch.device) -> list[str]:
    """Ask every rank where it computes: lines for people, one a rank; [] for a single process. All ranks call it.

    Raises UserError, on every rank, if two compute on one GPU.
    """
    if dist.world() == 1:
        return []
    places = [Place(**json.loads(text)) for text in dist.gather_texts(json.dumps(asdict(Place.current(device))))]
    check(places)
    return lines(places)


def check(places: Sequence[Place]) -> None:
    """Raise UserError if two ranks (the index is the rank) have the same GPU."""
    first: dict[str, int] = {}
    for rank, place in enumerate(places):
        if not place.uuid:
            continue
        other = first.setdefault(place.uuid, rank)
        if other != rank:
            raise UserError(
                f"ranks {other} and {rank} both compute on {place}; one rank a GPU is right:\n"
                "at most as many processes (tasks_per_node) as GPUs on a node, or a GPU binding that gives each task its own"
            )


def lines(places: Sequence[Place]) -> list[str]:
    """'rank 0: n1 cuda:0 NVIDIA H200 (GPU-...)' for each of the first 64 ranks, and how many more there are."""
    shown = [f"rank {rank}: {place}" for rank, place in enumerate(places[:_SHOWN])]
    return shown + ([f"and {len(places) - _SHOWN} more ranks"] if len(places) > _SHOWN else [])
