"""Loader workers that are killed: the same batches, no exception where nobody waits for one, no hang, nobody left behind."""

import gc
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from selfsup.config import Crops, ViewsConfig
from selfsup.data import workers
from selfsup.data.eval_transform import eval_batches
from selfsup.data.loader import Loader
from selfsup.data.sources import open_source
from selfsup.data.views import multicrop
from selfsup.data.workers import APART, DEATHS, items
from selfsup.errors import UserError

VIEWS = multicrop(ViewsConfig(**{"global": Crops(size=8), "local": Crops(count=0)}))


@pytest.fixture(scope="module")
def source():
    return open_source("demo:val", channels=1)


@pytest.fixture(autouse=True)
def nobody_is_left_behind():
    assert not multiprocessing.active_children()
    yield
    gc.collect()
    assert not multiprocessing.active_children()


def gone(pid):
    """Whether a child has ended (a zombie that nobody looked at has)."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not gone(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Numbers(torch.utils.data.Dataset):
    """Item k is k, twice; `action` is done at item `at` by the first worker that comes there, or by each (`always`)."""

    def __init__(self, folder=None, action=None, at=5, always=False, wait=0.0):
        self.folder, self.action, self.at, self.always, self.wait = folder, action, at, always, wait

    def __getitem__(self, k):
        time.sleep(self.wait)
        if self.action and k == self.at and torch.utils.data.get_worker_info() is not None:
            mark = self.folder / "done"
            if self.always or not mark.exists():
                mark.touch()
                self.action(loop_of_the_worker())
        return torch.full((2,), k)


def loop_of_the_worker():
    """The local variables of torch's worker loop: its queues and events, with their locks."""
    frame = sys._getframe()
    while frame.f_code.co_name != "_worker_loop":
        frame = frame.f_back
    return frame.f_locals


def die(loop=None):
    os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------- nothing is lost


def test_kill_9_at_random_moments(source):
    """Six times, one worker or all, while they work, wait, or send: every batch is what this process would make."""
    options = {"seed": 1, "global_batch": 8, "accumulate": 2}
    apart = APART  # in steps of two items
    steps = 6 * apart
    said = []
    stream = Loader(source, VIEWS, workers=2, say=said.append, **options).stream(0, steps)
    rng, killers, pids = random.Random(0), [], set()
    alone = Loader(source, VIEWS, **options).stream(0, steps)
    for step, (expected, batches) in enumerate(zip(alone, stream, strict=True)):
        assert len(batches) == 2
        for a, b in zip(expected, batches, strict=True):
            assert (
                torch.equal(a.ids, b.ids)
                and torch.equal(a.crops[0], b.crops[0])
                and torch.equal(a.params[0], b.params[0])
            )
        if step % apart == 3:
            running = multiprocessing.active_children()
            pids |= {p.pid for p in running}
            chosen = running[: rng.choice([1, 1, 2])]
            killers.append(threading.Timer(rng.uniform(0, 0.02), lambda ps=chosen: [os.kill(p.pid, 9) for p in ps]))
            killers[-1].start()
    for killer in killers:
        killer.join()
    assert len(said) >= 6 and all("was killed by SIGKILL" in text and "made again" in text for text in said)
    assert len(pids) >= 12  # new ones each time


def test_announced_on_stderr_by_default(capfd):
    stream = items(Numbers(), 0, 20, workers=1)
    assert next(stream).tolist() == [0, 0]
    [process] = multiprocessing.active_children()
    kill(process)
    assert [int(x[0]) for x in stream] == list(range(1, 20))
    assert capfd.readouterr().err.startswith(
        f"loader worker {process.pid} was killed by SIGKILL; its batches are made again"
    )


def test_evaluation_goes_on_too(source, capfd):
    """The images for k-NN come from the same kind of workers."""
    options = {"size": 16, "mean": [0.5], "std": [0.2], "batch_size": 100}
    expected = list(eval_batches(source, **options))
    found = []
    for batch in eval_batches(source, workers=2, **options):
        if len(found) == 3:
            kill(multiprocessing.active_children()[0])
        found.append(batch)
    assert "was killed by SIGKILL" in capfd.readouterr().err
    assert all(torch.equal(x, y) for a, b in zip(expected, found, strict=True) for x, y in zip(a, b, strict=True))


# ------------------------------------------------------------------------------------------------------------ no hang


def with_the_results_lock(loop):
    loop["data_queue"]._wlock.acquire()
    die()


def with_the_lock_of_its_own_queue(loop):
    loop["index_queue"]._rlock.acquire()
    die()


def with_the_events_lock(loop):
    loop["done_event"]._cond.acquire()
    die()


def in_the_middle_of_a_message(loop):
    """Its length and a part of it are in the pipe."""
    time.sleep(0.5)  # the trainer waits in read()
    with loop["data_queue"]._wlock:
        os.write(loop["data_queue"]._writer.fileno(), (1000).to_bytes(4, "big") + b"half of it")
        die()


@pytest.mark.parametrize(
    "death",
    [die, with_the_results_lock, with_the_lock_of_its_own_queue, with_the_events_lock, in_the_middle_of_a_message],
)
@pytest.mark.parametrize("at", [0, 5])
def test_a_death_that_takes_a_lock_along(tmp_path, death, at):
    began, said = time.monotonic(), []
    found = [int(x[0]) for x in items(Numbers(tmp_path, death, at), 0, 20, workers=2, say=said.append)]
    assert found == list(range(20)) and len(said) == 1
    assert time.monotonic() - began < 15


def test_it_is_noticed_at_once(tmp_path):
    """Not at the end of torch's five seconds between looks."""
    stream = items(Numbers(tmp_path, lambda loop: (time.sleep(0.5), die()), 1), 0, 3, workers=1, say=lambda text: None)
    began = time.monotonic()
    assert len(list(stream)) == 3
    assert time.monotonic() - began < 4


def test_full_shared_memory_is_told(tmp_path):
    """Where torch itself would lose the batch and wait for ever. The limit on file sizes stands for a small /dev/shm."""

    def small(loop):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))

    with pytest.raises(UserError, match=r"/dev/shm: shared memory is full \(.*fewer workers than workers=2") as caught:
        list(items(Numbers(tmp_path, small), 0, 20, workers=2))
    assert len(str(caught.value).splitlines()) <= 2


def test_the_program_ends_with_a_stream_left_open(tmp_path):
    """By itself, by an exception; workers go with it."""
    script = textwrap.dedent("""
        import multiprocessing, sys
        from tests.data.test_workers import Numbers
        from selfsup.data.workers import items
        stream = items(Numbers(), 0, 10_000, workers=2)
        next(stream)
        print(*(p.pid for p in multiprocessing.active_children()), flush=True)
        if sys.argv[1] == "raise":
            raise KeyError("on purpose")
    """)
    for how, code in (("end", 0), ("raise", 1)):
        root = str(Path(__file__).resolve().parents[2])
        done = subprocess.run(
            [sys.executable, "-c", script, how], capture_output=True, text=True, timeout=100, cwd=root
        )
        assert done.returncode == code, done.stderr
        pids = done.stdout.split()
        assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


# ------------------------------------------------------------------------------------------------- no use to go on


def exits(loop):
    os._exit(3)


@pytest.mark.parametrize(("death", "how"), [(die, "was killed by SIGKILL"), (exits, "ended with code 3")])
def test_three_quick_deaths_are_an_error(tmp_path, death, how):
    began, said = time.monotonic(), []
    stream = items(Numbers(tmp_path, death, 7, always=True), 0, 20, workers=2, say=said.append)
    found = []
    with pytest.raises(UserError, match=rf"loader worker \d+ {how}; {DEATHS} deaths within \d+ batches") as caught:
        found.extend(int(x[0]) for x in stream)
    message = str(caught.value)
    assert len(message.splitlines()) == 2 and "/dev/shm" in message and "workers=2" in message
    assert len(said) == DEATHS - 1 and time.monotonic() - began < 20


def test_deaths_far_apart_are_none(tmp_path):
    """Two quick ones, a hundred batches, two quick ones."""
    stream, said = items(Numbers(), 0, 3 * APART, workers=1, say=lambda text: said.append(text)), []
    for k, _ in enumerate(stream):
        if k in (5, 6, 10 + APART, 11 + APART):
            kill(multiprocessing.active_children()[0])
    assert k == 3 * APART - 1 and len(said) == 4


# ---------------------------------------------------------------------------------------------------------- signals


def work(seconds):
    """Python code that runs the handlers of signals as they come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        sum(range(100))


def test_nothing_is_raised_in_the_middle_of_a_step():
    """A worker's end is noticed where the next batch is asked for; who listened before is told, and listens alone after."""
    seen = []
    before = signal.signal(signal.SIGCHLD, lambda *event: seen.append(event[0]))
    mine = signal.getsignal(signal.SIGCHLD)
    try:
        said = []
        stream = items(Numbers(), 0, 50, workers=2, say=said.append)
        assert int(next(stream)[0]) == 0
        kill(multiprocessing.active_children()[0])
        work(0.3)
        assert said == [] and len(seen) == 1
        assert int(next(stream)[0]) == 1 and len(said) == 1
        assert [int(x[0]) for x in stream] == list(range(2, 50))
        assert signal.getsignal(signal.SIGCHLD) is mine
        nested = items(Numbers(), 0, 20, workers=1)
        assert int(next(nested)[0]) == 0
        assert [int(x[0]) for x in items(Numbers(), 0, 4, workers=1)] == [0, 1, 2, 3]
        nested.close()
        assert signal.getsignal(signal.SIGCHLD) is mine
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_another_loaders_handler_does_not_raise_either():
    """torch installs it once a process; an earlier loader of the user's may have."""
    script = textwrap.dedent("""
        import multiprocessing, signal
        import torch
        from tests.data.test_workers import Numbers, kill, work
        from selfsup.data.workers import items
        class Sized(Numbers):
            def __len__(self):
                return 4
        list(torch.utils.data.DataLoader(Sized(), num_workers=1))
        handler = signal.getsignal(signal.SIGCHLD)
        assert "signal_handling" in handler.__module__
        stream = items(Numbers(), 0, 20, workers=1)
        next(stream)
        kill(multiprocessing.active_children()[0])
        work(0.3)
        assert [int(x[0]) for x in stream] == list(range(1, 20))
        assert signal.getsignal(signal.SIGCHLD) is handler
    """)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, cwd=root)
    assert done.returncode == 0, done.stderr


def test_outside_the_main_thread(tmp_path):
    """No handlers there: the death is noticed a little later."""
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(items(Numbers(tmp_path, die), 0, 10, workers=1, say=lambda text: None))
    )
    thread.start()
    thread.join(30)
    assert [int(x[0]) for x in found] == list(range(10))


def test_a_worker_killed_after_the_last_batch_it_was_asked_for(tmp_path):
    stream = items(Numbers(), 0, 3, workers=2)
    assert [int(next(stream)[0]) for _ in range(2)] == [0, 1]
    time.sleep(0.3)
    for process in multiprocessing.active_children():
        kill(process)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 10 and not list(workers._ALIVE)
