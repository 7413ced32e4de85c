"""Text embeddings of a run in the caches of all its processes: one folder that all see, or one on each machine's disk.

All look into their caches. What none holds is encoded, by each process a share, into its own cache. What only some
hold, or hold with other last bits, is brought to the others, file by file: those bits depend on what was encoded beside
a prompt, so that encoding it again would give other ones, and an image other bits on another machine. Then all look
again, until nothing is absent or differs. Where all see one cache nothing can differ, and its folders are listed alone:
a file that is damaged there shows it when it is read, as in a run of one process.

Shapes: caches C, texts N.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from advgrpo.errors import UserError
from advgrpo.policy.text_cache import TextCache
from advgrpo.reporting.display import Display
from advgrpo.runtime.atomic import SUFFIX, remove
from advgrpo.runtime.cache import TensorCache
from advgrpo.runtime.distributed import SLOW_SECONDS, Distributed
from advgrpo.runtime.shares import share

_FILES = 16  # that are brought at once; of 2 MB each with a T5 at 128 tokens
_ROUNDS = 4  # a file that shows its damage when it is brought, is encoded again, and brought; and one to spare
_OLD_SECONDS = 24 * 3600.0  # of a mark that a killed process has left
_logger = logging.getLogger(__name__)


def encode_prompts(
    cache: TextCache, prompts: Sequence[str], folder: Path, display: Display, distributed: Distributed
) -> None:
    """Encode into this process's cache what it lacks, with progress for people and for the processes that wait.

    Args:
        folder: what people know the cache by.
    """
    missing = cache.missing(prompts)
    if not missing:
        return
    display.print_line(f"encoding {len(missing)} prompts into {folder}")
    with display.steps("encoding prompts", len(missing)) as show:

        def tell(done: int) -> None:
            show(done)
            distributed.progress("encode prompts", within_seconds=SLOW_SECONDS)

        cache.fill(missing, tell)


def fill_caches(
    cache: TextCache, texts: Sequence[str], folder: Path, display: Display, distributed: Distributed
) -> None:
    """Have every process find all texts in its cache, with the same bits. All processes call it at about one time.

    Args:
        cache: this process's, whose folder others may see as well.
        texts: the same on all processes.
        folder: as in `encode_prompts`.

    Raises:
        UserError: the text encoders or prompts of two processes differ; what is to be stored in a cache cannot be
            written, or is not found there afterwards.
    """
    if distributed.world_size == 1:
        encode_prompts(cache, texts, folder, display, distributed)
        return
    texts = list(dict.fromkeys(texts))
    _check_alike(cache, texts, distributed)
    caches = _Caches(cache, texts, distributed)
    for _ in range(_ROUNDS):
        content = caches.look()
        agreed = _agreed(content)
        if agreed.all() and (content == agreed).all():
            return
        nowhere = [text for text, held in zip(texts, agreed.tolist()) if not held]
        with distributed.monitored("encode prompts", at_most_seconds=SLOW_SECONDS):
            own = nowhere[distributed.rank :: distributed.world_size]
            encode_prompts(cache, own, folder, display, distributed)
        caches.bring(content, agreed, display)
    caches.check(caches.look(), folder)


def _check_alike(cache: TextCache, texts: list[str], distributed: Distributed) -> None:
    """UserError unless all processes mean the same by a text's number, and by its embedding."""
    what = {
        "data.prompts, data.held_out_prompts: process {} reads other prompts than process 0": json.dumps(texts),
        "model.path: process {} has other text encoders or tokenizers than process 0": cache.fingerprint,
    }
    mine = [hashlib.sha256(text.encode()).hexdigest() for text in what.values()]
    first, *others = distributed.gather_json(mine)
    for rank, other in enumerate(others, 1):
        for message, theirs, wanted in zip(what, other, first):
            if theirs != wanted:
                raise UserError(f"{message.format(rank)}; give all machines the same files")


class _Caches:
    """Which caches a job's processes have, and what is in them; every method is called by all of them.

    Attributes:
        members: of each cache the processes that see it, ascending.
        cache_of: of each process the number of its cache; `own` is this one's.
    """

    def __init__(self, cache: TextCache, texts: list[str], distributed: Distributed):
        self.cache, self.texts, self.distributed = cache, texts, distributed
        self._by_key = sorted(range(len(texts)), key=lambda number: cache.key(texts[number]))
        firsts = _first_neighbours(cache.tensors, distributed)
        self.cache_of = [sorted(set(firsts)).index(first) for first in firsts]
        self.members = [[] for _ in set(firsts)]
        for rank, number in enumerate(self.cache_of):
            self.members[number].append(rank)
        self.own = self.cache_of[distributed.rank]

    def look(self) -> Tensor:
        """[C, N] int64, a number for the content of each text's file in each cache; 0 where there is no sound one.

        A cache's processes share it out, by neighbouring keys, which lie in as few folders as can be. Of the only cache
        no file is opened: 1 then stands for one that is there.
        """
        distributed = self.distributed
        with distributed.monitored("look into the caches", at_most_seconds=SLOW_SECONDS):
            found = self._contents([self.texts[number] for number in self._share(distributed.rank)])
        gathered = distributed.all_gather(torch.tensor(found, dtype=torch.int64))
        result = torch.zeros(len(self.members), len(self.texts), dtype=torch.int64)
        shares = [self._share(rank) for rank in range(distributed.world_size)]
        for rank, (numbers, part) in enumerate(zip(shares, gathered.split([len(each) for each in shares]))):
            result[self.cache_of[rank], numbers] = part
        return result

    def _contents(self, texts: list[str]) -> list[int]:
        absent = set(self.cache.absent(texts))  # first: a file system that has denied a file goes on denying it
        if len(self.members) == 1:
            return [int(text not in absent) for text in texts]
        said = ["" if text in absent else self.cache.tensors.checksum(self.cache.key(text)) for text in texts]
        return [int(hashlib.sha256(each.encode()).hexdigest()[:15], 16) if each else 0 for each in said]

    def _share(self, rank: int) -> list[int]:
        """Which texts a process looks for in its cache, by number."""
        ranks = self.members[self.cache_of[rank]]
        part = share(len(self.texts), 0, rank=ranks.index(rank), world_size=len(ranks))
        return self._by_key[part.start : part.stop]

    def bring(self, content: Tensor, agreed: Tensor, display: Display) -> None:
        """Each text's file from a cache that has what is `agreed` [N] to those that, by `content` [C, N], do not.

        One whose file turns out to be damaged then has none, and sends none.
        """
        distributed = self.distributed
        differ = (content != agreed).any(0).nonzero().flatten().tolist()
        if not differ:
            return
        holders = (content == agreed).int().argmax(0).tolist()  # the first of each
        senders = {number: self._whose_turn(number, holders[number]) for number in differ}
        lacking = (content[self.own] != agreed).tolist()
        tensors, keys = self.cache.tensors, {number: self.cache.key(self.texts[number]) for number in differ}
        display.print_line(f"bringing {len(differ)} prompts' embeddings to the caches that lack them")
        with (
            distributed.temporary_group() as group,
            distributed.monitored("bring embeddings", at_most_seconds=SLOW_SECONDS),
            display.steps("bringing embeddings", len(differ)) as show,
        ):
            done = 0
            for sender, numbers in _pieces(senders):
                distributed.progress("bring embeddings", within_seconds=SLOW_SECONDS)
                files = [tensors.file(keys[number]) if distributed.rank == sender else b"" for number in numbers]
                for number, file in zip(numbers, distributed.from_rank(sender, files, group)):
                    if file and lacking[number] and self._whose_turn(number, self.own) == distributed.rank:
                        tensors.store_file(keys[number], file)
                done += len(numbers)
                show(done)

    def _whose_turn(self, number: int, cache: int) -> int:
        """Which of the processes that see a cache reads or stores a text there."""
        ranks = self.members[cache]
        return ranks[number % len(ranks)]

    def check(self, content: Tensor, folder: Path) -> None:
        """UserError where a cache lacks what was stored: somebody would load the encoders in the middle of training."""
        lacking = (content != _agreed(content)) | (content == 0)
        for ranks, row in zip(self.members, lacking.tolist()):
            absent = [text for text, lacks in zip(self.texts, row) if lacks]
            if absent:
                raise UserError(
                    f"data.cache_dir = {str(folder)!r}: process {ranks[0]} does not find {len(absent)} of "
                    f"{len(self.texts)} prompts there as they have been stored, first {absent[0]!r}; name a "
                    "folder from which nothing is removed while a run uses it (--data.cache-dir)"
                )


def _first_neighbours(cache: TensorCache, distributed: Distributed) -> list[int]:
    """[processes] the lowest rank of those that see the same folder.

    Each leaves a file there and looks whose it sees: a folder's path or number says nothing across machines. One that
    cannot has a cache of its own, in which nothing may be missing.
    """
    name = f".{distributed.gather_json(secrets.token_hex(8))[0]}-"
    own = f"{name}{distributed.rank}{SUFFIX}"
    seen = [distributed.rank]
    try:
        with distributed.monitored("see who has which cache", at_most_seconds=SLOW_SECONDS):
            writable = _leave(cache, own)
        if writable:
            seen = [int(file[len(name) : -len(SUFFIX)]) for file in os.listdir(cache.root) if file.startswith(name)]
        return distributed.gather_json(min(seen))  # all have looked
    finally:
        with suppress(OSError):
            remove(cache.root / own)
        if distributed.rank == min(seen):
            _remove_old_marks(cache.root)


def _leave(cache: TensorCache, mark: str) -> bool:
    """Whether it could."""
    try:
        cache.leave(mark)
    except UserError as error:
        _logger.warning("%s; it is read, until something has to be stored there", error)
        return False
    return True


def _remove_old_marks(root: Path) -> None:
    """What processes that were killed have left, but not what others leave now."""
    for mark in root.glob(f".*-*{SUFFIX}"):
        with suppress(OSError):
            if time.time() - mark.stat().st_mtime > _OLD_SECONDS:
                remove(mark)


def _agreed(content: Tensor) -> Tensor:
    """[N] int64, the content [C, N] that most caches have of each text, the first one's among equals; 0: none has any.

    A machine that joins two or more thus takes over what they have, whatever an earlier run has left on its disk; of
    two, process 0's counts.
    """
    counts = [Counter(value for value in column if value) for column in content.T.tolist()]
    return torch.tensor([count.most_common(1)[0][0] if count else 0 for count in counts])  # the first of equals


def _pieces(senders: dict[int, int]) -> Iterator[tuple[int, list[int]]]:
    """(sender, numbers of texts) of at most so many files each."""
    for sender, group in groupby(sorted(senders, key=senders.__getitem__), key=senders.__getitem__):
        numbers = list(group)
        for start in range(0, len(numbers), _FILES):
            yield sender, numbers[start : start + _FILES]
