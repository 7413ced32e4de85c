"""A training that notes every collective it issues; started in forks (zygote.py) by tests/bench/test_scaling.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch.distributed as dist

from advgrpo.policy.sharding import _Gather
from advgrpo.train import main
from advgrpo.training.run import Run


def run(arguments: list[str]) -> int:
    """[folder, *flags]: leaves folder/RANK.json, {iteration: [[kind, bytes that this process put in], ...]}; a block's
    gather is of kind "block"."""
    folder, *flags = arguments
    noted: dict[int, list[tuple[str, int]]] = {}
    gather, reduce, exchange = dist.all_gather_into_tensor, dist.all_reduce, dist.all_to_all_single
    iterate, gather_block = Run._iterate, _Gather.__call__
    now = [-1]  # the iteration under way; -1 outside of one
    of_block: list[bool] = []  # whether a block's gather is under way, which is another function's by PyTorch's version

    def note(kind: str, tensor) -> None:
        noted.setdefault(now[0], []).append((kind, tensor.numel() * tensor.element_size()))

    def noted_gather(output, tensor, *rest, **how):
        if not of_block:
            note("all_gather", tensor)
        return gather(output, tensor, *rest, **how)

    def noted_reduce(tensor, *rest, **how):
        note("all_reduce", tensor)
        return reduce(tensor, *rest, **how)

    def noted_exchange(output, tensor, *rest, **how):
        note("all_to_all", tensor)
        return exchange(output, tensor, *rest, **how)

    def noted_block(self, output_tensor, input_tensor, *rest, **how):
        note("block", input_tensor)
        of_block.append(True)
        try:
            return gather_block(self, output_tensor, input_tensor, *rest, **how)
        finally:
            of_block.pop()

    def noted_iteration(self):
        now[0] = self.trainer.iteration
        return iterate(self)

    dist.all_gather_into_tensor, dist.all_reduce, dist.all_to_all_single = noted_gather, noted_reduce, noted_exchange
    Run._iterate, _Gather.__call__ = noted_iteration, noted_block
    code = main(flags)
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(noted))
    return code
