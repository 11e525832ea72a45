"""The one tree of errors.

The class says whose fault it is; the message says what happened, ``hint`` what was expected or what to do.
``geni_violin.runtime.problems`` is the one place that maps the classes to exit codes and HTTP statuses.
"""


class GeniViolinError(Exception):
    """Base of all errors that a person may meet.

    :param message: what happened, one line, without a full stop.
    :param hint: what was expected, or what to do about it; one line, may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class InvalidInput(GeniViolinError):
    """The caller's input is malformed: a topology file, a request body, an argument."""


class NotFound(GeniViolinError):
    """The caller named something that does not exist."""


class AlreadyExists(GeniViolinError):
    """The caller wants to create something under a name that is taken."""


class Conflict(GeniViolinError):
    """The request is well formed, but not possible in the present state (say, a second snapshot at a time)."""


class MachineFault(GeniViolinError):
    """This machine lacks something: a program, a kernel file, a free port, a permission."""


class NoSpace(MachineFault):
    """A disk is full, or would be."""


class PeerFault(GeniViolinError):
    """Another part of the system does not answer, or answered with a failure of its own."""


class ConsistencyViolation(GeniViolinError):
    """Something that must never happen was about to; the step was refused. Always a defect in this project."""
