"""Errors that a command answers with one line instead of a traceback (command.py)."""


class UserError(Exception):
    """Bad input found before work is lost: a config value, a file, a checkpoint, a full disk.

    The message is one line that names the field or file, its value and the remedy. Command-line tools print it
    without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2


class RunFailure(RuntimeError):
    """Something that can go wrong while a run runs and is no bug: the message says what, where and what to change."""
