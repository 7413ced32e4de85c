"""The protocol of flow_grpo's reward servers (github.com/yifan123/reward-server: GenEval, DeQA), as its client has it.

Request: `POST <url>` with a pickle of {"images": [JPEG bytes, ...], "prompts": [text, ...], "meta_datas": [dict, ...],
"only_strict": True}. The servers take what they know: DeQA "images", UnifiedReward "images" and "prompts", GenEval
"images", "meta_datas" and "only_strict"; a prompt's "meta_datas" entry is its line of the prompt file, the prompt
included. JPEG is PIL's default quality, as theirs. Answer: status 200 and a pickle of a dict of lists: "outputs" (DeQA,
UnifiedReward), or "scores", "rewards" and "strict_rewards" (GenEval, whose "scores" flow_grpo trains on). Failures are
status 500 with a traceback as text.

**Reading a pickle from a network can run any code**, which is why we write theirs and do not load theirs. An answer is
first looked through opcode by opcode: those that make plain data may stand in it (None, booleans, numbers, text, bytes,
lists, tuples, dicts) and nothing else; names of classes or functions, calls, persistent ids and extension codes are
refused before anything is built, and so are memo numbers that would take memory for nothing. Only then it is read, by
an `Unpickler` that finds no class whatever its name. A server whose scores are numpy's or torch's is asked to answer
plain numbers.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from advgrpo.rewards.judge_client import Refused, excerpt, to_float

# Opcodes by their names in pickletools.
_PLAIN = re.compile(
    "PROTO|FRAME|STOP|MARK|POP|POP_MARK|DUP|NONE|NEWTRUE|NEWFALSE|INT|BININT[12]?|LONG[14]?|(BIN)?FLOAT|"
    "(SHORT_)?(BIN)?(STRING|UNICODE)|BINUNICODE8|(SHORT_)?BINBYTES|BINBYTES8|(EMPTY_)?(LIST|TUPLE|DICT)|TUPLE[123]|"
    "APPENDS?|SETITEMS?|(LONG_)?(BIN)?(GET|PUT)|MEMOIZE"
)
_REMEDY = "let the server answer plain numbers, such as [float(score) for score in scores]"


class Pickles:
    """`remote.WireProtocol` of those servers."""

    CONTENT_TYPE = ""  # they look at none and answer text/html

    @staticmethod
    def request(pixels: np.ndarray, prompts: list[str], metadata: list[Mapping[str, Any]] | None) -> bytes:
        told = metadata or [{}] * len(prompts)
        request = {
            "images": [_jpeg(image) for image in pixels],
            "prompts": list(prompts),
            "meta_datas": [{**entry, "prompt": prompt} for entry, prompt in zip(told, prompts)],
            "only_strict": True,
        }
        return pickle.dumps(request, protocol=4)

    @staticmethod
    def scores(answer: bytes, count: int, key: str = "") -> list[float]:
        record = read_plain(answer)
        if not isinstance(record, dict):
            raise Refused(f"the answer is a pickled {type(record).__name__}; want a dict of lists")
        name = key or ("scores" if "scores" in record else "outputs")
        scores = record.get(name)
        if not isinstance(scores, (list, tuple)):
            there = ", ".join(each for each in record if isinstance(each, str)) or "nothing"
            raise Refused(f"the answer has no list {name!r}, but {there}; scores_key names the list to take")
        if len(scores) != count:
            raise Refused(f"the answer has {len(scores)} {name} for {count} images")
        for score in scores:
            if isinstance(score, bool) or not isinstance(score, (int, float)):
                raise Refused(f"the answer has a score that is a {type(score).__name__}, not a number; {_REMEDY}")
        return [to_float(score) for score in scores]


class _Nothing(pickle.Unpickler):
    """Finds no class."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")


def read_plain(answer: bytes) -> Any:
    """What a pickle of plain data holds.

    Raises:
        Refused: it is no pickle, or holds anything else; nothing of it has been built then.
    """
    try:
        for opcode, argument, _ in pickletools.genops(answer):
            if not _PLAIN.fullmatch(opcode.name):
                named = f" {argument}" if isinstance(argument, str) else ""
                raise Refused(
                    f"the answer's pickle holds more than plain data ({opcode.name}{named}), which may run any code "
                    f"and is not read; {_REMEDY}"
                )
            if "PUT" in opcode.name and int(argument) > len(answer):
                raise Refused(f"the answer's pickle is damaged: memo number {argument} in {len(answer)} bytes")
        return _Nothing(io.BytesIO(answer)).load()
    except Refused:
        raise
    except Exception as error:  # pickle and pickletools raise whatever the bytes lead them to
        raise Refused(f"the answer is no pickle ({type(error).__name__}: {error}): {excerpt(answer)}") from None


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()
