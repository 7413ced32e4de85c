"""What an iteration leaves behind, and what surrounds it: phases, the monitor, a clean start, the checkpoint's state.

How the generator learns is the objective's (policy_gradient.py, nft.py, supervised.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from advgrpo.monitor.monitor import Monitor
from advgrpo.policy.base import Policy
from advgrpo.policy.parts import parts_of
from advgrpo.runtime import rng
from advgrpo.runtime.checkpoint import pack_optimizer
from advgrpo.runtime.distributed import Distributed
from advgrpo.runtime.phases import Phases
from advgrpo.training import restoring
from advgrpo.training.clean_start import CleanStart, State
from advgrpo.training.objective import Iteration, Objective, Outcome
from advgrpo.training.restoring import Restored
from advgrpo.training.update import Updater
from advgrpo.types import Flag


@dataclass(frozen=True)
class Length:
    """How long a run is, and how large its iterations."""

    iterations: int
    global_steps: int  # it ends earlier, after as many; 0: by `iterations` alone
    images: int  # of an iteration, over all processes


class Trainer:
    """Owns everything an iteration touches; `iterate` runs one and returns its metrics (build.build_trainer).

    Args:
        policy, updater: the generator, and its optimizer and average.
        objective: how it learns.
        monitor: looks at every iteration's metrics and images.
        length: of the run.
        seed: of the run.
        max_grad_norm: gradients are clipped to it.
        copies: whether the state fits the device twice, so that an iteration can be left.
    """

    def __init__(
        self,
        policy: Policy,
        updater: Updater,
        objective: Objective,
        monitor: Monitor,
        distributed: Distributed,
        *,
        length: Length,
        seed: int,
        max_grad_norm: float,
        copies: bool,
    ):
        self.policy, self.updater, self.ema, self.objective = policy, updater, updater.ema, objective
        self.monitor, self.distributed = monitor, distributed
        self.length, self.seed, self.max_grad_norm = length, seed, max_grad_norm
        self.flags: list[Flag] = []  # active after the newest iteration
        self.iteration = 0  # the next one to run
        self.clean = CleanStart(self.state, copies=copies and distributed.is_main)  # rank 0 alone saves

    @property
    def finished(self) -> bool:
        """Whether the run has its length: `iterations`, or `global_steps` before that."""
        limit = self.length.global_steps
        return self.iteration >= self.length.iterations or 0 < limit <= self.ema.global_step

    def iterate(self) -> dict[str, float]:
        """One iteration of the objective; returns its metrics and times.

        Raises:
            StopRequested: somebody asked for the end; `abandon` then goes back to the iteration's start.
        """
        number, started, computing = self.iteration, time.perf_counter(), time.process_time()
        # Nothing of ours draws from torch's own generator; a reward of somebody else's may, and is resumed exactly too.
        torch.manual_seed(rng.derive_seed(self.seed, "torch", number))
        iteration = self.begin(number)
        outcome = self.objective.iterate(iteration)
        with iteration.phase("monitor"):
            statistics = self.judge(outcome, number)
        self.iteration += 1
        phase_seconds = {f"seconds_{name}": value for name, value in iteration.phases.seconds().items()}
        seconds = time.perf_counter() - started
        computed = time.process_time() - computing  # of all threads; waiting for a core does not count
        speed = {"images_per_second": self.length.images / seconds, "seconds": seconds, "cpu_seconds": computed}
        self.clean.end()
        return {"iteration": number, **outcome.metrics, **statistics, **speed, **phase_seconds}

    def begin(self, number: int) -> Iteration:
        """What an objective is told of an iteration."""
        return Iteration(number, Phases(self.policy.device), self.clean, self.distributed)

    def judge(self, outcome: Outcome, number: int) -> dict[str, float]:
        """Judge the iteration if it is due: sets `flags` and returns the statistics that they rest on."""
        if not self.monitor.due(number):
            return {}
        images = None if outcome.images is None else outcome.images()
        rms, norm = None, outcome.metrics["grad_norm"]
        if norm is not None:  # of the gradient as Adam sees it: clipped, over all trained elements
            parts, trained = parts_of(self.policy), self.policy.trainable_parameters()
            elements = sum(p.numel() for _, p in trained) if parts is None else parts.elements
            rms = min(norm, self.max_grad_norm) / elements**0.5
        statistics = {**(images.metrics() if images else {}), "monitor_gradient_rms": rms}
        for name, value in outcome.statistics.items():
            statistics[name] = value.item()
        self.flags = self.monitor.check({"iteration": number, **outcome.metrics, **statistics}, images)
        return statistics

    def abandon(self) -> None:
        """Go back to the start of the iteration under way, if one is and a copy was made of it."""
        self.clean.restore(self.load)

    @contextlib.contextmanager
    def averaged(self, weights: Mapping[str, torch.Tensor] | None = None) -> Iterator[None]:
        """Inside, the policy holds the averaged weights, or `weights`, which once were, by parameter name."""
        with self.clean.changed(), self.ema.swap(weights):
            yield

    def state(self) -> State:
        """Everything the next iteration depends on, as tensors and JSON; the same on every process."""
        optimizer_tensors, optimizer_state = pack_optimizer(self.updater.optimizer, "optimizer")
        own_tensors, own_state = self.objective.state()
        tensors = {
            **{f"policy.{name}": p.detach() for name, p in self.policy.trainable_parameters()},
            **{f"ema.{name}": t for name, t in self.ema.state_dict().items()},
            **optimizer_tensors,
            **own_tensors,
        }
        steps = {"iteration": self.iteration, "global_step": self.ema.global_step}
        state = {**steps, "optimizer": optimizer_state, "monitor": self.monitor.state(), **own_state}
        return tensors, {"trainer": state}

    def load(self, tensors: dict[str, torch.Tensor], state: dict) -> None:
        """Continue from `state()`'s result as if never stopped.

        Raises:
            UserError: it is not this run's, or not finite; see `restoring.check`. Nothing was changed.
        """
        self.take(self.checked(tensors, state))

    def checked(self, tensors: dict[str, torch.Tensor], state: dict) -> Restored:
        """What `load` would take over, or its error."""
        return restoring.check(
            tensors,
            state,
            parameters=dict(self.policy.trainable_parameters()),
            optimizer=self.updater.optimizer,
            monitor=self.monitor,
            objective=self.objective,
        )

    def take(self, found: Restored) -> None:
        """Continue from what `checked` has found."""
        with torch.no_grad():
            for name, parameter in self.policy.trainable_parameters():
                parameter.copy_(found.policy[name])
        self.ema.load_state_dict(found.ema)
        self.updater.optimizer.load_state_dict(found.optimizer)
        self.objective.load(found.objective)
        self.monitor.load(found.monitor)
        self.flags = self.monitor.active()
        self.iteration, self.ema.global_step = found.iteration, found.global_step
