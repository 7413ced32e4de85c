"""Who takes which pieces of an iteration's work: any number of processes, shares that differ by one piece at most.

The work comes in rounds, each of as many pieces (the micro-batches of a minibatch), and all meet after a round. Every
round is dealt in blocks, in the order of ranks, as evenly as it can be; those who take one piece more go on in turn
from round to round, so that all rounds together are dealt as evenly as they can be, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def share(pieces: int, number: int, *, rank: int, world_size: int) -> range:
    """Which of the `pieces` of round `number`, both counted from 0, are a process's own; it may be none."""
    each, more = divmod(pieces, world_size)
    first = number * more % world_size
    end = first + more  # ranks first to end, past the last one from 0 on, take one more
    before = max(0, min(end, rank) - first) + max(0, min(end - world_size, rank))
    begin = rank * each + before
    return range(begin, begin + each + ((rank - first) % world_size < more))


@dataclass(frozen=True)
class Balance:
    """How evenly `rounds` of `pieces` of `images` are shared by `processes`."""

    pieces: int  # of a round
    rounds: int
    processes: int
    images: int  # of a piece

    @property
    def total(self) -> int:
        """Pieces of all rounds."""
        return self.pieces * self.rounds

    @property
    def even(self) -> bool:
        """Whether no process has more pieces of a round than another."""
        return self.pieces % self.processes == 0

    @property
    def most(self) -> int:
        """Pieces of the busiest process in all rounds together, as where nobody waits between them."""
        return -(-self.total // self.processes)

    @property
    def most_of_a_round(self) -> int:
        """Pieces of the busiest process of a round."""
        return -(-self.pieces // self.processes)

    @property
    def most_images(self) -> int:
        """Images of that process."""
        return self.most * self.images

    @property
    def idle(self) -> int:
        """Processes without a piece in any round."""
        return max(0, self.processes - self.total)

    def efficiency(self, together: float = 1.0, by_round: float = 0.0) -> float:
        """Mean over most work of a process, in (0, 1].

        Args:
            together, by_round: work on a piece where nobody waits between rounds (sampling), and where all meet after
                each (the update), in any unit.
        """
        most = together * self.most + by_round * self.rounds * self.most_of_a_round
        return (together + by_round) * self.total / self.processes / most


def usual_rows(most: int, mean: float) -> int:
    """Rows for the images of a process that holds about `mean` of a draw, at most `most`: six standard deviations more,
    which a draw exceeds once in 10^8 times."""
    return min(most, math.ceil(mean + 6 * math.sqrt(mean)))
