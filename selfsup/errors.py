"""The one exception that means: the user can mend this (exit code 2, one or two lines, no traceback)."""


class UserError(Exception):
    """Bad input. The message names the key or file, what was seen, and what would be right, in at most two lines."""


class EarlyStop(Exception):
    """Training stopped early on purpose and can be resumed (exit code 75)."""


class RankLost(Exception):
    """Another rank is gone or hangs (exit code 1; the message is the report, a traceback would add nothing)."""
