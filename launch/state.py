"""In which state a run is, from what the scheduler says of its job and what its folder tells. Pure functions.

queued      waits for its first start, or, after a crash, for its next try
running
preempted   ended in an orderly way before its last step, and goes on: by itself, or with --resume if nobody runs it
completed   came to its last step, or to the one it was to stop at, or was stopped early by its evaluations
failed      ended otherwise, or is gone without a word
cancelled   somebody ended it
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from . import slurm
from .slurm import JobInfo

State = Literal["queued", "running", "preempted", "completed", "failed", "cancelled"]
STATES: tuple[State, ...] = ("queued", "running", "preempted", "completed", "failed", "cancelled")
FINAL = {"completed", "failed", "cancelled"}
_DONE_STOPS = {"stop_at"}
"""Reasons to stop that are what was asked for."""


@dataclass(frozen=True)
class Story:
    """What the history of a run tells of one task of one job: the newest event of each kind, {} if there is none."""

    start: Mapping[str, Any]
    end: Mapping[str, Any]
    requeue: Mapping[str, Any]
    stop: Mapping[str, Any]
    cancel: Mapping[str, Any]
    last: str
    """The kind of the job's own newest event; "" if there is none."""
    code: int | None
    """How its newest start ended in an orderly way: 0 done, 75 resumable, 2 the user's to mend; None if it did not."""

    @property
    def restart(self) -> int | None:
        """How often it was started again."""
        restart = self.start.get("restart")
        return restart if isinstance(restart, int) else None

    def over(self) -> State | None:
        """How it ended by its own account; None if it goes on, or ended without a word."""
        reason = self.stop.get("reason")
        if self.code == 0 or (self.stop and reason in _DONE_STOPS):
            return "completed"
        if self.cancel or (self.stop and reason == "cancelled"):
            return "cancelled"
        return "failed" if self.stop or self.code == 2 else None

    def waiting(self) -> State:
        """What it is while it waits to be started again: a crash was no preemption."""
        return "queued" if self.requeue.get("reason") == "crash" else "preempted"


def tell(events: Iterable[Mapping[str, Any]], job: str | None, task: str, outcome: Mapping[str, Any] | None) -> Story:
    """The story of a task of this job. events: of the run, of all its jobs; outcome: RUN/job/outcome.json, if it is there.

    What was before the newest start, a crash before a preemption, say, is left out, and what an earlier one said later.
    """
    newest: dict[str, Mapping[str, Any]] = {}
    last, newest_restart = "", 0
    for event in events:
        kind = str(event.get("event"))
        if event.get("job") != job or (not kind.startswith("cancel") and event.get("task") != task):
            continue
        restart = event.get("restart")
        if not kind.startswith("cancel") and isinstance(restart, int):
            if restart < newest_restart:  # on a node that Slurm had lost: what becomes of it is no matter
                continue
            newest_restart = restart
        if kind == "start":
            newest = {}
        if kind == "cancel refused":  # by Slurm, which was asked after it was written down
            newest.pop("cancel", None)
            continue
        newest[kind] = event
        last = last if kind == "cancel" else kind  # that is somebody's, not the job's own
    found = {kind: newest.get(kind, {}) for kind in ("start", "end", "requeue", "stop", "cancel")}
    code = found["end"].get("code")
    same = outcome is not None and (outcome.get("job"), outcome.get("task")) == (job, task)
    if code is None and same and outcome is not None and outcome.get("restart") == found["start"].get("restart"):
        code = outcome.get("code")
    return Story(**found, last=last, code=code if isinstance(code, int) else None)


def of_slurm(info: JobInfo, story: Story, finished: bool) -> State:
    """Of a job that Slurm knows. finished: the run has come to its last step, or was stopped early."""
    word = info.state
    began = bool(info.restarts) or bool(story.start)
    if word in slurm.RUNNING:
        return "running"
    if word in slurm.HALTED:
        return "completed" if story.code == 0 else "preempted"
    if word in slurm.WAITING:
        return story.waiting() if began else "queued"
    if word in slurm.ENDING:
        return _ending(info, story, finished)
    return _ended(word, story, finished)


def _ending(info: JobInfo, story: Story, finished: bool) -> State:
    """Its script has yet to come to an end, or decides about a requeue; Slurm does not say why."""
    if info.restarts is not None and info.restarts > (story.restart or 0):
        return story.waiting()  # requeued already
    if (over := story.over()) is not None:
        return over
    if story.requeue or info.reason == "TimeLimit":
        return story.waiting()
    code, number = info.exit or (0, 0)
    if code not in (0, 75) and not number:
        return "failed"
    return "completed" if finished else "cancelled"


def _ended(word: str, story: Story, finished: bool) -> State:
    over = story.over()
    if word == "COMPLETED":
        return "completed" if finished or over == "completed" else over or "failed"
    if word == "CANCELLED":
        return "completed" if story.code == 0 else "cancelled"
    return over or "failed"


def of_folder(story: Story, finished: bool, alive: bool, gone: bool) -> State:
    """Of a job that no scheduler knows. alive: a process writes to the run, or is there to start one.

    gone: the scheduler has answered and has no such job (or is itself gone, on this machine): nothing will start it.
    """
    over = story.over()
    if over is not None:
        return over
    if finished and not alive:
        return "completed"
    if gone:  # one that waited was not killed by anything but a person, or by the failure of what it waited for
        return "cancelled" if story.last in ("", "requeue") else "failed"
    if story.last == "requeue":
        return story.waiting()
    if not story.last:
        return "queued"
    if alive:
        return "running"
    return "preempted" if story.code == 75 else "failed"


def of_plain(finished: bool, alive: bool, beat: str | None) -> State:
    """Of a run that was never submitted. beat: how rank 0 ended, as its file in RUN/ranks tells; None without one."""
    if alive:
        return "running"
    if finished:
        return "completed"
    return "preempted" if beat == "done" else "failed"
