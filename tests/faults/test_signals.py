"""Stop signals to runs with loader workers, during the steps and during the save."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.lab import EVERY, STEPS, Lab, checkpoints, ended, log, nobody_left, steps_logged
from tests.faults.table import Cases
from tests.faults.zygote import Process

SLOW = ("slow", {"seconds": 0.02})
STOP = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


def stopped_well(process: Process, out: Path) -> int:
    """Exit 75, saying where; one checkpoint of the last step logged; nobody left behind. Returns the step."""
    ended(process, 75)
    assert "Traceback" not in process.stderr(), process.stderr()
    said = re.search(r"stopped at step (\d+) of \d+ .*--resume", process.stderr())
    assert said, process.stderr()
    step = int(said[1])
    assert len(log(out)) == step
    found = checkpoints(out)
    assert found[-1] == step and all(s % EVERY == 0 for s in found[:-1])
    nobody_left(process)
    return step


@pytest.mark.faults("signals")
@pytest.mark.parametrize("number", STOP, ids=lambda n: n.name)
def test_signal_with_workers(lab: Lab, tmp_path: Path, cases: Cases, number: signal.Signals) -> None:
    """To the trainer alone, and to every process as a scheduler sends it."""
    for everyone in (False, True):
        with cases("to all processes" if everyone else "to the trainer"):
            out = tmp_path / str(everyone)
            process = lab.start(out, "workers=2", fault=SLOW)
            process.wait_for(lambda out=out: steps_logged(out) >= 6)
            assert len(process.children()) == 2
            if everyone:
                os.killpg(process.pid, number)
            else:
                process.send(number)
            assert stopped_well(process, out) < STEPS
            assert number.name in process.stderr()
            lab.resumed_is_same(out, "workers=1")


@pytest.mark.faults("signals")
def test_signal_to_one_of_two_ranks(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """All ranks stop at the same step and save once."""
    for rank in (0, 1):
        with cases(f"rank {rank}"):
            out = tmp_path / str(rank)
            ranks = lab.ranks(out, fault={0: SLOW, 1: SLOW})
            ranks[0].wait_for(lambda out=out: steps_logged(out) >= 6)
            ranks[rank].send(signal.SIGUSR2)
            stopped_well(ranks[0], out)
            ended(ranks[1], 75)
            lab.resumed_is_same(out, world=2)


@pytest.mark.faults("signals_in_save")
def test_further_signals_are_harmless(lab: Lab, tmp_path: Path, cases: Cases) -> None:
    """During the last save, once during a save in the middle, once during the export: each kind, twice (INT once)."""
    moments = {
        "last save": ("write .*model.safetensors", 6, True),
        "save in the middle": ("write .*step_00000010/optimizer.safetensors", 0, False),
    }
    for name, (match, wanted, stop_first) in moments.items():
        with cases(name):
            out, mark = tmp_path / name.replace(" ", "_"), tmp_path / f"{name.replace(' ', '_')}.mark"
            disk = ("slow_disk", {"seconds": 0.6, "match": match, "mark": str(mark)})
            process = lab.start(
                out, "workers=2", f"checkpoint.every={100 if stop_first else EVERY}", fault=[SLOW, disk]
            )
            if stop_first:
                process.wait_for(lambda out=out, n=wanted: steps_logged(out) >= n)
                process.send(signal.SIGUSR1)
            process.wait_for(mark.exists)
            for number in (
                signal.SIGTERM,
                signal.SIGUSR1,
                signal.SIGUSR2,
                signal.SIGTERM,
                signal.SIGUSR2,
                signal.SIGINT,
            ):
                os.killpg(process.pid, number)
                time.sleep(0.05)
            ended(process, 75)
            assert stopped_well(process, out) < STEPS
            lab.resumed_is_same(out)


@pytest.mark.faults("signals_in_save")
def test_signals_all_the_way_to_the_end(lab: Lab, tmp_path: Path) -> None:
    """A scheduler that sends TERM again and again until the process is gone: exit 75, not a process killed by TERM."""
    out = tmp_path / "run"
    process = lab.start(out, "workers=2", fault=SLOW)
    process.wait_for(lambda: steps_logged(out) >= 3)
    while process.status is None:
        process.send(signal.SIGTERM)
        time.sleep(0.001)
    stopped_well(process, out)
    lab.resumed_is_same(out)


@pytest.mark.faults("signals_in_save")
def test_third_interrupt_ends_at_once(lab: Lab, tmp_path: Path) -> None:
    """Though the save would take minutes."""
    out, mark = tmp_path / "run", tmp_path / "mark"
    disk = ("slow_disk", {"seconds": 300, "match": "write .*model.safetensors", "mark": str(mark)})
    process = lab.start(out, "workers=2", "checkpoint.every=100", fault=[SLOW, disk])
    process.wait_for(lambda: steps_logged(out) >= 6)
    process.send(signal.SIGINT)
    process.wait_for(mark.exists)
    process.send(signal.SIGINT)
    time.sleep(0.3)
    assert process.status is None
    process.send(signal.SIGINT)
    ended(process, 130, timeout=2)
    nobody_left(process)
    lab.resumed_is_same(out)
