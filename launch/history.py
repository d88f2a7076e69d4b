"""RUN/job/history.jsonl: starts, ends and requeues of a run's jobs, one a line.

Of the standard library alone, for any Python 3: the script of a job writes here too, outside of its container.
"""

import json
import os
import time

FILE = os.path.join("job", "history.jsonl")


def append(run, event, *, job, restart, task, **fields):
    """Add one event, in one write: lines of several writers do not mix. Raises OSError."""
    line = {"event": event, "time": round(time.time(), 3), "job": job, "restart": restart, "task": task}
    line.update(fields)
    path = os.path.join(str(run), FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = os.fstat(fd).st_size
        # a line that was cut in half must not take this one along
        whole = size == 0 or os.pread(fd, 1, size - 1) == b"\n"
        data = (b"" if whole else b"\n") + (json.dumps(line) + "\n").encode()
        if os.write(fd, data) < len(data):
            raise OSError("the disk is full")
    finally:
        os.close(fd)


def read(run):
    """The events, oldest first; lines that a crash cut in half are left out. [] if there are none."""
    try:
        with open(os.path.join(str(run), FILE), "rb") as file:
            raw = file.read()
    except OSError:
        return []
    events = []
    for line in raw.split(b"\n"):
        try:
            event = json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events
