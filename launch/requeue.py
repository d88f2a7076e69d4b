"""What follows the tasks of a job: whether it is started again, when, and asking Slurm for it. The last lines of its script.

Of the standard library alone, and run by its path: the host may have no more than some Python 3 (3.6 or later), and the
container of the training no scontrol. `decide` is pure; without Slurm the local supervisor goes by it as well.
"""

import argparse
import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

if __package__:
    from . import history
else:
    import history  # type: ignore[no-redef]  # beside this file, which is run by its path

OUTCOME = os.path.join("job", "outcome.json")
DONE, CRASH, USER_ERROR, STOPPED = 0, 1, 2, 75
_TOLD = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_DIED_TOLD = {int(number) + base for number in _TOLD for base in (0, 128)}
"""Codes of tasks that were told to end before they could listen."""
_ASKS = ("cancel", "cancel refused")
_GOES_ON = ("RUNNING", "SUSPENDED", "CONFIGURING", "RESIZING", "SIGNALING", "STOPPED")
"""What Slurm says of a job that nothing has ended."""
_MARGIN_S = 90
"""Slurm may send the signal of the time limit a minute early."""
_OUTAGE_S = 900.0
"""How long Slurm may not answer. Meanwhile nobody else could have the nodes."""
_REFUSALS = 10
"""So many times, a second apart, Slurm is asked."""

Policy = collections.namedtuple("Policy", "timeouts crashes delay_s max_delay_s signal_before_s")
"""As `RequeuePolicy` of a cluster, and its `signal_before_s`; timeouts: None is as often as it takes."""

Decision = collections.namedtuple("Decision", "requeue reason delay_s crashes code")
"""requeue: whether to ask for it. reason: as in the history's events; "done", "already requeued" as well. crashes: so many
in a row without progress, this one included. code: of the training, as the script's own is to be.
"""


def decide(code, *, job, restart, task, outcome, seen, events, policy, step, now):
    """The decision after the tasks of a job have ended; reads and changes nothing.

    code: the highest of its tasks. outcome: what rank 0 wrote, or None. seen: fields of `scontrol show job`, None if it did
    not answer. events: the history of the run. step: of its newest checkpoint, None if it has none. now: seconds, epoch.
    """
    why = ""
    if _is_of(outcome or {}, job, restart, task) and outcome.get("code") in (DONE, USER_ERROR, STOPPED):
        code, why = outcome["code"], str(outcome.get("why") or "")

    def go(reason, delay_s=0.0, crashes=0):
        return Decision(True, reason, delay_s, crashes, code)

    def stay(reason, crashes=0):
        return Decision(False, reason, 0.0, crashes, code)

    if code == DONE:
        return stay("done")
    if code == USER_ERROR:
        return stay("user error")
    if code == STOPPED and why.startswith("stop_at"):
        return stay("stop_at")
    seen = seen or {}
    if _number(seen.get("Restarts")) > restart:
        return stay("already requeued")
    if _cancelled(events, job, restart):
        return stay("cancelled")
    over = seen.get("JobState", "RUNNING") not in _GOES_ON
    at_limit, preempted = over and seen.get("Reason") == "TimeLimit", _preempted(seen)
    if over and not at_limit and not preempted:
        return stay("cancelled")

    told = code == STOPPED or code in _DIED_TOLD
    if preempted and not at_limit and (over or told):  # over: by PreemptMode=CANCEL, at the end of the grace time
        return go("preempted")
    progressed = _progressed(events, job, restart, task, step)
    crashes = _crashes_before(events, job, task, step) + 1
    if at_limit or (told and _near_the_limit(seen, policy, now)):
        before = [e for e in events if _is_requeue(e, job, task) and e.get("reason") == "time limit"]
        if policy.timeouts is not None and len(before) >= policy.timeouts:
            return stay("time limits used up")
        if progressed:
            return go("time limit")
        # an evaluation, which always begins anew, or a training that takes too long to start, would do so for ever
        return go("time limit", crashes=crashes) if crashes <= policy.crashes else stay("no progress", crashes)
    if code == STOPPED and progressed:
        return go("stopped")

    # a crash; or a stop before the first step, as ranks do that wait for one that crashed: for ever, if it always does
    if crashes > policy.crashes:
        return stay("crashes used up", crashes)
    delay_s = min(policy.delay_s * 2.0 ** min(crashes - 1, 60), policy.max_delay_s)
    return go("stopped" if code == STOPPED else "crash", delay_s, crashes)


def _is_of(event, job, restart, task):
    return (event.get("job"), event.get("restart"), event.get("task")) == (job, restart, task)


def _is_requeue(event, job, task):
    return event["event"] == "requeue" and (event.get("job"), event.get("task")) == (job, task)


def _cancelled(events, job, restart):
    """Whether `selfsup cancel` was asked for since the previous incarnation ended: one that was brought back goes on.

    By the order of the lines: they are written on several hosts, whose clocks may differ.
    """
    asked = False
    for e in events:
        if e.get("job") not in (job, job.split("_")[0]):
            continue
        if e["event"] in _ASKS:
            asked = e["event"] == "cancel"
        elif _number(e.get("restart")) < restart:
            asked = False
    return asked


def _preempted(seen):
    """Slurm writes times so that they sort as text; what is older than this start is of an earlier one."""
    preempted, started = (str(seen.get(key) or "None") for key in ("PreemptTime", "StartTime"))
    return preempted[:1].isdigit() and not (started[:1].isdigit() and preempted < started)


def _near_the_limit(seen, policy, now):
    try:
        end = time.mktime(time.strptime(seen.get("EndTime") or "", "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):  # no limit
        return False
    return now >= end - policy.signal_before_s - _MARGIN_S


def _progressed(events, job, restart, task, step):
    """Whether there is a checkpoint newer than the one that this incarnation began with."""
    starts = [e for e in events if e["event"] == "start" and _is_of(e, job, restart, task)]
    return bool(starts) and (step or 0) > _number(starts[-1].get("step"))


def _crashes_before(events, job, task, step):
    """Crashes in a row at this step; what was requeued for other reasons in between is no progress."""
    before = [e for e in events if _is_requeue(e, job, task) and _number(e.get("crashes")) > 0]
    if not before or (step or 0) > _number(before[-1].get("step")):
        return 0
    return _number(before[-1]["crashes"])


def _number(value):
    return value if isinstance(value, (int, float)) else int(value) if str(value).isdecimal() else 0


# --------------------------------------------------------------------------------------------------------- a run's files


def read_outcome(run):
    """What rank 0 wrote last, or None."""
    try:
        with open(os.path.join(str(run), OUTCOME), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def newest_step(run):
    """The step of the newest complete checkpoint; None without one."""
    try:
        with open(os.path.join(str(run), "checkpoints", "latest"), encoding="utf-8") as file:
            found = re.match(r"step_(\d{1,18})\s*$", file.read(100))
    except (OSError, ValueError):
        return None
    return int(found.group(1)) if found else None


def record(run, decision, *, job, restart, task):
    """The decision as an event of the history. Raises OSError."""
    if decision.requeue:
        history.append(
            run, "requeue", job=job, restart=restart, task=task, reason=decision.reason, code=decision.code,
            step=newest_step(run), crashes=decision.crashes, delay_s=decision.delay_s,
        )  # fmt: skip
    elif decision.reason not in ("done", "already requeued"):
        history.append(run, "stop", job=job, restart=restart, task=task, reason=decision.reason, code=decision.code)


def settle(run, decision, *, job, restart, task, policy):
    """Write the decision down; (what is to be carried out, what to say).

    Where nothing can be written, crashes cannot be counted: then it is so many starts, for whatever reason.
    """
    trouble = ""
    try:
        record(run, decision, job=job, restart=restart, task=task)
    except OSError as error:
        trouble = f" ({history.FILE} cannot be written: {error.strerror or error})"
        if decision.requeue and decision.crashes and restart >= policy.crashes:
            decision = decision._replace(requeue=False, reason="crashes used up", delay_s=0.0)
    return decision, f"(restart {restart}) {explain(decision, policy)}{trouble}"


# ---------------------------------------------------------------------------------------------------------------- Slurm


def call(*words, timeout=30.0):
    """A program of Slurm: (exit status, what it said); 127 if there is none, -1 if it does not answer."""
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(os.environ, SLURM_TIME_FORMAT="standard"),
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return -1, f"{words[0]} does not answer"
    except OSError as error:
        return 127, f"{words[0]} cannot be run: {error.strerror or error}"
    return done.returncode, " ".join(done.stdout.decode(errors="replace").split())


def show(name, patience_s=_OUTAGE_S):
    """JobState, Reason, Restarts, PreemptTime, StartTime and EndTime as Slurm says them, once it answers.

    None if it does not within that time, knows no such job, or is not there.
    """
    end = time.monotonic() + patience_s
    told = False
    while True:
        status, said = call("scontrol", "show", "job", name)
        if status == 0:
            found = re.findall(r"\b(JobState|Reason|Restarts|PreemptTime|StartTime|EndTime)=(\S*)", said)
            return dict(reversed(found))  # of several records the first
        over = status == 127 or "Invalid job id" in said or time.monotonic() > end
        if over or not told:
            say(said if over else f"Slurm does not answer; asking again for {patience_s / 60:g} minutes: {said}")
            told = True
        if over:
            return None
        time.sleep(1)


def ask(name, restart):
    """`scontrol requeue`; "" or what was said against it.

    Again if scontrol was killed with the job's other processes, or Slurm is down: its words do not tell that from a refusal.
    Never for a later start of the job, as a node that was cut off from Slurm might.
    """
    said = "scontrol was killed"
    for _ in range(_REFUSALS):
        seen = show(name)
        if seen is None:
            return "Slurm cannot be asked"
        if _number(seen.get("Restarts")) > restart:
            return ""
        status, answer = call("scontrol", "requeue", name)
        if status == 0 or "pending execution" in answer:
            return ""
        said = answer or said
        time.sleep(1)
    return said


def delay(name, seconds, patience_s=8.0):
    """Have it start no earlier than in so many seconds; whether Slurm took that."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if call("scontrol", "update", f"JobId={name}", f"StartTime=now+{round(seconds)}")[0] == 0:
            return True
        time.sleep(0.5)
    return False


# ---------------------------------------------------------------------------------------------------------- command line


def parse(argv):
    """The arguments, as launch.commands writes them."""
    parser = argparse.ArgumentParser(description="Decide whether a job of selfsup goes on, and ask Slurm for it.")
    parser.add_argument("folder", help="of the run, or of the sweep")
    parser.add_argument("--task", required=True)
    parser.add_argument("--code", type=int, required=True, help="exit code of its tasks")
    parser.add_argument("--timeouts", type=lambda text: None if text == "unlimited" else int(text), default=None)
    parser.add_argument("--crashes", type=int, default=3)
    parser.add_argument("--delay", type=float, default=30.0)
    parser.add_argument("--max-delay", type=float, default=1800.0)
    parser.add_argument("--signal-before", type=float, default=300.0)
    return parser.parse_args(argv)


def own_run(folder):
    """Of a sweep, whose jobs are an array, the run of this one."""
    index = os.environ.get("SLURM_ARRAY_TASK_ID")
    if index is None:
        return folder
    with open(os.path.join(folder, "job", "submission.json"), encoding="utf-8") as file:
        return os.path.join(folder, json.load(file)["runs"][int(index)])


def main(argv):
    """Decide, write it down, ask Slurm; the exit code of the training."""
    for number in (*_TOLD, signal.SIGINT):  # the requeue itself sends them, to children as well, which inherit this
        signal.signal(number, signal.SIG_IGN)
    options = parse(argv)
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # one element has the number of the array, which would mean all of them
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    restart = _number(os.environ.get("SLURM_RESTART_COUNT"))
    if not job:
        say("not a job of Slurm: there is no SLURM_JOB_ID; nothing is requeued")
        return options.code
    try:
        run = own_run(options.folder)
    except (OSError, ValueError, LookupError, TypeError) as error:
        say(f"{options.folder}: cannot tell the run of job {job}: {error}; not requeued")
        return options.code
    policy = Policy(options.timeouts, options.crashes, options.delay, options.max_delay, options.signal_before)

    def decided(seen):
        return decide(
            options.code, job=job, restart=restart, task=options.task, outcome=read_outcome(run), seen=seen,
            events=history.read(run), policy=policy, step=newest_step(run), now=time.time(),
        )  # fmt: skip

    decision = decided(None)
    if decision.requeue or decision.crashes:  # else Slurm, which may be down, has nothing to add
        decision = decided(show(job))
    decision, told = settle(run, decision, job=job, restart=restart, task=options.task, policy=policy)
    say(f"job {job} {told}")
    if decision.requeue:
        _carry_out(run, decision, job, restart, options.task)
    return decision.code


def say(text):
    """One line, in the job's log; on a full disk none. Not through `sys.stdout`: that would fail again at the end."""
    with contextlib.suppress(OSError):
        os.write(1, f"selfsup: {text}\n".encode())


def explain(decision, policy):
    """The decision in words."""
    went = f"ended with code {decision.code}"
    if decision.reason in ("done", "already requeued"):
        return f"{went}: {decision.reason}"
    if not decision.requeue:
        return f"{went}: {decision.reason}, so it is not started again"
    times = f" {decision.crashes} of {policy.crashes}" if decision.crashes else ""
    later = f" in {decision.delay_s:g} s" if decision.delay_s else ""
    return f"{went} ({decision.reason}{times}): starts again{later}"


def _carry_out(run, decision, job, restart, task):
    reason, refusal = "not requeued", ask(job, restart)
    if not refusal:
        if not _cancelled(history.read(run), job, restart):
            if decision.delay_s >= 1 and not delay(job, decision.delay_s):
                say(f"Slurm takes no later start of job {job}: it may start at once")
            return
        reason, refusal = "cancelled", "it was cancelled meanwhile"  # and the requeue may have brought it back
        call("scancel", job)
    say(f"job {job} is not requeued: {refusal}\nGo on with: selfsup submit ... --out {run} --resume")
    with contextlib.suppress(OSError):
        history.append(run, "stop", job=job, restart=restart, task=task, reason=reason, code=decision.code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
