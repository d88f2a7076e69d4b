"""Stop signals become a flag; handlers are put back; the third interrupt kills."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from selfsup.signals import STOP_SIGNALS, StopSignals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_the_flag(number: signal.Signals) -> None:
    with StopSignals() as signals:
        assert not signals.agreed() and signals.received is None
        os.kill(os.getpid(), number)
        assert signals.agreed() and signals.received is number
        assert signals.agreed()  # and stays


def test_which_signals() -> None:
    """Interrupts, SLURM's warnings (USR1, USR2) and its preemption (TERM)."""
    assert set(STOP_SIGNALS) == {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def test_handlers_are_put_back() -> None:
    """Ours, Python's own, and ignored ones, also after an exception."""
    seen = []
    interrupt = signal.getsignal(signal.SIGINT)  # Python's own, or ignored where the tests run in the background
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    ignored = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        with pytest.raises(RuntimeError), StopSignals():
            raise RuntimeError
        os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGUSR2, ignored)


def test_nested_ones_lose_nothing() -> None:
    """What came before training began stops it; what comes after it ended is noted and kills nobody."""
    with StopSignals() as outer:
        os.kill(os.getpid(), signal.SIGTERM)
        with StopSignals() as inner:
            assert inner.received is signal.SIGTERM and inner.agreed()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert outer.received is signal.SIGUSR2


def test_works_outside_the_main_thread() -> None:
    """Python lets only the main thread set handlers: a run in another thread trains without them."""
    found = []

    def body() -> None:
        with StopSignals() as signals:
            found.append(signals.agreed())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [False]


def test_third_interrupt_kills() -> None:
    """A step that hangs can be left: two interrupts ask, the third ends the process with 130."""
    script = (
        "import os, signal\n"
        "from selfsup.signals import StopSignals\n"
        "with StopSignals() as s:\n"
        "    for i in range(3):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        print(i, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stdout.split() == ["0", "1"]


def test_third_interrupt_kills_in_the_middle_of_a_call() -> None:
    """A collective that waits for a rank that hangs runs no handler: the process can still be left."""
    script = (
        "import ctypes\n"
        "from selfsup.signals import StopSignals\n"
        "c = ctypes.CDLL(None)\n"
        "mutex = ctypes.create_string_buffer(256)\n"
        "with StopSignals(), StopSignals():\n"
        "    c.pthread_mutex_lock(mutex)\n"
        "    print('waits', flush=True)\n"
        "    c.pthread_mutex_lock(mutex)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.communicate()


def test_an_event_loop_keeps_its_descriptor() -> None:
    """Who was told of signals before is told after, and meanwhile."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert os.read(read, 8) == bytes([signal.SIGUSR1])
    finally:
        assert signal.set_wakeup_fd(before) == write
        os.close(read)
        os.close(write)
    threads = threading.active_count()
    for _ in range(3):
        with StopSignals():
            pass
    deadline = time.monotonic() + 5
    while threading.active_count() > threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert signal.set_wakeup_fd(-1) == before
