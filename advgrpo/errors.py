"""Errors that a command answers with one line instead of a traceback (command.py), and text that is safe to show."""


class UserError(Exception):
    """Bad input found before work is lost: a config value, a file, a checkpoint, a full disk.

    The message is one line that names the field or file, its value and the remedy. Command-line tools print it
    without a traceback and exit with `EXIT_CODE`.
    """

    EXIT_CODE = 2


class RunFailure(RuntimeError):
    """Something that can go wrong while a run runs and is no bug: the message says what, where and what to change."""


def printable(text: str, most: int | None = None) -> str:
    """`text` with its lines kept, other control characters escaped and all after `most` characters cut off.

    It may come from a file or another machine, and a terminal obeys control characters.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]} ..."
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )


def one_line(text: str, most: int | None = None) -> str:
    """As `printable`, with line ends and runs of spaces as one space."""
    return printable(" ".join(text.split()), most)
