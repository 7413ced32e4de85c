"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """Bad input found before work is lost: a config value, a file, a checkpoint, a full disk.

    The message is one line that names the field or file, its value and the remedy. Command-line tools print it
    without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2
