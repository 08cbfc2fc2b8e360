"""What the tool says when it stops, and the exit code it stops with.

Each error is one line that names what was wrong, where, and what was expected. A bug of ours is none of these: it stays a
plain exception with its traceback.
"""

from __future__ import annotations

OK, FAILED, USAGE, REFUSED = 0, 1, 2, 3


class CliError(Exception):
    """Ends the command with ``exit_code`` and its message on stderr.

    Attributes:
        message: one line.
        advice: what to do next; may be empty.
    """

    exit_code = FAILED

    def __init__(self, message: str, *, advice: str = "") -> None:
        self.message = message
        self.advice = advice
        super().__init__(message)


class Failed(CliError):
    """The command was understood and could not be done."""

    exit_code = FAILED


class Usage(CliError):
    """The command or its input is wrong: another try with the same input ends the same."""

    exit_code = USAGE


class RefusedForSafety(CliError):
    """The command could be done and must not be: a signature, digest, floor or approval does not hold."""

    exit_code = REFUSED
