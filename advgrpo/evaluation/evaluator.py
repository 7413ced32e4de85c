"""Held-out evaluation: fixed prompts, fixed noise, plain ODE sampling, independent metrics.

Images are keyed by (seed, prompt number, image number), so base, intermediate and final model are compared on the
same noise, whatever the number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from advgrpo.config import EvaluationSection
from advgrpo.config.judge_checks import IMAGE_STATISTICS
from advgrpo.data.references import ReferenceSet
from advgrpo.evaluation.statistics import t_interval
from advgrpo.monitor.image_statistics import image_statistics
from advgrpo.policy.base import Policy
from advgrpo.reporting.display import Display
from advgrpo.reporting.metric_names import CI95, FIRST, HELD_OUT
from advgrpo.rewards.base import Reward
from advgrpo.runtime import rng
from advgrpo.runtime.distributed import SLOW_SECONDS, Distributed
from advgrpo.runtime.mesh import Mesh
from advgrpo.sampling.dynamics import step_table
from advgrpo.sampling.sampler import Sampler

_STRIDE = 1000  # image k of prompt p has id p * _STRIDE + k


@dataclass
class Evaluator:
    """Draws held-out images and measures them.

    Args:
        metrics, references: what judges the images, and what they are compared with.
        settings: section `evaluation`.
        micro_batch: how many images are drawn at once.
        seed: of the run.
    """

    policy: Policy
    metrics: Mapping[str, Reward]
    references: ReferenceSet | None
    prompts: list[str]
    settings: EvaluationSection
    micro_batch: int
    seed: int
    distributed: Distributed
    display: Display | None = None
    of_base: bool = False  # evaluate the frozen base instead of the trained weights
    together: bool = False  # all processes draw equally often: each holds a part of the model alone
    mesh: Mesh | None = None  # whose sequence groups share the prompts; None: each process is one

    def base(self) -> Evaluator:
        """The same evaluation of the frozen base model."""
        return replace(self, of_base=True)

    def run(self, images_per_prompt: int, *, first: int = 0) -> dict[str, float]:
        """`means` of `scores`."""
        return self.means(self.scores(images_per_prompt), first=first)

    @staticmethod
    def means(scores: Mapping[str, torch.Tensor], *, first: int = 0) -> dict[str, float]:
        """Means over all held-out images with their 95 % intervals, of the result of `scores`.

        Keys: "eval_<metric>", and "eval_<metric>_ci95", half the width of Student's interval over prompts (images of
        one prompt are alike; none for a single prompt). `first` > 0 adds both over every prompt's first `first`
        images ("eval_<metric>_first"), to be compared with an evaluation of as many.
        """
        result = {}
        for name, by_prompt in scores.items():
            result[f"{HELD_OUT}{name}"] = by_prompt.mean().item()
            result |= _half_width(f"{HELD_OUT}{name}", by_prompt)
            if first:
                result[f"{HELD_OUT}{name}{FIRST}"] = by_prompt[:, :first].mean().item()
                result |= _half_width(f"{HELD_OUT}{name}{FIRST}", by_prompt[:, :first])
        return result

    def scores(self, images_per_prompt: int) -> dict[str, torch.Tensor]:
        """metric -> [prompts, images_per_prompt] float64 in the order of `prompts`; the same on every process.

        Raises:
            StopRequested: somebody asked for the end.
        """
        mesh = self.mesh or Mesh.of(self.distributed, 1)
        numbers = range(mesh.data_rank, len(self.prompts), mesh.data_size)
        most = len(range(0, len(self.prompts), mesh.data_size)) if self.together else len(numbers)
        at_once = max(1, self.micro_batch // images_per_prompt)
        scores = {name: [] for name in self.metrics}
        with (
            self.distributed.monitored("evaluate"),  # shares differ in time; the gather below does not wait for them
            self._steps("evaluating", len(numbers)) as tell,
        ):
            for start in range(0, most, at_once):
                part = numbers[start : start + at_once]
                drawn = part or range(1)  # beside the others, who need this process's part; nobody looks at it
                prompts = [self.prompts[number] for number in drawn for _ in range(images_per_prompt)]
                waits = mesh.sequence_size > 1  # in an exchange for one that judges
                self._begin(f"evaluate: prompt {start + 1} of {most}", slow=waits or not start)
                ids = torch.cat([self.ids(n, images_per_prompt) for n in drawn])
                if not part or not mesh.is_judge(start // at_once):
                    self._latents(prompts, ids)  # with those that look at them
                else:
                    images = self.images(prompts, ids)
                    for name, values in scores.items():
                        self._begin(f"evaluate: metric {name}", slow=not values)
                        with self.distributed.interruptible():
                            values.append(self.metrics[name].score(images, prompts, self.references))
                tell(start + len(part))
        order = torch.tensor(_by_process(len(self.prompts), mesh, at_once)).argsort()
        result = {}
        for name, values in scores.items():
            local = torch.cat(values).double() if values else torch.zeros(0, dtype=torch.float64)
            everywhere = self.distributed.all_gather(local)  # the prompts that process 0 has judged, process 1, ...
            result[name] = everywhere.cpu().view(-1, images_per_prompt)[order]
        return result

    def names(self) -> set[str]:
        """Those that every result of `run` with `first` has; intervals need several prompts."""
        return {f"{HELD_OUT}{metric}{part}" for metric in self.metrics for part in ("", FIRST)}

    def _begin(self, doing: str, *, slow: bool) -> None:
        """A place to stop. Processes without a share wait from the start, while the first one's may compile kernels."""
        self.distributed.step(doing, within_seconds=SLOW_SECONDS if slow else None)

    def _steps(self, what: str, prompts: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Progress over this process's prompts."""
        if self.display is None:
            return contextlib.nullcontext(lambda done: None)
        return self.display.steps(f"{what} the base model" if self.of_base else what, prompts)

    @property
    def draws_grid(self) -> bool:
        """Whether this process calls `grid_images`: rank 0 looks at them, and cannot draw them without some others."""
        return self.together or (self.mesh or Mesh.of(self.distributed, 1)).data_rank == 0

    def grid_images(self, columns: int = 4) -> list[tuple[str, torch.Tensor]]:
        """(prompt, images [columns, 3, H, W]) of the grid's prompts, always from the same noise."""
        chosen, drawn = self.prompts[: self.settings.grid_prompts], []
        with self._steps("drawing samples of" if self.of_base else "drawing samples", len(chosen)) as tell:
            for number, prompt in enumerate(chosen):
                self._begin(f"draw samples: prompt {number + 1}", slow=not number)
                drawn.append((prompt, self.images([prompt] * columns, self.ids(number, columns)).cpu()))
                tell(len(drawn))
        return drawn

    @torch.no_grad()
    def images(self, prompts: list[str], ids: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] of n prompts in micro-batches, with the evaluation's steps and guidance."""
        return torch.cat([self.policy.decode(micro_batch) for micro_batch in self._latents(prompts, ids)])

    @torch.no_grad()
    def _latents(self, prompts: list[str], ids: torch.Tensor) -> list[torch.Tensor]:
        """What `images` decodes, by micro-batch."""
        table = step_table(self.policy, self.settings.num_steps)
        merged = self.policy.has_merged and not self.of_base
        if merged:
            self.policy.merge()
        sampler = Sampler(self.policy, self.settings.guidance_scale, "gaussian", share_prefix=True, merged=merged)
        found = []
        for start in range(0, len(prompts), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            row = torch.arange(len(prompts[part]), device=self.policy.device)
            initial = sampler.initial_latents(rng.derive_seed(self.seed, "evaluation"), ids[part])
            with self.policy.disable_adapter() if self.of_base else contextlib.nullcontext():
                latents, _ = sampler.run(table, self.policy.encode(prompts[part]), initial, row)
            found.append(latents)
        return found

    def ids(self, number: int, count: int) -> torch.Tensor:
        """[count] image numbers of prompt `number`, which key their noise."""
        return number * _STRIDE + torch.arange(count)


def _by_process(prompts: int, mesh: Mesh, at_once: int) -> list[int]:
    """Numbers of all prompts in the order of the processes that judge them; those that draw together draw `at_once`."""
    found = []
    for rank in range(mesh.world_size):
        each = replace(mesh, rank=rank)
        numbers = range(each.data_rank, prompts, mesh.data_size)
        for place, start in enumerate(range(0, len(numbers), at_once)):
            found += numbers[start : start + at_once] if each.is_judge(place) else ()
    return found


def _half_width(name: str, by_prompt: torch.Tensor) -> dict[str, float]:
    """{"<name>_ci95": half the width of the t-interval of scores [prompts, images]}; empty for one prompt."""
    if len(by_prompt) < 2:
        return {}
    interval = t_interval(by_prompt.mean(1).tolist())
    return {f"{name}{CI95}": interval.high - interval.mean}


class ImageStatistic(Reward):
    """The `Reward` protocol over one of image_statistics.py's numbers: a metric, never trained on."""

    NAMES = IMAGE_STATISTICS

    def __init__(self, name: str):
        self.name = name

    def score(self, images: torch.Tensor, prompts: list[str], references: ReferenceSet | None = None) -> torch.Tensor:
        return image_statistics(images)[self.name]
