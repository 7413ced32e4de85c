"""The sampler: ODE steps, and on the window's steps noise and log-probabilities.

The rows of a prompt share their initial noise, so up to the window's first step they are one trajectory. `share_prefix`
computes it once per prompt and branches at that step (METHOD section 3); without it every row is computed, with the
same result up to rounding. The window's steps always run the trainer's own forward, so that log-probabilities can be
repeated to the last bit; `merged` weights serve ODE steps only, unless `window_merged` gives that exactness up.

Every step does the same operations whatever its number: coefficients, timesteps and modulations are device tables read
at a device step counter, and nothing waits for the device.

Shapes: P prompts, M pictures (M >= P), latents [., C, H, W] float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from advgrpo_kernels import gaussian_step, philox_normal

from ..types import Conditioning, WindowStep
from .base import Policy
from .dynamics import StepTable


@dataclass
class Sampler:
    policy: Policy
    guidance_scale: float
    likelihood: str
    share_prefix: bool
    merged: bool
    window_merged: bool = False

    def initial_latents(self, seed: int, ids: torch.Tensor) -> torch.Tensor:
        """[P, C, H, W] unit noise; each row depends on (seed, id) only."""
        shape = (len(ids), *self.policy.latent_shape())
        return philox_normal(shape, seed=seed, sample_ids=ids, device=self.policy.device)

    @torch.no_grad()
    def run(
        self,
        table: StepTable,
        conditioning: Conditioning,
        initial: torch.Tensor,
        row: torch.Tensor,
        *,
        noise_seed: int = 0,
        image_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[WindowStep]]:
        """Denoise `initial` [P, ...], branching into the M pictures of `row` [M]; returns latents [M, ...] and steps.

        `noise_seed` and `image_ids` [M] key the noise of the window's steps.
        """
        branch = table.window[0] if table.window else len(table.timesteps)
        shared = self.share_prefix
        latents = initial if shared else initial.index_select(0, row)
        prompts = self.policy.prepare(conditioning, table.timesteps, guided=self.guidance_scale != 1.0)
        prepared = prompts if shared else prompts.rows(row)
        steps: list[WindowStep] = []
        for i, number in enumerate(table.numbers):
            stochastic = i in table.window
            velocity = self._forward(stochastic)(latents, number, prepared)
            inputs, was_shared = latents, shared
            if shared and i == branch:
                latents, velocity = latents.index_select(0, row), tuple(_pick(v, row) for v in velocity)
                prepared, shared = prompts.rows(row), False
            step = gaussian_step(
                latents,
                velocity[0],
                table.at(number),
                uncond_velocity=velocity[1],
                guidance_scale=self.guidance_scale,
                seed=noise_seed if stochastic else None,
                sample_ids=image_ids if stochastic else None,
                step=number,
                likelihood=self.likelihood if stochastic else None,
            )
            latents = step.next_latents
            if stochastic:
                steps.append(WindowStep(i, inputs, latents, step.log_prob, was_shared))
        return (latents.index_select(0, row) if shared else latents), steps

    def _forward(self, stochastic: bool):
        merged = self.window_merged if stochastic else self.merged
        return self.policy.merged_velocity if merged else self.policy.velocity


def _pick(velocity: torch.Tensor | None, row: torch.Tensor) -> torch.Tensor | None:
    return None if velocity is None else velocity.index_select(0, row)
