"""Which start of a job this process belongs to: a scheduler starts a job again under the same name."""

import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Incarnation:
    """One start of a job: the first has restart 0."""

    job: str
    restart: int

    @classmethod
    def of_environment(cls) -> "Incarnation | None":
        """From SELFSUP_JOB and SELFSUP_RESTART; None without them, or if they are malformed."""
        restart = os.environ.get("SELFSUP_RESTART", "")
        if not (restart.isascii() and restart.isdecimal() and len(restart) < 10):
            return None
        return cls.parse({"job": os.environ.get("SELFSUP_JOB"), "restart": int(restart)})

    @classmethod
    def parse(cls, values: Any) -> "Incarnation | None":
        """From a mapping that anybody may have written; None unless "job" and "restart" are what they should be."""
        if not isinstance(values, dict):
            return None
        job, restart = values.get("job"), values.get("restart")
        if not isinstance(job, str) or not job or not job.isprintable() or len(job) > 255:
            return None
        return cls(job, restart) if type(restart) is int and restart >= 0 else None

    def supersedes(self, other: "Incarnation | None") -> bool:
        """Whether this is a later start of the same job."""
        return other is not None and other.job == self.job and other.restart < self.restart

    def __str__(self) -> str:
        return f"job {self.job} (restart {self.restart})"
