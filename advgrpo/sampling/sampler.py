"""The sampler: ODE steps, and on the window's steps noise and log-probabilities.

Where the rows of a prompt share their initial noise (in Flow-GRPO-Fast those of a mini-group do), they are one
trajectory up to the window's first step: `share_prefix` computes it once per prompt and branches at that step;
without it every row is computed, with the same result up to rounding. Where every image has its own noise (the
released Adv-GRPO code), nothing is shared. The window's steps always run the trainer's own forward, so that
log-probabilities can be repeated to the last bit; merged weights serve ODE steps only, unless `window_merged` gives
that exactness up.

Every step does the same operations whatever its number: coefficients, timesteps and modulations are device tables read
at a device step counter, noise is keyed by device tensors, and nothing waits for the device. With a graph backend each
kind of step (ODE, window, the window's first) is one CUDA graph per shape, replayed for every step and every iteration;
one graph of all ten steps would have to be captured anew for every window that is drawn.

Shapes: P prompts, M images (M >= P), latents [., C, H, W] float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from advgrpo.policy.base import Policy, PreparedPrompts
from advgrpo.runtime.graphs import CapturedFunction, GraphBackend, StaticBuffers
from advgrpo.runtime.transfer import to_device
from advgrpo.sampling.dynamics import StepTable
from advgrpo.types import Conditioning, WindowStep
from advgrpo_kernels import GaussianStep, gaussian_step, philox_normal


@dataclass
class Sampler:
    policy: Policy
    guidance_scale: float
    likelihood: str
    share_prefix: bool
    merged: bool
    window_merged: bool = False
    graphs: GraphBackend | None = None
    shared_noise: bool = True  # the images of a prompt start from one noise

    def __post_init__(self):
        if self.share_prefix and not self.shared_noise:
            raise ValueError("share_prefix needs shared_noise: images with their own noise have no common prefix")
        self._inputs = StaticBuffers(self.policy.device, static=self.graphs is not None)
        self._prompts = StaticBuffers(self.policy.device, static=self.graphs is not None)
        self._prepared: PreparedPrompts | None = None  # the form of the prompts; their tensors are in `_prompts`
        steps = {"ODE step": self._ode_step, "window step": self._window_step, "branching step": self._branching_step}
        self._steps = {
            name: CapturedFunction(function, name=name, backend=self.graphs) for name, function in steps.items()
        }

    @property
    def captures(self) -> int:
        """CUDA graphs held."""
        return sum(step.captures for step in self._steps.values())

    def initial_latents(self, seed: int, ids: torch.Tensor) -> torch.Tensor:
        """[ids, C, H, W] unit noise; each row depends on (seed, id) only."""
        shape = (len(ids), *self.policy.latent_shape())
        return philox_normal(shape, seed=seed, sample_ids=to_device(ids, self.policy.device))

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
        """Denoise `initial` into the M images of `row` [M]; returns latents [M, ...] and the steps to train on.

        `initial` is [P, ...], from which a prompt's images branch; without `shared_noise` it is [M, ...].
        `noise_seed` and `image_ids` [M] key the noise of the window's steps.
        """
        prompts = self.policy.prepare(conditioning, table.timesteps, guided=self.guidance_scale != 1.0)
        shared, inputs = self.share_prefix, self._inputs
        latents = initial if shared or not self.shared_noise else initial.index_select(0, row)
        self._set_prompts(prompts if shared else prompts.rows(row))
        inputs.fill("coefficients", table.coefficients)
        if table.window:
            inputs.fill("seed", to_device(torch.tensor([noise_seed]), self.policy.device))
            inputs.fill("image_ids", image_ids)
            inputs.fill("row", row)
        steps: list[WindowStep] = []
        for i, number in enumerate(table.numbers):
            inputs.fill("latents", latents)
            inputs.fill("step", number)
            if i not in table.window:
                latents = self._run("ODE step")
                continue
            before = self._keep(latents)
            latents, log_prob = self._run("branching step" if shared else "window step")
            latents = self._keep(latents)
            if i in table.trained:
                steps.append(WindowStep(i, before, latents, self._keep(log_prob), shared))
            if shared:
                self._set_prompts(prompts.rows(row))
                shared = False
        return (latents.index_select(0, row) if shared else self._keep(latents)), steps

    def _set_prompts(self, prepared: PreparedPrompts) -> None:
        self._prepared = prepared
        self._prompts.reset()
        for name, tensor in prepared.tensors().items():
            self._prompts.fill(name, tensor)

    def _run(self, step: str):
        """One step; the result may be overwritten by the next."""
        return self._steps[step]((self._inputs.key(), self._prompts.key()))

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone() if self._inputs.static else tensor

    def _velocity(self, merged: bool):
        forward = self.policy.predict_merged if merged else self.policy.predict
        prepared = self._prepared.with_tensors(self._prompts.tensors)
        return forward(self._inputs["latents"], self._inputs["step"], prepared)

    def _transition(self, latents, velocity, **options) -> GaussianStep:
        number = self._inputs["step"]
        return gaussian_step(
            latents,
            velocity[0],
            self._inputs["coefficients"].index_select(0, number)[0],
            uncond_velocity=velocity[1],
            guidance_scale=self.guidance_scale,
            step=number,
            **options,
        )

    def _ode_step(self) -> torch.Tensor:
        return self._transition(self._inputs["latents"], self._velocity(self.merged), likelihood=None).next_latents

    def _window_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._noisy(self._inputs["latents"], self._velocity(self.window_merged))

    def _branching_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The window's first step: one row per prompt goes in, one per image comes out."""
        row, velocity = self._inputs["row"], self._velocity(self.window_merged)
        expanded = tuple(v if v is None else v.index_select(0, row) for v in velocity)
        return self._noisy(self._inputs["latents"].index_select(0, row), expanded)

    def _noisy(self, latents, velocity) -> tuple[torch.Tensor, torch.Tensor]:
        seed, ids = self._inputs["seed"], self._inputs["image_ids"]
        step = self._transition(latents, velocity, seed=seed, sample_ids=ids, likelihood=self.likelihood)
        return step.next_latents, step.log_prob
