"""Two and three processes over gloo: gradients, agreements, signals and checkpoints are those of one; alone: identities."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from selfsup import dist
from selfsup.checkpoint import load, newest_valid, verify
from selfsup.errors import UserError

PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from selfsup import checkpoint, dist, durable
from selfsup.checkpoint_writer import Writer, save
from selfsup.errors import DiskError, UserError
from selfsup.signals import StopSignals

folder = Path(sys.argv[1])
dist.init(torch.device("cpu"), timeout_s=30)
rank, world = dist.rank(), dist.world()

def report(**values):
    (folder / f"{rank}.json").write_text(json.dumps(values))
"""


def start(script: str, folder: Path, world: int, timeout: float = 60) -> list[dict[str, Any]]:
    """Run `script` in `world` processes; what each reported. Processes that hang are killed, and fail the test."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    code = PRELUDE + textwrap.dedent(script) + "\ndist.shutdown()\n"
    processes = []
    for rank in range(world):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-c", code, str(folder)]
        processes.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = []
    try:
        for process in processes:
            errors.append(process.communicate(timeout=timeout)[1])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert all(p.returncode == 0 for p in processes), "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


REDUCER = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.frozen = nn.Parameter(torch.randn(5, 5), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(7))
        self.first_only = nn.Parameter(torch.randn(8))
        self.last = nn.Linear(3, 4)
        self.single = nn.Parameter(torch.randn(3, dtype=torch.float32))  # another type: a bucket of its own

    def forward(self, x, micro, with_last):
        h = self.a(x).tanh()
        h = self.b(h).tanh() + self.b(h + 1).tanh()  # used twice in one graph, as a student's backbone is
        if micro == 0:
            h = h * self.first_only
        h = self.c(h) * self.single
        return (self.last(h) if with_last else h).pow(2).sum()

torch.manual_seed(0)
net = Net().double()
net.single.data = net.single.data.float()
data = torch.randn(3, 2, 12, 6, dtype=torch.float64)  # [steps, micro-batches, images, features]
reducer = dist.GradientReducer(list(net.parameters()), bucket_bytes=300)
share = 12 // world
found, digests, unarmed = [], [], None
for repeat in range(2):
    for step in range(3):
        with_last = step != 1  # a whole bucket without gradients in between, as frozen prototypes are
        for p in net.parameters():
            p.grad = None
        for micro in range(2):
            x = data[step, micro]
            if micro == 1:
                unarmed = net.a.weight.grad.clone()
                reducer.arm()
            (net(x[rank * share : (rank + 1) * share], micro, with_last) / share / 2).backward()
        reducer.finish()
        ours = {k: None if p.grad is None else p.grad.clone() for k, p in net.named_parameters()}
        digests.append(str([None if g is None else g.double().numpy().tobytes().hex() for g in ours.values()]))
        if repeat:
            continue

        net.zero_grad(set_to_none=True)
        total = sum(net(data[step, micro], micro, with_last) / 12 / 2 for micro in range(2))
        total.backward()  # the reducer is not armed: a plain gradient over the whole batch
        for k, p in net.named_parameters():
            assert (p.grad is None) == (ours[k] is None), k
            if p.grad is not None:
                rtol = 1e-5 if p.dtype == torch.float32 else 1e-12
                torch.testing.assert_close(ours[k], p.grad, rtol=rtol, atol=rtol / 10, msg=k)
assert digests[:3] == digests[3:], "the same step twice gave other bits"
assert net.unused.grad is None and net.frozen.grad is None

# one micro-batch only, reduced: what was accumulated before arming was this rank's own
own = torch.autograd.grad(net(data[2, 0, rank * share : (rank + 1) * share], 0, True) / share / 2, net.a.weight)[0]
assert torch.equal(own, unarmed)
layout = [[next(n for n, q in net.named_parameters() if q is p) for p in bucket] for bucket in reducer.buckets]
report(digests=digests, layout=layout)
"""


@pytest.mark.parametrize("world", [2, 3])
def test_gradient_reducer_equals_one_process(tmp_path: Path, world: int) -> None:
    """Two micro-batches a step, a parameter without gradient, one with a gradient in the first micro-batch only, a frozen
    one, one used twice, two types, and a bucket that is empty in one step: float64 to 1e-12, the same bits on every rank."""
    found = start(REDUCER, tmp_path, world)
    assert all(f == found[0] for f in found)
    assert len(found[0]["layout"]) >= 4
    assert ["single"] in found[0]["layout"]


COLLECTIVES = """
t = torch.tensor([float(rank + 1), 10.0 * rank])
values = {op: dist.all_reduce_(t.clone(), op).tolist() for op in ("sum", "min", "max")}
gathered = dist.all_gather(torch.full((2, 3), rank)).tolist()
agreed = [dist.agree(rank * 10), dist.agree(0), dist.agree(int(rank == 1))]

torch.manual_seed(rank)
net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
net(torch.randn(4 + rank, 3))
net[1].num_batches_tracked += rank
dist.broadcast_module(net)

messages = []
for failing, kind in ((None, UserError), (0, UserError), (1, UserError), (1, DiskError)):
    try:
        dist.raise_together(kind(f"mine {rank}") if rank == failing else None, "the thing")
        messages.append("fine")
    except UserError as error:
        assert type(error) is kind
        messages.append(str(error))

# rank 1 alone is asked to stop in its third step: every rank stops at the same one
stops = []
with StopSignals() as signals:
    for step in range(8):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01 * rank)
        if signals.agreed():
            stops.append(step)
            break
    signals.finish()
report(values=values, gathered=gathered, agreed=agreed, messages=messages, stops=stops,
       net={k: v.tolist() for k, v in net.state_dict().items()})
"""


def test_collectives_agreements_and_signals(tmp_path: Path) -> None:
    found = start(COLLECTIVES, tmp_path, 3)
    for rank, f in enumerate(found):
        assert f["values"] == {"sum": [6, 30], "min": [1, 0], "max": [3, 20]}
        assert f["gathered"] == [[r] * 3 for r in (0, 0, 1, 1, 2, 2)]
        assert f["agreed"] == [20, 0, 1]
        assert f["net"] == found[0]["net"]
        assert f["messages"][0] == "fine"
        for failing, message in zip((0, 1, 1), f["messages"][1:]):
            assert message == (
                f"mine {rank}" if rank == failing else "the thing failed on another rank; its message says why"
            )
        assert f["stops"] == found[0]["stops"] and f["stops"][0] in (3, 4)
    assert found[0]["net"]["1.num_batches_tracked"] == 1


SAVE = """
torch.manual_seed(rank)
torch.rand(rank + 1)
cpu = torch.device("cpu")
state = lambda step: checkpoint.State({"w": torch.full((3,), float(step))}, {}, checkpoint.rng_state(cpu), {"step": step})
root = folder / "checkpoints"
for step in (1, 2):
    save(root, step, state(step))
expected = torch.rand(4).tolist()

messages = []
if rank == world - 1:  # its disk is full
    def full(*args):
        raise OSError(28, "No space left on device")
    durable.write, real = full, durable.write
try:
    save(root, 3, state(3))
except UserError as error:
    messages.append(str(error))
if rank == world - 1:
    durable.write = real
save(root, 4, state(4))
writer = Writer(root, checkpoint.Retention(3))
writer.save(6, state(6))
writer.wait()
report(expected=expected, messages=messages, copied=sorted(writer._host))
"""


def test_checkpoint_by_two_ranks(tmp_path: Path) -> None:
    """Each rank's generator is in its own file; a rank whose disk is full stops the save on all, and the next one works."""
    found = start(SAVE, tmp_path, 2)
    folder, problems = newest_valid(tmp_path / "checkpoints")
    assert folder is not None and folder.name == "step_00000006" and problems == []
    steps = [f"step_{step:08d}" for step in (2, 4, 6)]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", *steps]
    assert verify(folder)["world_size"] == 2
    for rank, f in enumerate(found):
        before = torch.get_rng_state()
        torch.set_rng_state(load(tmp_path / "checkpoints" / "step_00000002", rank).rank["rng.torch"])
        assert torch.rand(4).tolist() == f["expected"]
        torch.set_rng_state(before)
        assert len(f["messages"]) == 1
        assert (f["copied"] == ["rank/rng.torch"]) is (rank > 0), "host memory for what another rank writes"
    assert "No space left" in found[1]["messages"][0] and "another rank" in found[0]["messages"][0]


MAIN_FAILS = """
state = checkpoint.State(model={"w": torch.ones(3)}, optimizer={}, rank=checkpoint.rng_state(torch.device("cpu")), trainer={})
root = folder / "checkpoints"
save(root, 1, state)
messages = []
for at in ("make_folder", "rename"):
    if rank == 0:
        def full(*args):
            raise OSError(28, "No space left on device")
        real = getattr(durable, at)
        setattr(durable, at, full)
    try:
        save(root, 2, state)
    except UserError as error:
        messages.append(str(error))
    if rank == 0:
        setattr(durable, at, real)
report(messages=messages)
"""


def test_checkpoint_whose_main_rank_fails(tmp_path: Path) -> None:
    """Before or after the other ranks write: a message on every rank, and nobody waits for ever."""
    found = start(MAIN_FAILS, tmp_path, 2, timeout=45)
    assert [len(f["messages"]) for f in found] == [2, 2]
    assert all("No space left" in m for m in found[0]["messages"])
    folder, _ = newest_valid(tmp_path / "checkpoints")
    assert folder is not None and folder.name == "step_00000001"


# ----------------------------------------------------------------------------------------------------------------- alone


def test_identities_in_one_process() -> None:
    dist.init(torch.device("cpu"))  # no environment: no group
    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)
    t = torch.arange(3.0)
    assert dist.all_gather(t) is t and dist.all_reduce_(t, "min") is t
    assert torch.equal(t, torch.arange(3.0)) and dist.agree(7) == 7
    dist.barrier()
    dist.broadcast_module(nn.Linear(2, 2))
    dist.raise_together(None, "x")
    with pytest.raises(UserError, match="mine"):
        dist.raise_together(UserError("mine"), "x")
    dist.shutdown()


def test_reducer_alone_leaves_gradients_alone() -> None:
    net = nn.Linear(3, 2)
    reducer = dist.GradientReducer(list(net.parameters()))
    reducer.arm()
    net(torch.ones(1, 3)).sum().backward()
    before = net.weight.grad.clone()
    reducer.finish()
    assert torch.equal(net.weight.grad, before)
    assert not net.weight._post_accumulate_grad_hooks  # and costs nothing


def test_buckets_are_fixed_and_bounded() -> None:
    """The layout depends on the parameters alone: about the order of the backward pass, within the size, one type each."""
    parameters = [nn.Parameter(torch.zeros(n)) for n in (10, 20, 1000, 5, 5)]
    parameters.insert(2, nn.Parameter(torch.zeros(4, dtype=torch.float64)))
    parameters.append(nn.Parameter(torch.zeros(3), requires_grad=False))
    buckets = dist.GradientReducer(parameters, bucket_bytes=150).buckets
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[5, 5], [1000], [4], [20, 10]]
    again = dist.GradientReducer(parameters, bucket_bytes=150).buckets
    assert all(p is q for a, b in zip(buckets, again) for p, q in zip(a, b))


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert dist.env_world() == (0, 1, 0, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert dist.env_world() == (5, 8, 1, 4)


STORE = """
import datetime
from torch.distributed import TCPStore

dist.shutdown()
path, wait = folder / "port", datetime.timedelta(seconds=30)
if rank == 0:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=wait)
    durable.write_atomically(path, str(store.port))
else:
    while not path.exists():
        time.sleep(0.01)
    store = TCPStore("127.0.0.1", int(path.read_text()), is_master=False, timeout=wait)
os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "no.such.host.invalid", "1"

refused = ""
dist.use_store(store, rank, world + 1)
try:
    dist.init(torch.device("cpu"), timeout_s=30)
except ValueError as error:
    refused = str(error)
dist.use_store(store, rank, world)
dist.init(torch.device("cpu"), timeout_s=30)
total = dist.all_reduce_(torch.tensor([rank + 1.0])).item()
gathered = [x.decode() for x in dist.gather_bytes(str(rank).encode())]
dist.barrier()
report(rank=dist.rank(), total=total, gathered=gathered, agreed=dist.agree(rank), refused=refused, left=dist._store is not None)
"""


def test_a_store_instead_of_the_environment(tmp_path: Path) -> None:
    """All groups are made through it, and MASTER_ADDR is not asked; it is used once."""
    found = start(STORE, tmp_path, 2)
    assert [f.pop("rank") for f in found] == [0, 1]
    assert [f.pop("refused") for f in found] == [
        f"the store is that of rank {rank} of 3, the environment's {rank} of 2" for rank in range(2)
    ]
    assert found == [{"total": 3.0, "gathered": ["0", "1"], "agreed": 1, "left": False}] * 2


GATHERED = """
generator = torch.Generator().manual_seed(0)
whole = torch.randn(6, 2, 3, generator=generator, dtype=torch.float64)
weights = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)

def loss(gathered, mean):
    z = gathered.transpose(0, 1).contiguous()  # so that the gradient of what was gathered lies otherwise in memory
    return (z * weights).square().sum() + (mean * weights[:, 0]).sin().sum()

reference = whole.clone().requires_grad_()
expected = loss(reference, reference.mean(0))
expected.backward()
mine = whole.chunk(world)[rank].clone().requires_grad_()
value = loss(dist.all_gather_with_grad(mine), dist.mean_with_grad(mine.mean(0)))
value.backward()
off = (mine.grad / world - reference.grad.chunk(world)[rank]).abs().max().item()  # gradients are averaged over ranks
report(value=abs(value.item() - expected.item()), gradient=off)
"""


@pytest.mark.parametrize("world", [2, 3])
def test_gathered_and_averaged_with_gradient(tmp_path: Path, world: int) -> None:
    """A loss of all ranks' tensors has the value and the gradient that it has in one process."""
    for found in start(GATHERED, tmp_path, world):
        assert found["value"] < 1e-12 and found["gradient"] < 1e-12
