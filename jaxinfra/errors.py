"""Errors that end a run, each with the exit code that a supervisor acts on.

A message is one line: what is wrong, where, what is allowed, and how to fix it. The command line prints it and exits
with `exit_code`; `--debug` adds the traceback. Codes 75 to 77 mean "run the same command again"; the others need a
person. All codes lie between those of Python (1 and 2) and those of a process that a signal has ended (128 and above).
"""

from collections.abc import Collection


class JaxinfraError(Exception):
    """Base class of all errors for the user; never raised itself."""

    exit_code: int = 1


class Preempted(JaxinfraError):
    """The run was asked to stop, saved its state and can be resumed."""

    exit_code = 75


class PeerLostError(JaxinfraError):
    """Another process of the run has not joined, was killed or does not answer; the run can be started again."""

    exit_code = 76


class HungError(JaxinfraError):
    """No progress within the deadline of a phase; the run can be started again."""

    exit_code = 77


class DataError(JaxinfraError):
    """Training data is damaged, missing or differs from its manifest."""

    exit_code = 78


class CheckpointError(JaxinfraError):
    """A checkpoint is missing or damaged."""

    exit_code = 79


class NonFiniteError(JaxinfraError):
    """The loss or the gradient is NaN or infinite, so the state is useless."""

    exit_code = 80


class ConfigError(JaxinfraError):
    """The config, an override or the mesh is invalid."""

    exit_code = 81


class StorageError(JaxinfraError):
    """Storage cannot be read or written: no space, no permission, no such path."""

    exit_code = 82


class CorruptionError(JaxinfraError):
    """Devices that should hold the same values do not: one of them, or a link between them, computes wrong.

    Attributes:
        processes: indices of those that have a device that may be the cause.
    """

    exit_code = 83

    def __init__(self, message: str, processes: Collection[int] = ()) -> None:
        super().__init__(message)
        self.processes = processes


class RunInUseError(JaxinfraError):
    """Another start trains this run, or has taken it over while this one was stopped or cut off."""

    exit_code = 84


def quoted(piece: object, limit: int = 100) -> str:
    """Returns a value from a file of unknown origin for a message: short, and with escapes for control characters."""
    text = piece if isinstance(piece, str) else repr(piece)
    ending = f"... ({len(text):,} characters)" if len(text) > limit else ""
    # The `repr` of a character, without its quotes, is an escape such as \x1b, on which a terminal does not act.
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:limit]) + ending


def error_of_code(code: int, message: str) -> JaxinfraError:
    """Returns an error of the class with this exit code, to raise what another process has reported by its code.

    A code that no class has is set on a plain `JaxinfraError`.
    """
    error = next((cls for cls in JaxinfraError.__subclasses__() if cls.exit_code == code), JaxinfraError)(message)
    error.exit_code = code
    return error
