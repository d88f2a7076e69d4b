"""The process group, from the environment that torchrun (or selfsup.launch) exports; identities at world size 1."""

import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as td
import torch.distributed.nn.functional
from torch import Tensor, nn

from selfsup.errors import DiskError, UserError

_side: Any = None  # gloo, for agreements between hosts that must not touch the accelerator
_background: Any = None  # gloo, for the threads that write checkpoints
_store: tuple[td.Store, int, int] | None = None  # for the next `init`


def env_world() -> tuple[int, int, int, int]:
    """(rank, world, local rank, ranks on this host) from the environment; (0, 1, 0, 1) for a plain process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return (
        int(os.environ.get("RANK", "0")),
        world,
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", str(world))),
    )


def use_store(store: td.Store, rank: int, world: int) -> None:
    """Have the next `init` meet the other ranks in this store, which all have joined, and not at MASTER_ADDR.

    It is used once: a later `init` in this process goes by the environment again.
    """
    global _store
    _store = (store, rank, world)


def init(device: torch.device, timeout_s: float = 1800) -> None:
    """Join the process group named in the environment, if there is one; through the store of `use_store`, if one was given.

    timeout_s: how long ranks wait for one another in a step. On the host they wait longer, as while rank 0 alone evaluates
    or writes: it is the watchdog that tells this from a hang.
    """
    global _side, _background, _store
    rank, world, _, _ = env_world()
    if world == 1 or td.is_initialized():
        return
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if _store is None:
        td.init_process_group(backend, timeout=timeout)
    else:
        store, *place = _store
        if place != [rank, world]:
            raise ValueError(f"the store is that of rank {place[0]} of {place[1]}, the environment's {rank} of {world}")
        _store = None
        store.set_timeout(timeout)
        td.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    patient = max(timeout, datetime.timedelta(days=1))
    _side = td.new_group(backend="gloo", timeout=patient)
    _background = td.new_group(backend="gloo", timeout=patient)


def shutdown() -> None:
    """Leave together, so that no rank's exit aborts another's."""
    global _side, _background
    if td.is_initialized():
        td.barrier()
        td.destroy_process_group()
        _side = _background = None


def rank() -> int:
    """This process's rank."""
    return td.get_rank() if td.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return td.get_world_size() if td.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one that writes files."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank (on the host, not the accelerator)."""
    if td.is_initialized():
        td.barrier(group=_side)


def all_reduce_(tensor: Tensor, op: str = "sum") -> Tensor:
    """Reduce in place over ranks: 'sum', 'min' or 'max'."""
    if td.is_initialized():
        td.all_reduce(tensor, op=getattr(td.ReduceOp, op.upper()))
    return tensor


def all_gather(tensor: Tensor) -> Tensor:
    """Concatenate [N, ...] of equal shape from every rank -> [world * N, ...]."""
    if not td.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world())]
    td.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """torch's own receives gradients over gloo into memory laid out as theirs: wrong, in silence, unless contiguous."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = all_reduce_(grads[0].clone(memory_format=torch.contiguous_format))  # [world * N, ...]
        return total.chunk(world())[rank()]


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """`all_gather` that is differentiated: a rank's part gets the sum of what every rank's loss says of it.

    Gradients are averaged over ranks (`GradientReducer`): let each rank's loss be the mean over its own anchors, and the
    average is the gradient of the mean over all of them, as one process would compute it.
    """
    if not td.is_initialized():
        return tensor
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


def mean_with_grad(tensor: Tensor) -> Tensor:
    """The mean over ranks of a tensor of equal shape, differentiated, for a loss that is the same function of it on each.

    A rank's part gets what one rank's loss says of the mean; averaged over ranks, as gradients are, that is the gradient that
    one process would compute.
    """
    if not td.is_initialized():
        return tensor
    return torch.distributed.nn.functional.all_reduce(tensor) / world()


def agree(value: int) -> int:
    """The largest of the ranks' integers, through the host-side group."""
    if not td.is_initialized():
        return value
    flag = torch.tensor([value])
    td.all_reduce(flag, op=td.ReduceOp.MAX, group=_side)
    return int(flag.item())


def gather_bytes(own: bytes) -> list[bytes]:
    """Every rank's bytes, of equal length, in rank order. For background threads: it has a group of its own."""
    if not td.is_initialized():
        return [own]
    mine = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(world())]
    td.all_gather(parts, mine, group=_background)
    return [bytes(part.tolist()) for part in parts]


def gather_texts(own: str) -> list[str]:
    """Every rank's text, in rank order, through the host-side group."""
    if not td.is_initialized():
        return [own]
    data = own.encode()
    padded = data.ljust(agree(len(data)), b"\0")
    mine = torch.frombuffer(bytearray(padded or b"\0"), dtype=torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(world())]
    td.all_gather(parts, mine, group=_side)
    return [bytes(part.tolist()).rstrip(b"\0").decode() for part in parts]


def start_agreement(value: int) -> tuple[Tensor, td.Work]:
    """Begin to exchange an integer over the host-side group: (tensor that will hold the maximum, work to wait for)."""
    flag = torch.tensor([value])
    work = td.all_reduce(flag, op=td.ReduceOp.MAX, group=_side, async_op=True)
    assert work is not None
    return flag, work


def raise_together(error: BaseException | None, what: str) -> None:
    """Raise `error` here, and a short UserError (DiskError if one was) on the ranks where there was none."""
    failed = agree(0 if error is None else 2 if isinstance(error, DiskError) else 1)
    if error is not None:
        raise error
    if failed:
        raise (DiskError if failed == 2 else UserError)(f"{what} failed on another rank; its message says why")


def broadcast_module(module: nn.Module) -> None:
    """Rank 0's parameters and buffers on every rank."""
    if td.is_initialized():
        for tensor in [*module.parameters(), *module.buffers()]:
            td.broadcast(tensor.data, src=0)


class GradientReducer:
    """Averages gradients over ranks through buckets of a fixed layout, overlapped with the backward pass.

    torch's DDP rebuilds its buckets after the first step in the order gradients arrived, which changes the order of
    sums and so breaks a bitwise resume; here the layout depends on the parameters alone. A bucket none of whose
    parameters received a gradient (a last layer that is frozen) is not reduced, on any rank.

    All ranks must run the same graph, which holds because a step's frozen parameters are a function of the step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], bucket_bytes: int = 25 << 20) -> None:
        self.buckets: list[list[nn.Parameter]] = []
        size = 0
        for p in reversed([p for p in parameters if p.requires_grad]):  # about the order of the backward pass
            if not self.buckets or size + p.nbytes > bucket_bytes or self.buckets[-1][0].dtype != p.dtype:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.nbytes
        self._owner = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self._armed = False
        self._arrived: list[int] = []
        self._work: dict[int, tuple[Tensor, list[nn.Parameter], td.Work]] = {}
        if world() > 1:
            for p in self._owner:
                p.register_post_accumulate_grad_hook(self._on_gradient)

    def arm(self) -> None:
        """Call before the backward pass whose gradients complete the step."""
        self._armed = world() > 1
        self._arrived = [0] * len(self.buckets)
        self._work = {}
        self._next = 0

    def _on_gradient(self, p: nn.Parameter) -> None:
        if not self._armed:
            return
        self._arrived[self._owner[p]] += 1
        # in index order, so that every rank starts its collectives in the same order
        while self._next < len(self.buckets) and self._arrived[self._next] == len(self.buckets[self._next]):
            self._launch(self._next)
            self._next += 1

    def _launch(self, index: int) -> None:
        present = [p for p in self.buckets[index] if p.grad is not None]
        if not present:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in present if p.grad is not None])
        flat.div_(world())
        work = td.all_reduce(flat, async_op=True)
        assert work is not None
        self._work[index] = (flat, present, work)

    def finish(self) -> None:
        """Wait for every bucket and put the averages where the gradients were."""
        if not self._armed:
            return
        for index in range(self._next, len(self.buckets)):
            self._launch(index)
        for flat, present, work in self._work.values():
            work.wait()
            parts = flat.split([p.numel() for p in present])
            grads = [p.grad for p in present if p.grad is not None]
            torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])
        self._work = {}
        self._armed = False
