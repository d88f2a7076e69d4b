"""One of two ranks is killed, stopped, hangs, or computes a NaN."""

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.faults.lab import Lab, checkpoints, ended, log, recipe, same, same_weights, steps_logged, weights
from tests.faults.table import Cases
from tests.methods.tiny import write_images

SLOW = ("slow", {"seconds": 0.02})
BOTH = {0: SLOW, 1: SLOW}
TIMEOUT = 5


@pytest.mark.faults("rank_killed")
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_is_named(lab: Lab, tmp_path: Path, cases: Cases, victim: int) -> None:
    """In the first steps, later, and with loader workers."""
    for wanted, workers in ((1, 0), (12, 0), (8, 1)):
        with cases(f"rank {victim} after {wanted} steps, workers={workers}"):
            out = tmp_path / f"{wanted}"
            ranks = lab.ranks(out, f"workers={workers}", fault=BOTH)
            ranks[0].wait_for(lambda out=out, n=wanted: steps_logged(out) >= n)
            ranks[victim].kill()
            began = time.monotonic()
            ended(ranks[1 - victim], 1, timeout=20)
            assert time.monotonic() - began < 10
            said = ranks[1 - victim].stderr()
            assert re.search(rf"rank {victim} .*{ranks[victim].pid}", said), said
            assert "Traceback" not in said, said
            log(out)
            checkpoints(out)
            lab.resumed_is_same(out, world=2)


def published(run: Path, rank: int) -> int:
    """The step that a rank was in when it last wrote down that it lives."""
    try:
        return int(json.loads((run / "ranks" / f"rank_{rank:05d}.json").read_text())["step"])
    except (OSError, ValueError):
        return 0


@pytest.mark.faults("rank_hangs")
@pytest.mark.parametrize("victim", [0, 1])
def test_stopped_rank_is_reported(lab: Lab, tmp_path: Path, victim: int) -> None:
    """SIGSTOP: it can say nothing itself; the other says who, where, in what state and phase."""
    out = tmp_path / "run"
    slow = ("slow", {"seconds": 0.08})
    ranks = lab.ranks(out, f"hang_timeout={TIMEOUT}", fault={0: slow, 1: slow})
    ranks[0].wait_for(lambda: published(out, victim) >= 6)
    ranks[victim].send(signal.SIGSTOP)
    began = time.monotonic()
    ended(ranks[1 - victim], 1, timeout=60)
    assert time.monotonic() - began < TIMEOUT + 4
    said = ranks[1 - victim].stderr()
    line = next((x for x in said.splitlines() if str(ranks[victim].pid) in x), "")
    for pattern in (rf"rank {victim}\b", re.escape(socket.gethostname()), "stopped", r"step \d+"):
        assert re.search(pattern, line), f"{pattern!r} is not in {line!r} of:\n{said}"
    assert re.search("data|forward|backward|gradients|optimizer|log|agree|checkpoint", line), line
    assert ranks[victim].status is None
    ranks[victim].kill()  # what a scheduler does next
    ranks[victim].wait()
    log(out)
    lab.resumed_is_same(out, world=2)


@pytest.mark.faults("rank_hangs")
@pytest.mark.parametrize("world", [1, 2])
def test_hanging_rank_shows_its_stack(lab: Lab, tmp_path: Path, world: int) -> None:
    """A step that never ends, in the last rank of a run: every rank exits 1, and the stack names the function."""
    out = tmp_path / "run"
    fault = ("hang", {"step": 13})
    victim = world - 1
    if world == 1:
        ranks = [lab.start(out, f"hang_timeout={TIMEOUT}", fault=fault)]
    else:
        ranks = lab.ranks(out, f"hang_timeout={TIMEOUT}", fault={1: fault})
    ranks[0].wait_for(lambda: steps_logged(out) >= 9)
    began = time.monotonic()
    for process in ranks:
        ended(process, 1, timeout=60)
    assert time.monotonic() - began < TIMEOUT + 6
    said = "".join(process.stderr() for process in ranks)
    line = next((x for x in said.splitlines() if re.search(rf"rank {victim}\b", x) and "forward" in x), "")
    assert str(ranks[victim].pid) in line and re.search(r"step 1[23]\b", line), said
    stack = out / "ranks" / f"rank_{victim:05d}.stack.txt"
    assert "_wait_for_a_reply_that_never_comes" in stack.read_text()
    assert stack.name in said
    lab.resumed_is_same(out, world=world)


@pytest.mark.faults("nan")
def test_nan_on_one_rank(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """Refused on both, whichever had it: same log, same weights, equal on all ranks; the batch is kept."""
    step = 11
    nan = ("nan", {"step": step})
    for rank in (0, 1):
        with cases(f"rank {rank}"):
            out, own = tmp_path / str(rank), tmp_path / f"weights_{rank}"
            keep = ("weights", {"path": str(own)})
            ranks = lab.run_ranks(out, fault={0: [keep], 1: [keep]} | {rank: [keep, nan]})
            lines = log(out)
            assert [x["step"] for x in lines if "refused_in_row" in x] == [step]
            assert lines[step - 1]["refused_in_row"] == 1 and lines[step - 1]["loss"] == "nan"
            assert all(isinstance(x["loss"], float) for x in lines if x["step"] != step)
            assert re.search(f"step {step}.*not finite", ranks[0].stderr()), ranks[0].stderr()
            assert Path(f"{own}.0").read_bytes() == Path(f"{own}.1").read_bytes()
            kept = sorted(p.name for p in (out / "refused").iterdir())
            assert kept == [f"step_{step:08d}_rank_{rank:05d}"]
            files = {p.name for p in (out / "refused" / kept[0]).iterdir()}
            assert {"batch.safetensors", "model.safetensors", "info.json"} <= files
            same_weights(out, lab.undisturbed(world=2, fault=nan))  # where both had it
            assert weights(out) != weights(lab.undisturbed(world=2))
    with cases("either rank"):
        same(tmp_path / "0", tmp_path / "1")


@pytest.mark.faults("rank_killed")
def test_both_killed_at_once(lab: Lab, tmp_path: Path) -> None:
    """A node that loses power; resumed at once."""
    out = tmp_path / "run"
    ranks = lab.ranks(out, "workers=1", fault=BOTH)
    ranks[0].wait_for(lambda: steps_logged(out) >= 9)
    for process in ranks:
        os.kill(process.pid, signal.SIGKILL)
    assert [process.wait() for process in ranks] == [-9, -9]
    lab.resumed_is_same(out, world=2)


@pytest.mark.faults("rank_killed")
def test_killed_in_a_save(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """The second rank half way through its own file; the first just before the rename: the other one still ends."""
    moments = {
        1: ("write checkpoints/.tmp-step_00000010/rank_00001.safetensors", "half"),
        0: ("rename checkpoints/.tmp-step_00000010 checkpoints/step_00000010", "before"),
    }
    for victim, (name, when) in moments.items():
        with cases(f"rank {victim}, {when} {name}"):
            out = tmp_path / str(victim)
            kill = ("kill_at", {"name": name, "before": 0, "when": when})
            ranks = lab.ranks(out, fault={0: [SLOW], 1: [SLOW]} | {victim: [SLOW, kill]})
            ended(ranks[victim], -9)
            ended(ranks[1 - victim], 1, timeout=20)
            assert re.search(rf"rank {victim} .*{ranks[victim].pid}", ranks[1 - victim].stderr()), ranks[
                1 - victim
            ].stderr()
            assert checkpoints(out) == [5]
            lab.resumed_is_same(out, world=2)


@pytest.mark.faults("nan")
def test_nan_on_many_ranks_is_kept_by_a_few(lab: Lab, tmp_path: Path) -> None:
    """The first ones: of hundreds of ranks each would write the weights before it learned that enough are kept."""
    out = tmp_path / "run"
    ranks = lab.ranks(out, "stop_at=9", fault=dict.fromkeys(range(4), ("nan", {"step": 8})), world=4)
    for process in ranks:
        ended(process, 75)
    assert sorted(p.name for p in (out / "refused").iterdir()) == [f"step_00000008_rank_{r:05d}" for r in range(3)]


@pytest.mark.faults("signals_in_save")
def test_third_interrupt_ends_a_rank_that_waits(lab: Lab, tmp_path: Path) -> None:
    """For one that hangs: the collective runs no Python, and the hang would be reported in half an hour."""
    out = tmp_path / "run"
    ranks = lab.ranks(out, fault=BOTH)
    ranks[0].wait_for(lambda: steps_logged(out) >= 6)
    ranks[1].send(signal.SIGSTOP)
    time.sleep(0.5)
    for _ in range(3):
        ranks[0].send(signal.SIGINT)
        time.sleep(0.1)
    ended(ranks[0], 130, timeout=5)
    ranks[1].kill()
    ranks[1].wait()
    lab.resumed_is_same(out, world=2)


@pytest.mark.faults("rank_hangs")
def test_a_long_evaluation_is_no_hang(lab: Lab, tmp_path: Path) -> None:
    """By one rank, for longer than hang_timeout: the others wait as long as it gets on."""
    out = tmp_path / "run"
    images = write_images(tmp_path / "images", 40, classes=4)
    file = recipe(tmp_path / "recipe.yaml", images, "eval.every=12", "hang_timeout=3")
    slow = ("slow_neighbours", {"seconds": 6.0})
    for process in lab.zygote.ranks(["train", file, "--out", out], fault={0: slow, 1: slow}):
        ended(process, 0)
    assert [x["step"] for x in log(out) if "eval" in x] == [12, 24]
