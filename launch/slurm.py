"""What Slurm knows about jobs: many at a time, in a few calls, none of which waits for ever.

    found = jobs(["12", "13_0", "13_1"])

Three programs are asked, and each has its blind spot:

- `squeue` tells what is true now, with the number of restarts. It forgets a job some minutes after its end (MinJobAge), and
  of one that is ending it tells that alone, not how.
- `scontrol show job` is the same knowledge, asked where squeue cannot be used.
- `sacct` tells how a job ended, for good. Of a job that was requeued it also has the ends of its earlier starts (PENDING,
  PREEMPTED, NODE_FAIL, TIMEOUT), and where it reads a file instead of a database (`sacct -c`) nothing but these.

So sacct has the word on jobs that the other two do not know, or know to be ending; on those that live it would be wrong.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

TIMEOUT_S = 10.0
"""For each program; a controller that does not answer must not hold up a status."""
_AT_ONCE = 1000
"""Jobs named on one command line."""
_ASK_AGAIN_S = 30.0
"""After which squeue and scontrol are tried again, as they must be by whoever follows a job for days."""

WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "CONFIGURING"}
RUNNING = {"RUNNING", "RESIZING", "SIGNALING", "STAGE_OUT"}
HALTED = {"SUSPENDED", "STOPPED", "PREEMPTED"}
"""Another job has its place."""
ENDING = {"COMPLETING"}
FAILED = {"FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED", "LAUNCH_FAILED"}
_LIVE = WAITING | RUNNING | HALTED - {"PREEMPTED"} | ENDING

# Columns of squeue: name and width. Values are cut to it, so that lines can be taken apart whatever they hold.
_COLUMNS = {"JobArrayID": 48, "State": 24, "RestartCnt": 12, "exit_code": 12, "Reason": 120, "NodeList": 400}
_COLUMNS |= {"StartTime": 24}
_SACCT = ("JobID", "State", "ExitCode", "NodeList", "Start")


@dataclass(frozen=True)
class JobInfo:
    """One job, as Slurm sees it."""

    state: str
    """Slurm's own word, as in RUNNING; "" for a job that it does not know, or no more."""
    restarts: int | None = None
    nodes: str | None = None
    """As in n[1-4]; of a job that waits None."""
    reason: str | None = None
    """Why it waits, or ended."""
    exit: tuple[int, int] | None = None
    """Exit code of the script, and the signal that ended it; (0, 0) while it runs."""
    start: str | None = None
    """When it started, or is expected to."""

    @property
    def host(self) -> str | None:
        """The first of its nodes."""
        return first_node(self.nodes) if self.nodes else None


UNKNOWN = JobInfo("")


class Scheduler:
    """Asks the programs, and remembers which of them are of no use here."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._failed: dict[str, float] = {}
        """When a program last failed, by its name."""
        self._sacct: list[Sequence[str]] = [("sacct", "-X"), ("sacct", "-c")]
        """Spellings that may work: the second reads the file that a site without a database may keep."""
        self.calls = 0

    def jobs(self, ids: Iterable[str]) -> dict[str, JobInfo]:
        """By number ("12", or "12_3" of an array). UNKNOWN where Slurm answered and has no such job; {} if nobody answered.

        "12" of an array stands for all its jobs: the one that is farthest from done.
        """
        wanted = [*dict.fromkeys(ids)]
        out: dict[str, JobInfo] = {}
        for at in range(0, len(wanted), _AT_ONCE):
            out |= self._some(wanted[at : at + _AT_ONCE])
        return out

    def _some(self, wanted: list[str]) -> dict[str, JobInfo]:
        live = self._live(wanted)
        unclear = [job for job in wanted if live is None or job not in live or live[job].state in ENDING]
        ended = self._ended(unclear) if unclear else {}
        out = dict.fromkeys(wanted, UNKNOWN) if live is not None else {}
        out |= live or {}
        for job, info in ended.items():
            known = live.get(job) if live is not None else None
            if known is not None and info.state not in _LIVE | {"PREEMPTED", "NODE_FAIL"}:
                out[job] = replace(known, state=info.state, exit=info.exit)
            elif known is None and (live is None or info.state not in _LIVE):
                out[job] = info
        return out

    # ------------------------------------------------------------------------------------------------ what lives

    def _live(self, wanted: list[str]) -> dict[str, JobInfo] | None:
        """None if neither squeue nor scontrol answers."""
        named = ",".join(wanted if len(wanted) > 1 else wanted * 2)  # one alone that is not known is an error
        out, err = self._squeue(f"--jobs={named}")
        if out is None and "Invalid job id" in err:  # a version that refuses all for the sake of one
            out, err = self._squeue("--me")
        if out is not None:
            return _pick(_parse_squeue(out), wanted)
        if "contact" in err or "timed out" in err:
            return None  # scontrol would ask the same controller
        out, _ = self._ask("scontrol", "--oneliner", "show", "job")
        return None if out is None else _pick(_parse_scontrol(out), wanted)

    def _squeue(self, which: str) -> tuple[str | None, str]:
        columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
        return self._ask("squeue", which, "--states=all", "--array", "--noheader", f"--Format={columns}")

    # ------------------------------------------------------------------------------------------------ what ended

    def _ended(self, wanted: list[str]) -> dict[str, JobInfo]:
        while self._sacct:
            options = ("--parsable2", "--noheader", f"--format={','.join(_SACCT)}", f"--jobs={','.join(wanted)}")
            out, _ = self._ask(*self._sacct[0], *options)
            if out is not None:
                return _pick(_parse_sacct(out), wanted)
            del self._sacct[0]  # not asked again: it would fail in the same way, or take as long
        return {}

    # -------------------------------------------------------------------------------------------------- programs

    def _ask(self, program: str, *arguments: str) -> tuple[str | None, str]:
        """(its output or None, what it said or what is wrong with it)."""
        if program != "sacct" and time.monotonic() - self._failed.get(program, -_ASK_AGAIN_S) < _ASK_AGAIN_S:
            return None, "contact failed a moment ago"
        self.calls += 1
        try:
            done = subprocess.run(
                [program, *arguments],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="backslashreplace",
                timeout=self._timeout_s,
            )
        except subprocess.TimeoutExpired:
            error = "timed out"
        except OSError as problem:
            return None, str(problem)
        else:
            if done.returncode == 0:
                return done.stdout, done.stderr
            error = done.stderr
        if "contact" in error or "timed out" in error:
            self._failed[program] = time.monotonic()
        return None, error


_scheduler = Scheduler()


def jobs(ids: Iterable[str]) -> dict[str, JobInfo]:
    """`Scheduler.jobs` of the one that this process remembers."""
    return _scheduler.jobs(ids)


def _environment() -> dict[str, str]:
    """Without what people set to have squeue and sacct print, or leave out, something else."""
    changing = re.compile(r"(SQUEUE|SACCT|SCONTROL)_|SLURM_TIME_FORMAT$")
    kept = {name: value for name, value in os.environ.items() if not changing.match(name)}
    return {**kept, "SLURM_BITSTR_LEN": "0"}  # lists of an array's jobs in full


# ------------------------------------------------------------------------------------------------------------ reading


def _parse_squeue(text: str) -> dict[str, JobInfo]:
    found: dict[str, JobInfo] = {}
    for line in text.splitlines():
        values, at = [], 0
        for width in _COLUMNS.values():
            values.append(line[at : at + width].strip())
            at += width
        job, state, restarts, status, reason, nodes, start = values
        found[job] = JobInfo(
            state.split()[0].rstrip("+") if state else "",
            int(restarts) if restarts.isdecimal() else None,
            _known(nodes),
            _known(reason),
            (int(status) >> 8 & 255, int(status) & 127) if status.isdecimal() else None,
            _known(start),
        )
    return found


def _parse_scontrol(text: str) -> dict[str, JobInfo]:
    found: dict[str, JobInfo] = {}
    for line in text.splitlines():
        number = re.match(r"JobId=(\d+)(?: ArrayJobId=(\d+) ArrayTaskId=(\S+))?", line)
        state = re.search(r" JobState=(\S+) Reason=(.*?) Dependency=", line)
        if not number or not state:
            continue
        fields = dict(re.findall(r" (Restarts|ExitCode|StartTime|NodeList)=(\S*)", line))
        restarts = fields.get("Restarts", "")
        info = JobInfo(
            state[1],
            int(restarts) if restarts.isdecimal() else None,
            _known(fields.get("NodeList", "")),
            _known(state[2]),
            _exit(fields.get("ExitCode", "")),
            _known(fields.get("StartTime", "")),
        )
        numbers = [number[1]] if number[2] is None else [f"{number[2]}_{index}" for index in _indices(number[3])]
        found |= dict.fromkeys(numbers, info)
    return found


def _parse_sacct(text: str) -> dict[str, JobInfo]:
    """The last line of each job: where there are several, they are its starts, in their order."""
    found: dict[str, JobInfo] = {}
    for line in text.splitlines():
        values = line.split("|")
        if len(values) != len(_SACCT) or not (number := re.fullmatch(r"(\d+)(?:_(\d+|\[.*\]))?", values[0])):
            continue
        state = values[1].split()[0].rstrip("+") if values[1].strip() else ""  # CANCELLED by 1000
        info = JobInfo(state, None, _known(values[3]), None, _exit(values[2]), _known(values[4]))
        indices = _indices(number[2].strip("[]")) if number[2] else [None]
        for index in indices:
            found[number[1] if index is None else f"{number[1]}_{index}"] = info
    return found


def _pick(found: dict[str, JobInfo], wanted: list[str]) -> dict[str, JobInfo]:
    """Those that are wanted; the number of an array stands for the one of its jobs that is farthest from done."""
    out = {job: found[job] for job in wanted if job in found}
    whole = {job for job in wanted if job not in found and "_" not in job}
    order = (RUNNING, ENDING, WAITING, HALTED, FAILED, {"CANCELLED"})
    for job, info in found.items():
        array = job.split("_")[0]
        if array not in whole:
            continue
        ranks = [
            next((n for n, states in enumerate(order) if x.state in states), 9) for x in (info, out.get(array, info))
        ]
        if array not in out or ranks[0] < ranks[1]:
            out[array] = info
    return out


def _known(value: str) -> str | None:
    """None for Slurm's words for nothing."""
    value = value.strip()
    return None if value in ("", "None", "(null)", "N/A", "n/a", "Unknown", "None assigned") else value


def _exit(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _indices(text: str) -> list[int | None]:
    """'0-2,5%1' -> [0, 1, 2, 5]; what is no list of numbers has none."""
    out: list[int | None] = []
    for part in text.split("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            out += range(first, min(last, first + 1_000_000) + 1, int(match[3] or 1) or 1)
    return out


def first_node(nodes: str) -> str:
    """'gpu[003-007,9],login1' -> 'gpu003'."""
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes
