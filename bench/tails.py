"""How alike rewards rank a run's images by fewer steps after the window: `python -m bench.tails --preset NAME`.

The preset trains for `--after` iterations, so that its head is no longer random. Then the images of `--iterations` more
are drawn by all steps and by each of `--tails`, with the same noise, and scored by the run's rewards; nothing learns.
Of each tail: the network's rows beside those of all steps, the window's included, and Kendall's tau within groups, a
mean with its 95 % interval over groups. `rollout.tail_agreement` is what a run asks of it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass

import torch
from rich.console import Console

from advgrpo import config as configuration
from advgrpo.config import Config
from advgrpo.errors import UserError
from advgrpo.intervals import Interval, t_interval
from advgrpo.runtime.distributed import Distributed
from advgrpo.sampling.dynamics import rows, step_table
from advgrpo.training.cheaper import kendall_tau_b
from advgrpo.training.policy_gradient import PolicyGradient
from advgrpo.training.run import Run


@dataclass(frozen=True)
class Tail:
    """What so many steps after the window gave."""

    steps: int
    rows: float  # beside those of all steps
    tau: Interval


def measure(objective: PolicyGradient, iterations: range, tails: list[int]) -> list[Tail]:
    """Each of `tails` beside all steps, on the images of these iterations under the generator as it is."""
    settings, sampler = objective.settings, objective.sampler
    group, counted, taus = settings.group_size, dict.fromkeys([0, *tails], 0), {tail: [] for tail in tails}
    objective.policy.merge()
    for iteration in iterations:
        window = objective.table(iteration).window
        micro_batches = objective.micro_batches.of(iteration)
        rewards = {}
        for tail in counted:
            table = step_table(objective.policy, settings.num_steps, window, rollout=settings, tail_steps=tail)
            table.trained = ()
            for each in micro_batches:
                size = {"prompts": len(each.prompts), "images": len(each.image_ids)}
                counted[tail] += rows(table, **size, shared=sampler.share_prefix)
            drawn = objective.draw(sampler, table, micro_batches, iteration, "sample")
            rewards[tail] = objective.scorer.totals(drawn, iteration, group)
        for tail in tails:
            taus[tail].append(kendall_tau_b(rewards[0], rewards[tail], group))
    found = {tail: torch.cat(values) for tail, values in taus.items()}
    return [
        Tail(tail, counted[tail] / counted[0], t_interval(values[~values.isnan()])) for tail, values in found.items()
    ]


def measured(config: Config, tails: list[int], *, after: int, iterations: int) -> list[Tail]:
    """`measure` of a new run after some of its iterations."""
    run = Run(config, Distributed.start(config.device), resume=False, console=Console(quiet=True))
    objective = run.trainer.objective
    if not isinstance(objective, PolicyGradient):
        raise UserError(f"update.objective = {config.update.objective} has no window: want policy")
    for _ in range(after):
        run.trainer.iterate()
    return measure(objective, range(after, after + iterations), tails)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="whose settings")
    parser.add_argument("--tails", type=int, nargs="+", default=[4, 3, 2], help="steps after the window")
    parser.add_argument("--after", type=int, default=6, help="iterations of training before")
    parser.add_argument("--iterations", type=int, default=4, help="iterations whose images are drawn")
    flags = parser.parse_args(arguments)
    if min(*flags.tails, flags.iterations) < 1 or flags.after < 0:
        parser.error("want --tails and --iterations of at least 1, and --after of at least 0")
    with tempfile.TemporaryDirectory() as folder:
        changes = {"output_dir": folder, "data": {"held_out_prompts": ""}}
        settings = configuration.merge(configuration.read_preset(flags.preset), changes)
        config = configuration.build(settings, f"preset {flags.preset}")
        found = measured(config, flags.tails, after=flags.after, iterations=flags.iterations)
    groups = flags.iterations * config.rollout.prompts_per_iteration
    print(f"{flags.preset}, after {flags.after} iterations of training, {groups} groups")
    print("tail steps   rows    Kendall's tau within groups [95 %]")
    for tail in found:
        print(f"{tail.steps:10d}   {tail.rows:.3f}   {tail.tau.text('.3f')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
