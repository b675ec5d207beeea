"""The errors that a run may end with, each with the exit code that a supervisor acts on.

A message is one line: what is wrong, where, what was expected, and how to mend it. The command line prints
that line and leaves with `exit_code`; a traceback is shown only with `--debug`. Code 75 means "start the same
command again"; all others need a person first.
"""

from typing import ClassVar


class JaxinfraError(Exception):
    """Base of every error that is meant for the user; never raised itself."""

    exit_code: ClassVar[int] = 1


class Preempted(JaxinfraError):
    """The run was asked to stop, saved its state and can be started again."""

    exit_code = 75


class DataError(JaxinfraError):
    """Training data is damaged, missing or not what its manifest says."""

    exit_code = 78


class CheckpointError(JaxinfraError):
    """A checkpoint is damaged and no older good one exists."""

    exit_code = 79


class NonFiniteError(JaxinfraError):
    """The loss or the gradient is no longer a number: nothing that is trained or saved from here on is of use."""

    exit_code = 80


class ConfigError(JaxinfraError):
    """The config, its overrides or the layout that it asks for cannot work."""

    exit_code = 81


class StorageError(JaxinfraError):
    """Storage cannot be read or written: no space, no permission, no such place."""

    exit_code = 82
