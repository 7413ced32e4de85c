"""MessagePack, read into plain Python: what SGLang-Diffusion's rollout answers are written in.

Format: https://github.com/msgpack/msgpack/blob/master/spec.md. Extension types are refused, as is anything that is
nested deeper than `_DEEPEST`; nothing of an answer is ever run.
"""

from __future__ import annotations

import struct
from typing import Any

_DEEPEST = 32
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_SINGLE = {0xC0: None, 0xC2: False, 0xC3: True}
_LENGTHS = {  # first byte -> (kind, format of the length that follows)
    0xC4: ("bytes", ">B"),
    0xC5: ("bytes", ">H"),
    0xC6: ("bytes", ">I"),
    0xD9: ("text", ">B"),
    0xDA: ("text", ">H"),
    0xDB: ("text", ">I"),
    0xDC: ("list", ">H"),
    0xDD: ("list", ">I"),
    0xDE: ("map", ">H"),
    0xDF: ("map", ">I"),
}


def unpack(data: bytes) -> Any:
    """The one value that `data` is; ValueError where it is not whole, holds more, or is of a kind that is refused."""
    reader = _Reader(data)
    value = reader.value(0)
    if reader.place != len(data):
        raise ValueError(f"{len(data) - reader.place} bytes follow the value")
    return value


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.place = data, 0

    def take(self, count: int) -> bytes:
        part = self.data[self.place : self.place + count]
        if len(part) < count:
            raise ValueError(f"the data end {count - len(part)} bytes too early")
        self.place += count
        return part

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError(f"nested deeper than {_DEEPEST}")
        first = self.take(1)[0]
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first in _SINGLE:
            return _SINGLE[first]
        if first in _NUMBERS:
            return self.number(_NUMBERS[first])
        if first in _LENGTHS:
            kind, form = _LENGTHS[first]
            return self.sized(kind, self.number(form), depth)
        if first < 0x90:
            return self.sized("map", first & 0x0F, depth)
        if first < 0xA0:
            return self.sized("list", first & 0x0F, depth)
        if first < 0xC0:
            return self.sized("text", first & 0x1F, depth)
        raise ValueError(f"byte {first:#x} begins an extension or nothing")

    def sized(self, kind: str, count: int, depth: int) -> Any:
        if kind == "bytes":
            return self.take(count)
        if kind == "text":
            return self.take(count).decode()  # UnicodeDecodeError is a ValueError
        if kind == "list":
            return [self.value(depth + 1) for _ in range(count)]
        found = {}
        for _ in range(count):
            key = self.value(depth + 1)
            if not isinstance(key, (str, int)):
                raise ValueError(f"a map has a key of type {type(key).__name__}")
            found[key] = self.value(depth + 1)
        return found
