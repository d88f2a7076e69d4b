"""The one exception that means: the user can mend this (exit code 2, one or two lines, no traceback)."""

from selfsup.wording import printable


class UserError(Exception):
    """Bad input. The message names the key or file, what was seen, and what would be right, in at most two lines."""

    def __str__(self) -> str:
        """What was typed, and names of files, may hold line ends and terminal codes: two printable lines, whatever it is."""
        first, _, rest = super().__str__().partition("\n")
        return "\n".join(printable(part) for part in (first, rest) if part)


class DiskError(UserError):
    """The run's disk did not give or take something: it is full, away or failing. That may pass, so a job tries again."""


class EarlyStop(Exception):
    """Training stopped early on purpose and can be resumed (exit code 75)."""


class RankLost(Exception):
    """Another rank is gone or hangs (exit code 1; the message is the report, a traceback would add nothing)."""
