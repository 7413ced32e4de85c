"""Byte-pair encoding of a closed vocabulary, trained with a fixed order of ties (Sennrich et al., arXiv 1508.07909).

`tokenizers`' trainer numbers the letters that end a word in the order of a hash table, which is another one in every
process; its ties between pairs go by these numbers, so no two processes train the same tokenizer. This one does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

Pair = tuple[str, str]
END = "</w>"  # the end of a word, part of its last piece
_WORDS = re.compile(r"\w+|[^\w\s]+")  # as tokenizers' Whitespace splits


def learn_merges(text: Sequence[str]) -> list[Pair]:
    """The merges, in order, after which every word of `text` is one piece.

    The commonest pair of neighbouring pieces becomes one piece; of equally common ones the first in the alphabet's
    order, so that nothing depends on the process or on the order of `text`.
    """
    counts = Counter(word for line in text for word in _WORDS.findall(line))
    pieces = {word: [*word[:-1], word[-1] + END] for word in counts}
    merges = []
    while True:
        pairs: Counter[Pair] = Counter()
        for word, own in pieces.items():
            for pair in pairwise(own):
                pairs[pair] += counts[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merged(own, best) for word, own in pieces.items()}


def _merged(pieces: list[str], pair: Pair) -> list[str]:
    """The pieces with every occurrence of the pair, from the left, made one."""
    found: list[str] = []
    for piece in pieces:
        if found and (found[-1], piece) == pair:
            found[-1] += piece
        else:
            found.append(piece)
    return found
