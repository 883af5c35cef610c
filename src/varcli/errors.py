"""What can go wrong for a user, and the exit code each case ends with.

    VarError                     never raised itself
    ├── UsageError        2      the command line asks for something impossible
    │   └── ConfigError          a setting has an impossible value; also a ValueError
    ├── InputError        3      an image, list or data set that cannot be used
    ├── CheckpointError   4      a checkpoint that cannot be found, read or trusted
    └── RunError          5      a run that could not finish

Messages say what was given and what would be right. ``varcli.cli`` is the one place that turns
them into a line on stderr and an exit status; Ctrl-C ends with 130, anything else is a bug and ends
with 1 and its traceback.
"""


class VarError(Exception):
    """Base of every error that the user can fix."""

    exit_code: int = 1


class UsageError(VarError):
    """An option or argument, alone or in combination, that makes no sense."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """A setting with a value that makes no sense."""


class InputError(VarError):
    """An input that cannot be used."""

    exit_code = 3


class CheckpointError(VarError):
    """A checkpoint that cannot be used."""

    exit_code = 4


class RunError(VarError):
    """A run that could not finish."""

    exit_code = 5
