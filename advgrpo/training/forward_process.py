"""What objectives share that learn from drawn images without likelihoods: their latents, noised again.

Images are drawn by ODE steps. Their latents x₀ are noised to levels σ of the sampler's schedule, other ones for each
image, x_σ = (1 - σ) x₀ + σ ε, where the flow that leads to this image is u = ε - x₀ (nft.py, awm.py).

Shapes: G images of the iteration, M of a micro-batch, K noise levels of an image, T sampler steps, latents [., C, h, w]
float32.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import torch

from advgrpo.config import NoiseLevelsSection
from advgrpo.policy.base import PreparedPrompts
from advgrpo.runtime import rng
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import StepTable, step_table
from advgrpo.training.rewarded import RewardedObjective
from advgrpo.types import MicroBatchRollout
from advgrpo_kernels import philox_normal


@dataclass
class Level:
    """M images at one noise level each."""

    noisy: torch.Tensor  # x_σ [M, C, h, w]
    flow: torch.Tensor  # u = ε - x₀ [M, C, h, w]
    sigma: torch.Tensor  # [M] float32
    step: torch.Tensor  # [M] int64, the number of the sampler's step of that level


class ForwardProcess(RewardedObjective):
    """`RewardedObjective` whose update looks at noised latents of the images."""

    keeps_clean_latents: ClassVar[bool] = True
    draws: ClassVar[str]  # what its random draws are keyed by, beside the seed and the iteration
    kl_weight: float  # `update.kl_weight`

    @property
    @abstractmethod
    def noise_levels(self) -> NoiseLevelsSection:
        """The settings that say how many levels an image is trained at."""

    @property
    def trained(self) -> int:
        """K."""
        return self.noise_levels.trained_of(self.settings.num_steps)

    def table(self, iteration: int) -> StepTable:
        """ODE steps, the same in every iteration."""
        return step_table(self.policy, self.settings.num_steps)

    def noised(self, rollout: MicroBatchRollout, iteration: int) -> list[Level]:
        """K levels of a micro-batch. Which, and their noise, is drawn by image number, never by row or process."""
        clean, ids, device = rollout.clean, rollout.micro_batch.image_ids, self.policy.device
        drawn = self.level_numbers(iteration)[ids]
        sigmas = to_device(self.policy.schedule(self.settings.num_steps)[0].float()[drawn], device)
        numbers, image_ids = to_device(drawn, device), to_device(ids, device)
        levels = []
        for number in range(drawn.shape[1]):
            seed = rng.derive_seed(self.seed, f"{self.draws}_noise", iteration, number)
            noise = philox_normal(tuple(clean.shape), seed=seed, sample_ids=image_ids)
            sigma = sigmas[:, number]
            noisy = torch.lerp(clean, noise, sigma.view(-1, 1, 1, 1))
            levels.append(Level(noisy, noise - clean, sigma, numbers[:, number].contiguous()))
        return levels

    def level_numbers(self, iteration: int) -> torch.Tensor:
        """[G, K] int64 on the host: different steps of the sampler for each image."""
        generator = rng.generator(self.seed, f"{self.draws}_levels", iteration)
        draws = torch.rand(self.settings.images, self.settings.num_steps, generator=generator)
        return draws.argsort(dim=1)[:, : self.trained]

    def prepared(self, rollout: MicroBatchRollout, table: StepTable) -> PreparedPrompts:
        """The prompts of a micro-batch, one row per image, without guidance."""
        row = to_device(rollout.micro_batch.row, self.policy.device)
        return self.policy.prepare(rollout.conditioning, table.timesteps, guidance=1.0).rows(row)

    def gathered(self, reports: list[torch.Tensor], iteration: int) -> tuple[list[float], float]:
        """(sums over processes and minibatches, mean gradient norm), read on the host.

        Args:
            reports: for every minibatch this process's sums and, last, the gradient's norm, [N + 1] float64.

        Raises:
            As `Updater.check`.
        """
        everywhere = self.distributed.all_gather(torch.stack(reports)[None]).cpu()  # [processes, minibatches, N + 1]
        norms = everywhere[0, :, -1]
        self.updater.check(0.0, norms.tolist(), iteration)
        sums = self.micro_batches.mesh.one_of_each(everywhere)[..., :-1].sum((0, 1))
        return sums.tolist(), norms.mean().item()

    def levels_of_kl(
        self, levels: list[Level], image_ids: torch.Tensor, *, watch_kl: bool, first: bool
    ) -> tuple[list[Level], bool]:
        """At which levels of a micro-batch the policy that the KL is to runs, and whether the KL there counts.

        All where the loss has it. Else the first one, of image 0's micro-batch where it is watched, and uncounted of
        every process's `first` micro-batch where all run each forward together.
        """
        if self.kl_weight:
            return levels, True
        watched = watch_kl and int(image_ids[0]) == 0
        return levels[: int(watched or (watch_kl and self.together and first))], watched

    @torch.no_grad()
    def without_gradient(
        self, weights: AbstractContextManager[None], levels: list[Level], prompts: PreparedPrompts
    ) -> list[torch.Tensor]:
        """Velocities [M, C, h, w] float32 at each level, with the policy as it is inside `weights`."""
        with weights:
            return [self.policy.predict(level.noisy, level.step, prompts)[0].float() for level in levels]
