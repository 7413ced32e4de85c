"""Text and JSON files that come from outside: read completely or refused in one line that names the place.

Refused are what other readers wait for, swallow or fail on later: pipes and devices, files too large to be what they
are taken for, nesting that exhausts the stack, and half characters (lone surrogates) that cannot be written again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advgrpo.errors import UserError

Pairs = Callable[[list[tuple[str, Any]]], Any]  # a JSON object's keys and values -> what stands for it
MAX_BYTES = 2**30  # ten million prompts
_SURROGATES = range(0xD800, 0xE000)
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


class UnreadableError(UserError):
    """A file is there and could not be read; what it holds is not known, so it is not said to be damaged."""


def failed_read(error: Exception) -> OSError | None:
    """The system's error by which a read failed, also where safetensors words it; None where there is nothing to read.

    None as well for any other exception: what was read is at fault then.
    """
    found = re.search(r"os error (\d+)", str(error))
    code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
    return None if code is None or code in _NOT_THERE else OSError(code, os.strerror(code))


def read_text(path: Path, what: str, remedy: str) -> str:
    """The text of a regular UTF-8 file, without its byte order mark.

    Args:
        what: how errors call the file, such as "prompt file".
        remedy: what to do where it does not exist.

    Raises:
        UserError: no such file, no regular file, more than `MAX_BYTES`, or not UTF-8.
        UnreadableError: reading it failed.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{what} {path} cannot be read: it is a folder")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{what} {path} cannot be read: it is a pipe or a device; give a regular file")
        if status.st_size > MAX_BYTES:
            raise UserError(f"{what} {path} is larger than {MAX_BYTES:,} bytes; split it")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist; {remedy}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        kind = UserError if failed_read(error) is None else UnreadableError
        raise kind(f"{what} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_json(
    text: str, where: str, remedy: str, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value of a JSON text; `pairs` makes the objects, as json.loads' object_pairs_hook.

    Raises:
        UserError: naming `where`: not JSON, nested too deeply, numbers beyond every use, or half characters.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); {remedy}") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply; {remedy}") from None
    except ValueError:  # Python refuses integers of more than 4300 digits
        raise UserError(f"{where}: a number has thousands of digits; {remedy}") from None
    if "\\u" in text and _half_characters(value):
        raise UserError(f"{where}: holds half a character (a lone \\ud800 ... \\udfff); {remedy}")
    return value


class RepeatedKeyError(Exception):
    """Of `unique_keys`; the key is its argument."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A `pairs` of `parse_json`: JSON keeps the last of two equal keys in silence, and what the first said is lost."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise RepeatedKeyError(key)
        result[key] = value
    return result


def _half_characters(value: Any) -> bool:
    found, left = False, [value]
    while left and not found:
        entry = left.pop()
        if isinstance(entry, str):
            found = any(ord(character) in _SURROGATES for character in entry)
        elif isinstance(entry, dict):
            left += [*entry.keys(), *entry.values()]
        elif isinstance(entry, list):
            left += entry
    return found
