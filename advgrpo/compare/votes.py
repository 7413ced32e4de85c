"""Votes: what one is, the file that they are appended to, and how files of several origins become one list.

A vote is one rater's answers on one pair, a line of JSON:

    {"id": text, "comparison": id, "rater": name, "pair": name, "left": picture, "right": picture,
     "answers": {question: "left" | "tie" | "right"}, "milliseconds": whole number, "at": Unix time in milliseconds}

Nothing is ever rewritten: who changes an answer votes again, and the later vote of a rater on a pair counts.
"""

from __future__ import annotations

import json
import os
import re
import threading
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from advgrpo.compare.plan import Comparison
from advgrpo.errors import UserError
from advgrpo.runtime.atomic import force_to_disk
from advgrpo.runtime.folders import FolderLock
from advgrpo.runtime.reading import RepeatedKeyError, parse_json, read_text, unique_keys

VOTES = "votes.jsonl"
CHOICES = ("left", "tie", "right")
MOST_BYTES = 2**28  # of votes.jsonl: half a million votes
_ID = re.compile(r"[A-Za-z0-9-]{8,64}")
_NAME_LENGTH = 80
_MOST_NUMBER = 2**53  # what JavaScript counts exactly


class BadVoteError(ValueError):
    """What is no vote on this comparison; the message is for who sent it."""


class RepeatedVoteError(BadVoteError):
    """Its id is that of another vote."""


@dataclass(frozen=True)
class Vote:
    """One rater's answers on one pair; see the head of this file."""

    id: str
    comparison: str
    rater: str
    pair: str
    left: str
    right: str
    answers: Mapping[str, str]
    milliseconds: int
    at: int

    @classmethod
    def read(cls, content: Any, comparison: Comparison) -> Vote:
        """From parsed JSON.

        Raises:
            BadVoteError: naming the field that is missing, unknown or wrong.
        """
        names = list(cls.__dataclass_fields__)
        if not isinstance(content, dict):
            raise BadVoteError(f"a vote is a JSON object, not a {type(content).__name__}")
        for name in [*content, *names]:
            if (name in content) != (name in names):
                raise BadVoteError(f"{name!r} is {'missing' if name in names else 'no field of a vote'}")
        vote = cls(**content)
        vote._check_texts()
        if vote.comparison != comparison.id:
            raise BadVoteError(f"comparison: {vote.comparison[:40]!r} is another comparison than {comparison.id!r}")
        pair = comparison.pairs.get(vote.pair)
        if pair is None:
            raise BadVoteError(f"pair: there is no {vote.pair[:40]!r}")
        if sorted((vote.left, vote.right)) != sorted((pair.a, pair.b)):
            raise BadVoteError(f"left, right: not the pictures of the pair {vote.pair!r}")
        if not isinstance(vote.answers, dict) or set(vote.answers) != set(comparison.questions):
            raise BadVoteError(f"answers: want one to each of {', '.join(comparison.questions)}")
        for question, choice in vote.answers.items():
            if choice not in CHOICES:
                raise BadVoteError(f"answers: {question} wants one of {', '.join(CHOICES)}")
        return vote

    def _check_texts(self) -> None:
        for name in ("id", "comparison", "rater", "pair", "left", "right"):
            if not isinstance(getattr(self, name), str):
                raise BadVoteError(f"{name}: want text")
        if not _ID.fullmatch(self.id):
            raise BadVoteError("id: want 8 to 64 letters, digits and hyphens")
        clean = " ".join(unicodedata.normalize("NFC", self.rater).split())
        if not 0 < len(self.rater) <= _NAME_LENGTH or self.rater != clean or not self.rater.isprintable():
            raise BadVoteError(f"rater: want a name of 1 to {_NAME_LENGTH} printable characters")
        for name in ("milliseconds", "at"):
            if type(getattr(self, name)) is not int or not 0 <= getattr(self, name) < _MOST_NUMBER:
                raise BadVoteError(f"{name}: want a whole number of milliseconds")

    def line(self) -> bytes:
        """As it stands in a file, with the line's end; in ASCII, so that where it breaks off it is still text."""
        return json.dumps(asdict(self), separators=(",", ":")).encode() + b"\n"


class VoteFile:
    """DIR/votes.jsonl, held by one process, appended to by its threads; `append` returns once a vote is on the disk.

    Raises:
        UserError: another process holds the folder, or a line is no vote on this comparison.
    """

    def __init__(self, folder: Path, comparison: Comparison) -> None:
        self.comparison = comparison
        self._path = folder / VOTES
        self._folder_lock = FolderLock(folder, "folder")
        self._lock = threading.Lock()
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        force_to_disk(folder)  # the name itself survives
        votes, self.torn = read_votes(self._path, comparison) if os.fstat(self._file).st_size else ([], 0)
        self._known = {vote.id: vote for vote in votes}
        # A process that was killed within a line has left no end of it.
        self._open_line = self._size() > 0 and os.pread(self._file, 1, self._size() - 1) != b"\n"

    def __len__(self) -> int:
        return len(self._known)

    def append(self, vote: Vote) -> bool:
        """False for one that is there already, which was sent again.

        Raises:
            RepeatedVoteError: another vote has its id.
            OSError: the disk did not take it, or the file is as large as it may become; it does not count.
        """
        with self._lock:
            known = self._known.get(vote.id)
            if known is not None:
                if known != vote:
                    raise RepeatedVoteError(f"id: {vote.id} is another vote's")
                return False
            line = (b"\n" if self._open_line else b"") + vote.line()
            if self._size() + len(line) > MOST_BYTES:
                raise OSError(f"{self._path} has reached {MOST_BYTES} bytes")
            self._open_line = True  # until all of it is there
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
            self._open_line = False
            self._known[vote.id] = vote
            return True

    def close(self) -> None:
        os.close(self._file)
        self._folder_lock.release()

    def _size(self) -> int:
        return os.fstat(self._file).st_size


def read_votes(path: Path, comparison: Comparison) -> tuple[list[Vote], int]:
    """The votes of a file in its order, and how many lines broke off in the middle (their process was killed).

    Raises:
        UserError: a line that is whole and no vote on this comparison; names file and line.
    """
    votes, torn = [], 0
    for number, line in enumerate(read_text(path, "votes", "name a file of votes").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            if line.startswith("{") and not line.rstrip().endswith("}"):
                torn += 1
                continue
        where, remedy = f"votes {path}, line {number}", "remove the line, or give the files of this comparison"
        try:
            content = parse_json(line, where, remedy, pairs=unique_keys)
            votes.append(Vote.read(content, comparison))
        except (BadVoteError, RepeatedKeyError) as error:
            raise UserError(f"{where}: {error}; {remedy}") from None
    return votes, torn


def latest(votes: Iterable[Vote]) -> list[Vote]:
    """Each rater's last vote on each pair, by time and, at one time, by place; one given twice counts once.

    Raises:
        UserError: two different votes have one id.
    """
    known: dict[str, Vote] = {}
    for vote in votes:
        if known.setdefault(vote.id, vote) != vote:
            raise UserError(f"two different votes have the id {vote.id}; leave out the file that was changed by hand")
    last: dict[tuple[str, str], Vote] = {}
    for vote in sorted(known.values(), key=lambda each: each.at):
        last[vote.rater, vote.pair] = vote
    return list(last.values())


def winner(vote: Vote, question: str, a: str) -> float:
    """1 where the picture `a` was preferred, 0 where the other was, 0.5 for a tie."""
    choice = vote.answers[question]
    if choice == "tie":
        return 0.5
    return float((vote.left if choice == "left" else vote.right) == a)


def read_all(folder: Path, files: Sequence[Path], comparison: Comparison) -> tuple[list[Vote], int]:
    """`latest` of the folder's own votes and of files that were downloaded; and the number of torn lines."""
    own = folder / VOTES
    votes, torn = [], 0
    for path in [*([own] if own.exists() else []), *files]:
        found, broken = read_votes(path, comparison)
        votes, torn = votes + found, torn + broken
    return latest(votes), torn
