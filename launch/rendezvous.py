"""How the ranks of a job find each other: no shared file, no fixed port, and nobody waits for ever.

Rank 0 listens on ports that follow from the job and its restart. On the first, the door, it sends everyone who connects one
line: whose it is, and the port of its store. So whatever else listens on such a port, silent or not, is told apart
before torch connects to it, which would wait for an answer without end.
"""

import contextlib
import datetime
import hashlib
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from selfsup.errors import EarlyStop, RankLost, UserError

from .environment import LOCAL_HOST, Place

if TYPE_CHECKING:
    from torch.distributed import TCPStore

CANDIDATES = 16
_PORTS = range(20_000, 32_000)
"""Below those that systems give to outgoing connections."""
_ANSWER_S = 2.0
_POLL_S = 0.1
_KNOCK_S = 0.5
_TELL_S = 30.0
_OPERATION = datetime.timedelta(seconds=60)
_GRACE_S = 1.0
"""How long rank 0 goes on after it has said why it gives up."""


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def meet(
    place: Place,
    *,
    ports: str | None = None,
    timeout_s: float = 300.0,
    stopped: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = _print,
) -> "tuple[TCPStore, int]":
    """Wait for every rank of this incarnation of the job; the store that they share, and its port.

    ports: a range to choose from, as in "29500-29600". stopped: asked meanwhile; EarlyStop when it says so.
    Raises RankLost naming who did not come, after timeout_s seconds, and UserError if no port is free.
    """
    wait = _Wait(place, timeout_s, stopped, say)
    numbers = candidates(place.key, ports)
    return _receive(place, numbers, wait) if place.rank == 0 else _visit(place, numbers, wait)


def candidates(key: str, ports: str | None = None) -> list[int]:
    """Ports where rank 0 may be, in the order in which it tries them: the same for all who know the key."""
    low, _, high = (ports or "").partition("-")
    among = range(int(low), int(high or low) + 1) if ports else _PORTS
    drawn = random.Random(hashlib.sha256(key.encode()).digest())
    return drawn.sample(among, min(CANDIDATES, len(among)))


class _Wait:
    """The patience of one rank."""

    def __init__(self, place: Place, timeout_s: float, stopped: Callable[[], bool], say: Callable[[str], None]) -> None:
        self.place, self.timeout_s, self._stopped, self._say = place, timeout_s, stopped, say
        self._begin = time.monotonic()
        self._told = self._begin

    def over(self, whom: Callable[[], str], patience_s: float = 0.0) -> bool:
        """Whether the time is up; says now and then whom it waits for. Raises EarlyStop."""
        if self._stopped():
            raise EarlyStop(f"stopped before the first step: rank {self.place.rank} was waiting for {whom()}")
        now = time.monotonic()
        if now - self._told >= _TELL_S:
            self._told = now
            self._say(f"rank {self.place.rank} has waited {now - self._begin:.0f} s for {whom()}")
        return now - self._begin > self.timeout_s + patience_s

    def lost(self, what: str) -> RankLost:
        """What is raised then."""
        return RankLost(f"job {self.place.job} (restart {self.place.restart}): after {self.timeout_s:g} s {what}")


# --------------------------------------------------------------------------------------------------------------- rank 0


def _receive(place: Place, numbers: list[int], wait: _Wait) -> "tuple[TCPStore, int]":
    from torch.distributed import TCPStore

    door, inner = _listen(place, numbers)
    port = inner.getsockname()[1]
    with door:
        store = TCPStore(
            LOCAL_HOST,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=_OPERATION,
            master_listen_fd=inner.detach(),
        )
        done = threading.Event()
        answering = threading.Thread(target=_answer, args=(door, _greeting(place, port), done), daemon=True)
        answering.start()
        try:
            missing = set(range(1, place.world))
            while missing := {rank for rank in missing if not store.check([_joined(rank)])}:
                if wait.over(lambda: _named(missing, place)):
                    lost = wait.lost(f"{_named(missing, place)} did not come to rank 0 on {place.node}")
                    store.set("lost", str(lost))
                    time.sleep(_GRACE_S)
                    raise lost
                time.sleep(_POLL_S)
        finally:
            done.set()
            answering.join()
    store.set("go", "1")
    return store, port


def _listen(place: Place, numbers: list[int]) -> tuple[socket.socket, socket.socket]:
    """The door on the first free port, and a listening socket for the store on the next."""
    found: list[socket.socket] = []
    for number in numbers:
        with contextlib.suppress(OSError):
            found.append(_server(number, alone=set(place.hosts) == {LOCAL_HOST}))
        if len(found) == 2:
            return found[0], found[1]
    for each in found:
        each.close()
    tried = ", ".join(map(str, sorted(numbers)))
    raise UserError(
        f"cluster key ports: of {tried} no two are free on {place.node}; give a wider range, as in 20000-32000"
    )


def _server(port: int, alone: bool) -> socket.socket:
    """alone: reached from this machine only."""
    if alone:
        return socket.create_server((LOCAL_HOST, port), backlog=1024)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _answer(door: socket.socket, greeting: bytes, done: threading.Event) -> None:
    """Greet who comes; nothing that they send is read."""
    door.settimeout(_POLL_S)
    while not done.is_set():
        with contextlib.suppress(OSError):
            visitor, _ = door.accept()
            with visitor:
                visitor.sendall(greeting)


# ------------------------------------------------------------------------------------------------------ the other ranks


def _visit(place: Place, numbers: list[int], wait: _Wait) -> "tuple[TCPStore, int]":
    from torch.distributed import DistError, TCPStore

    main = f"rank 0 on {place.main_host}"
    port = _find(place, numbers, wait)
    try:
        store = TCPStore(place.main_host, port, is_master=False, wait_for_workers=False, timeout=_OPERATION)
        own = {"host": socket.gethostname(), "pid": os.getpid(), "node": place.node}
        store.set(_joined(place.rank), json.dumps(own))
        while not store.check(["go"]):
            if store.check(["lost"]):
                raise RankLost(store.get("lost").decode())
            if wait.over(lambda: f"{main}, which waits for others", patience_s=2 * _TELL_S):
                raise wait.lost(f"{main} still waits for other ranks")
            time.sleep(_POLL_S)
    except DistError as error:
        raise RankLost(f"job {place.job} (restart {place.restart}): {main} has gone: {str(error)[:200]}") from None
    return store, port


def _find(place: Place, numbers: list[int], wait: _Wait) -> int:
    """The port of rank 0's store."""
    seen: dict[int, str] = {}
    while True:
        for number in numbers:
            found = _knock(place, number)
            if isinstance(found, int):
                return found
            seen[number] = found
            if wait.over(lambda: f"rank 0 on {place.main_host}"):
                why = "; ".join(sorted(set(seen.values())))
                ports = ", ".join(map(str, sorted(seen)))
                raise wait.lost(f"rank 0 on {place.main_host} was not reached on ports {ports} ({why})")
        time.sleep(_KNOCK_S)


def _knock(place: Place, number: int) -> int | str:
    """The port of the store, if the door of this incarnation is here; else what was found."""
    end = time.monotonic() + _ANSWER_S
    said, connected = b"", False
    try:
        with socket.create_connection((place.main_host, number), timeout=_ANSWER_S) as connection:
            connected = True
            while b"\n" not in said and len(said) < 400:
                connection.settimeout(max(0.01, end - time.monotonic()))
                part = connection.recv(400)
                if not part:
                    break
                said += part
    except OSError as error:
        if connected and isinstance(error, TimeoutError):
            return "another program listens"
        return error.strerror or "no answer, as from behind a firewall"
    start = _greeting(place, None)
    rest = said[len(start) :].strip()
    if said.startswith(start) and rest.isdigit() and int(rest) < 1 << 16:
        return int(rest)
    return "another program listens"


# -------------------------------------------------------------------------------------------------------------- common


def _greeting(place: Place, port: int | None) -> bytes:
    """The line at the door, or what it begins with."""
    return f"selfsup {place.key} ".encode() + (b"" if port is None else b"%d\n" % port)


def _joined(rank: int) -> str:
    return f"join/{rank}"


def _named(ranks: Iterable[int], place: Place) -> str:
    """'rank 2 (n2), rank 3 (n2) and 4 more'."""
    all_ = sorted(ranks)
    first = ", ".join(f"rank {rank} ({place.hosts[rank]})" for rank in all_[:8])
    return first + (f" and {len(all_) - 8} more" if len(all_) > 8 else "")
