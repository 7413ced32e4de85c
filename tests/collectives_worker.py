"""A training that notes every collective it issues; started in forks (zygote.py) by tests/bench/test_scaling.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch.distributed as dist

from advgrpo.train import main
from advgrpo.training.run import Run


def run(arguments: list[str]) -> int:
    """[folder, *flags]: leaves folder/RANK.json, {iteration: [[kind, bytes that this process put in], ...]}."""
    folder, *flags = arguments
    noted: dict[int, list[tuple[str, int]]] = {}
    gather, reduce, exchange = dist.all_gather_into_tensor, dist.all_reduce, dist.all_to_all_single
    iterate = Run._iterate
    now = [-1]  # the iteration under way; -1 outside of one

    def note(kind: str, tensor) -> None:
        noted.setdefault(now[0], []).append((kind, tensor.numel() * tensor.element_size()))

    def noted_gather(output, tensor, *rest, **how):
        note("all_gather", tensor)
        return gather(output, tensor, *rest, **how)

    def noted_reduce(tensor, *rest, **how):
        note("all_reduce", tensor)
        return reduce(tensor, *rest, **how)

    def noted_exchange(output, tensor, *rest, **how):
        note("all_to_all", tensor)
        return exchange(output, tensor, *rest, **how)

    def noted_iteration(self):
        now[0] = self.trainer.iteration
        return iterate(self)

    dist.all_gather_into_tensor, dist.all_reduce, dist.all_to_all_single = noted_gather, noted_reduce, noted_exchange
    Run._iterate = noted_iteration
    code = main(flags)
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(noted))
    return code
