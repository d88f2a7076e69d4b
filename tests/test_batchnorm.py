"""Synchronised batch norm: two processes with half a batch each equal one with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from selfsup.batchnorm import SyncedBatchNorm, synchronise

WORKER = """
import sys, torch
import torch.distributed as td
from tests.test_batchnorm import compute
td.init_process_group("gloo")
rank, world = td.get_rank(), td.get_world_size()
compute(sys.argv[1], int(sys.argv[2]), rank, world)
td.barrier()
td.destroy_process_group()
"""


def make() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        BatchNormAct2d(6),
        nn.Flatten(),
        nn.BatchNorm1d(96),
    )
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    return net.double()


def compute(out: str, batch: int, rank: int, world: int) -> None:
    """One forward and backward of this rank's part; gradients are summed over ranks and saved with the state by rank 0."""
    net = make()
    assert synchronise(net) == 3
    images = torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = net(images.chunk(world)[rank])
    (y * torch.linspace(-1, 1, y.shape[1], dtype=torch.float64)).square().sum().backward()
    grads = [p.grad for p in net.parameters()]
    if world > 1:
        for g in grads:
            torch.distributed.all_reduce(g)
    if rank == 0:
        torch.save({"grads": grads, "state": net.state_dict()}, out)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one_process(tmp_path: Path, world: int) -> None:
    batch = 12
    compute(str(tmp_path / "one.pt"), batch, 0, 1)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(script)]
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [*command, str(tmp_path / "many.pt"), str(batch)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    one, many = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "many"))
    for a, b in zip(one["grads"], many["grads"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for key, value in one["state"].items():
        torch.testing.assert_close(value, many["state"][key], rtol=1e-9, atol=1e-9, msg=key)


def test_one_process_is_torchs_own() -> None:
    """At world size 1 nothing changes, bit for bit, nor does the class hierarchy or the state's names."""
    plain, synced = make(), make()
    names = list(plain.state_dict())
    synchronise(synced)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(plain(x), synced(x))
    assert list(synced.state_dict()) == names
    kinds = [type(m) for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(issubclass(k, SyncedBatchNorm) for k in kinds) and issubclass(kinds[1], BatchNormAct2d)
