"""The tokens of a row on several processes: sequence parallelism by an all-to-all before and after attention
(DeepSpeed-Ulysses, arXiv 2309.14509).

Outside of attention a token is computed without the others: each of N processes has a share of every stream's tokens,
all heads wide. Attention needs all tokens, but computes a head without the others: before it an exchange turns the
shares into all tokens of H / N heads, after it another one turns them back. An exchange moves bits and computes
nothing; its gradient is the opposite exchange. Shares of a stream differ by one token at most, so that any number of
tokens can be shared out and none is made up: a process has its tokens in the order of the stream.

What every process computes alike of all tokens (the loss, and so the gradient of `gathered`) reaches a weight that is
beside shares of tokens on each of them in part: the weight's gradient is the sum over the processes, once.

Shapes: T tokens of a stream, t of this process, R rows, H heads of width d, N processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.mesh import Mesh

_Move = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]  # of tokens and heads, by the tokens of every stream


def shares(tokens: int, processes: int) -> list[int]:
    """How many of the tokens each process has, in the order of the stream; the first ones have one more.

    Raises:
        ValueError: fewer tokens than processes.
    """
    if tokens < processes:
        raise ValueError(f"{tokens} tokens cannot be shared out over {processes} processes")
    each, more = divmod(tokens, processes)
    return [each + (number < more) for number in range(processes)]


class SequenceGroup:
    """This process's sequence group, which runs every forward and backward together, on the same rows.

    Args:
        distributed: the job.
        mesh: of more than one process a sequence group. Made by all processes at the same place.
    """

    def __init__(self, distributed: Distributed, mesh: Mesh):
        self.size, self.rank = mesh.sequence_size, mesh.sequence_rank
        self._distributed, self._group = distributed, mesh.sequence(distributed).get_group()

    def own(self, tokens: int) -> slice:
        """Which of a stream's tokens are this process's."""
        ends = [0, *accumulate(shares(tokens, self.size))]
        return slice(ends[self.rank], ends[self.rank + 1])

    def count(self, tokens: int) -> int:
        """How many of a stream's tokens are this process's."""
        return shares(tokens, self.size)[self.rank]

    def heads(self, x: torch.Tensor, streams: Sequence[int]) -> torch.Tensor:
        """[T, R, n, H / N, d] of this process's tokens [t, R, n, H, d], such as their q, k and v.

        Args:
            streams: how many tokens each stream has on all processes together; x holds this process's of the first one,
                then of the second, the result all of the first, then of the second.
        """
        return _Exchange.apply(x, self.to_heads, self.to_tokens, streams)

    def tokens(self, x: torch.Tensor, streams: Sequence[int]) -> torch.Tensor:
        """[t, R, n, H, d] of this process's heads [T, R, n, H / N, d] of all tokens: the other way."""
        return _Exchange.apply(x, self.to_tokens, self.to_heads, streams)

    def gathered(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """[T, R, C] of every process's tokens [t, R, C]; its gradient must be the same on all of them."""
        return _Gathered.apply(x, self, tokens)

    def to_heads(self, x: torch.Tensor, streams: Sequence[int]) -> torch.Tensor:
        """As `heads`, without a gradient."""
        found = x.new_empty(sum(streams), *x.shape[1:3], x.shape[3] // self.size, x.shape[4])
        parts = x.split([self.count(tokens) for tokens in streams])
        for part, whole in zip(parts, found.split(list(streams)), strict=True):
            by_process = part.unflatten(3, (self.size, -1)).movedim(3, 0).flatten(0, 1).contiguous()
            self.exchange(by_process, whole, [len(part)] * self.size, shares(len(whole), self.size))
        return found

    def to_tokens(self, x: torch.Tensor, streams: Sequence[int]) -> torch.Tensor:
        """As `tokens`, without a gradient."""
        own = [self.count(tokens) for tokens in streams]
        found = x.new_empty(sum(own), *x.shape[1:3], self.size * x.shape[3], x.shape[4])
        for whole, part in zip(x.split(list(streams)), found.split(own), strict=True):
            by_process = x.new_empty(self.size * len(part), *x.shape[1:])
            self.exchange(whole.contiguous(), by_process, shares(len(whole), self.size), [len(part)] * self.size)
            part.unflatten(3, (self.size, -1)).copy_(by_process.unflatten(0, (self.size, -1)).movedim(0, 3))
        return found

    def exchange(self, x: torch.Tensor, found: torch.Tensor, given: list[int], taken: list[int]) -> None:
        """Rows of x [sum of given, ...], given[i] to process i, and into `found`, taken[i] from it; both dense.

        Raises:
            CollectiveError, StopRequested, RankFailure: as of all collectives (runtime/distributed.py).
        """
        with self._distributed.collective("exchanging tokens and heads", of_all=False):
            dist.all_to_all_single(found, x, taken, given, group=self._group)


class _Exchange(torch.autograd.Function):
    """`there`, whose gradient is `back`: see `SequenceGroup.heads` and `tokens`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: _Move, back: _Move, streams: Sequence[int]) -> torch.Tensor:
        ctx.back, ctx.streams = back, streams
        return there(x, streams)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):
        return ctx.back(gradient, ctx.streams), None, None, None


class _Gathered(torch.autograd.Function):
    """See `SequenceGroup.gathered`. Of a gradient that all processes have alike each takes that of its tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: SequenceGroup, tokens: int) -> torch.Tensor:
        ctx.own, found = group.own(tokens), x.new_empty(tokens, *x.shape[1:])
        copies = x.expand(group.size, *x.shape).flatten(0, 1)
        group.exchange(copies, found, [len(x)] * group.size, shares(tokens, group.size))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor):
        return gradient[ctx.own], None, None
