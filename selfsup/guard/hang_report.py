"""The one report on a hang: a line a rank, who is suspected and why, and the suspects' stacks."""

from pathlib import Path

from selfsup.guard.ranks import Beat, Peer, stack_of

COLLECTIVE = ("gradients", "agree", "log", "checkpoint")
"""Phases in which a rank may well be waiting for another."""
MAIN = "main thread 0x"
_LINES = 40


def suspects(own: Beat, peers: list[Peer], silent_s: float) -> dict[int, str]:
    """rank -> why: those that are silent; else those not in a collective; else those at the lowest step; else nobody."""
    found = {}
    for peer in peers:
        if peer.beat is None:
            found[peer.rank] = "not heard of since this start"
        elif peer.beat.state != "running":
            continue
        elif peer.alive is False:
            found[peer.rank] = "is gone"
        elif peer.silent_s() > silent_s:
            state = peer.beat.process.state()
            held = ", so something holds its interpreter" if state in ("running", "sleeping", "disk sleep") else ""
            found[peer.rank] = f"silent for {peer.silent_s():.1f} s ({state}{held})"
    if found:
        return found
    running = [own, *(p.beat for p in peers if p.beat is not None and p.beat.state == "running")]
    found = {b.rank: f"does not come out of {b.phase!r}" for b in running if b.phase not in COLLECTIVE}
    if 0 < len(found) < len(running) or len(running) == 1:
        return found or {own.rank: f"does not come out of {own.phase!r}"}
    steps = {b.step for b in running}
    return {b.rank: f"is behind, at step {b.step}" for b in running if len(steps) > 1 and b.step == min(steps)} or found


def report(folder: Path, own: Beat, peers: list[Peer], timeout_s: float, silent_s: float, since_ns: int) -> str:
    """What is printed. `since_ns`: older stacks are of an earlier start."""
    suspected = suspects(own, peers, silent_s)
    lines = [f"selfsup: no progress for {own.stuck_s:.1f} s (hang_timeout={timeout_s:g}):"]
    rows = [(own.rank, own, 0.0), *((p.rank, p.beat, p.silent_s()) for p in peers)]
    for rank, beat, silent in sorted(rows, key=lambda row: row[0]):
        if beat is None:
            lines.append(f"  rank {rank}: not heard of since this start")
            continue
        p = beat.process
        doing = f"in {beat.phase!r} of step {beat.step}" if beat.state == "running" else beat.state
        stack = stack_of(folder, rank)
        lines.append(
            f"  rank {rank}: host {p.host}, pid {p.pid}, {p.state()}, {doing}, last heartbeat {silent:.1f} s ago, "
            f"no progress for {beat.stuck_s + silent:.1f} s, {f'stack in {stack}' if _stack(stack, since_ns) else 'no stack'}"
        )
    for rank, why in suspected.items():
        lines.append(f"suspect: rank {rank}, {why}")
    if not suspected:
        lines.append("no rank stands out: all wait for one another (the network, or collectives in different orders)")
    for rank in list(suspected)[:3]:
        if main := _stack(stack_of(folder, rank), since_ns):
            lines += [f"rank {rank} stands at:", *main]
    return "\n".join(lines)


def stack_missing(folder: Path, own: Beat, peers: list[Peer], silent_s: float, since_ns: int) -> bool:
    """Whether a suspect that can write its stack has not done so yet."""
    suspected = suspects(own, peers, silent_s)
    able = {p.rank for p in peers if p.beat and p.beat.process.state() in ("running", "sleeping", "unknown")}
    return any(not _stack(stack_of(folder, rank), since_ns) for rank in suspected if rank in able or rank == own.rank)


def _stack(path: Path, since_ns: int) -> list[str]:
    """The main thread's part of a file that faulthandler wrote."""
    try:
        if path.stat().st_mtime_ns < since_ns:
            return []
        head, _, text = path.read_text(errors="replace").partition("\n")
    except OSError:
        return []
    ident = head.removeprefix(MAIN).strip()
    blocks = [block.splitlines() for block in text.replace("\nCurrent thread", "\n\nCurrent thread").split("\n\n")]
    blocks = [[line for line in block if line] for block in blocks]
    blocks = [block for block in blocks if any(line.startswith("  File") for line in block)]
    own = [block for block in blocks if any(ident in line for line in block if "hread 0x" in line)]
    return (own or blocks[-1:] or [[]])[-1][:_LINES]
