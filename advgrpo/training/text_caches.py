"""Text embeddings of a run in the caches of all its processes: one folder that all see, or one on each machine's disk.

What no cache holds is encoded, by each process a share, into its own cache. What only some hold, or hold with other
last bits, is brought to the others, file by file: those bits depend on what was encoded beside a prompt, so that
encoding it again would give other ones, and an image other bits on another machine.

Shapes: caches C, texts N.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from advgrpo.errors import UserError
from advgrpo.policy.text_cache import TextCache
from advgrpo.reporting.display import Display
from advgrpo.runtime.atomic import SUFFIX, remove
from advgrpo.runtime.cache import TensorCache
from advgrpo.runtime.distributed import SLOW_SECONDS, Distributed
from advgrpo.runtime.shares import share

_FILES = 16  # that are brought at once; of 2 MB each with a T5 at 128 tokens


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
        UserError: the text encoders or prompts of two processes differ; a cache cannot be written, or lacks in the end
            what was stored in it.
    """
    if distributed.world_size == 1:
        encode_prompts(cache, texts, folder, display, distributed)
        return
    texts = list(dict.fromkeys(texts))
    _check_alike(cache, texts, distributed)
    caches = _Caches(cache, texts, distributed)
    there = caches.look(caches.is_there).bool()
    nowhere = [text for text, held in zip(texts, there.any(0).tolist()) if not held]
    with distributed.monitored("encode prompts", at_most_seconds=SLOW_SECONDS):
        own = nowhere[distributed.rank :: distributed.world_size]
        encode_prompts(cache, own, folder, display, distributed)
    if len(caches.members) > 1:
        caches.bring(display)
    if not there.all():
        caches.check(folder)


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

    def look(self, find: Callable[[list[str]], list[int]]) -> Tensor:
        """[C, N] int64 of what `find` says of each text in each cache, which its processes share out.

        A share is of neighbouring keys, which lie in as few folders as can be.
        """
        distributed = self.distributed
        with distributed.monitored("look into the caches", at_most_seconds=SLOW_SECONDS):
            found = find([self.texts[number] for number in self._share(distributed.rank)])
        gathered = distributed.all_gather(torch.tensor(found, dtype=torch.int64))
        result = torch.zeros(len(self.members), len(self.texts), dtype=torch.int64)
        shares = [self._share(rank) for rank in range(distributed.world_size)]
        for rank, (numbers, part) in enumerate(zip(shares, gathered.split([len(each) for each in shares]))):
            result[self.cache_of[rank], numbers] = part
        return result

    def _share(self, rank: int) -> list[int]:
        """Which texts a process looks for in its cache, by number."""
        ranks = self.members[self.cache_of[rank]]
        part = share(len(self.texts), 0, rank=ranks.index(rank), world_size=len(ranks))
        return self._by_key[part.start : part.stop]

    def is_there(self, texts: list[str]) -> list[int]:
        """For `look`: whether there is a file."""
        absent = set(self.cache.absent(texts))
        return [int(text not in absent) for text in texts]

    def content(self, texts: list[str]) -> list[int]:
        """For `look`: a number that stands for the file's content; 0 where there is none."""
        checksums = [self.cache.tensors.checksum(self.cache.key(text)) for text in texts]
        return [int(hashlib.sha256(said.encode()).hexdigest()[:15], 16) if said else 0 for said in checksums]

    def bring(self, display: Display) -> None:
        """Each text's file from a cache that has it to those that lack it, or have another one."""
        distributed = self.distributed
        content = self.look(self.content)
        agreed = _agreed(content)
        differ = (content != agreed).any(0).nonzero().flatten().tolist()
        if not differ:
            return
        senders = {number: self._sender(content[:, number] == agreed[number], number) for number in differ}
        lacking = (content[self.own] != agreed).tolist()
        display.print_line(f"bringing {len(differ)} prompts' embeddings to the caches that lack them")
        with (
            _patient(distributed) as group,
            distributed.monitored("bring embeddings", at_most_seconds=SLOW_SECONDS),
            display.steps("bringing embeddings", len(differ)) as show,
        ):
            done = 0
            for sender, numbers in _pieces(senders):
                distributed.progress("bring embeddings", within_seconds=SLOW_SECONDS)
                sends = distributed.rank == sender
                contents = [self._file(number) if sends else b"" for number in numbers]
                for number, file in zip(numbers, distributed.from_rank(sender, contents, group)):
                    if lacking[number] and self._stores(number):
                        self.cache.tensors.store_file(self.cache.key(self.texts[number]), file)
                done += len(numbers)
                show(done)

    def _sender(self, holds: Tensor, number: int) -> int:
        """Who sends a text: of the first cache that holds [C] the agreed content, its processes by turns."""
        ranks = self.members[int(holds.nonzero()[0])]
        return ranks[number % len(ranks)]

    def _file(self, number: int) -> bytes:
        """A text's file, which is sound: one that is damaged is made again here rather than spread."""
        self.cache.load([self.texts[number]])
        return self.cache.tensors.file(self.cache.key(self.texts[number]))

    def _stores(self, number: int) -> bool:
        """Whether this process is the one that stores a text for those that see its cache."""
        ranks = self.members[self.own]
        return ranks[number % len(ranks)] == self.distributed.rank

    def check(self, folder: Path) -> None:
        """UserError where a cache still lacks a text: somebody would load the encoders in the middle of training."""
        there = self.look(self.is_there).bool()
        for ranks, row in zip(self.members, there.tolist()):
            absent = [text for text, held in zip(self.texts, row) if not held]
            if absent:
                raise UserError(
                    f"data.cache_dir = {str(folder)!r}: process {ranks[0]} does not find {len(absent)} of "
                    f"{len(self.texts)} prompts there although they have been stored, first {absent[0]!r}; name a "
                    "folder from which nothing is removed while a run uses it (--data.cache-dir)"
                )


def _first_neighbours(cache: TensorCache, distributed: Distributed) -> list[int]:
    """[processes] the lowest rank of those that see the same folder.

    Each leaves a file there and looks whose it sees: a folder's path or number says nothing across machines.
    """
    name = f".{distributed.gather_json(secrets.token_hex(8))[0]}-"
    own = f"{name}{distributed.rank}{SUFFIX}"
    try:
        with distributed.monitored("see who has which cache", at_most_seconds=SLOW_SECONDS):
            cache.leave(own)
        seen = [file[len(name) : -len(SUFFIX)] for file in os.listdir(cache.root) if file.startswith(name)]
        return distributed.gather_json(min(int(rank) for rank in seen))  # all have looked
    finally:
        remove(cache.root / own)


def _agreed(content: Tensor) -> Tensor:
    """[N] int64, the content [C, N] that most caches have of each text, the lowest among equals; 0: none has any.

    A machine that joins a job thus takes over what the others have, whatever an earlier run has left on its disk.
    """
    agreed = content.max(0).values
    for number in ((content != agreed) & (content != 0)).any(0).nonzero().flatten().tolist():
        counts = Counter(value for value in content[:, number].tolist() if value)
        agreed[number] = min(counts, key=lambda value: (-counts[value], value))
    return agreed


def _pieces(senders: dict[int, int]) -> list[tuple[int, list[int]]]:
    """(sender, numbers of texts) of at most so many files each."""
    of_sender: dict[int, list[int]] = {}
    for number, sender in senders.items():
        of_sender.setdefault(sender, []).append(number)
    starts = (
        (sender, numbers, start) for sender, numbers in of_sender.items() for start in range(0, len(numbers), _FILES)
    )
    return [(sender, numbers[start : start + _FILES]) for sender, numbers, start in starts]


@contextmanager
def _patient(distributed: Distributed) -> Iterator[dist.ProcessGroup]:
    """A group whose processes wait for each other's disks."""
    group = distributed.patient_group()
    yield group
    dist.destroy_process_group(group)
